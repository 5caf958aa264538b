"""What the service logs as an error of no known kind fails a run."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from rotator.ports import RotatorError
from rotator.sim.faults.judge import Judge


class _Errors(logging.Handler):
    def __init__(self, judge: Judge) -> None:
        super().__init__(logging.WARNING)
        self._judge = judge

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if error is not None and not isinstance(error, RotatorError):
            self._judge.fail("nothing raises unforeseen", f"{record.getMessage()}: {error!r}")


@contextmanager
def errors_are_failures(judge: Judge) -> Iterator[None]:
    """What the service logs with an exception that is none of its own is a bug."""
    log, handler = logging.getLogger("rotator"), _Errors(judge)
    before = log.propagate, log.level
    log.addHandler(handler)
    log.propagate, log.level = False, logging.WARNING
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.propagate, log.level = before
