"""An asyncio event loop under virtual time: when nothing is ready, the clock jumps to the next timer."""

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

STALLED_MAX = (
    1000  # selects in a row with neither a timer nor an event: the program waits for something that never comes
)


class Stalled(RuntimeError):
    """Everything waits, and no timer is set: in virtual time this is a deadlock."""


class _JumpingSelector(selectors.DefaultSelector):
    """Never sleeps: a wait becomes a jump of the virtual clock. Without ``polls`` no file is ever looked at, for
    programs that have neither files nor threads."""

    def __init__(self, polls: bool) -> None:
        super().__init__()
        self.now_s = 0.0
        self._polls = polls
        self._stalled = 0

    def select(self, timeout: float | None = None) -> Any:
        events = super().select(0) if self._polls else []
        if events or timeout == 0:
            self._stalled = 0
        elif timeout is None:
            self._stalled += 1
            if self._stalled > STALLED_MAX or not self._polls:
                raise Stalled("every task waits and no timer is set")
        else:
            self._stalled = 0
            self.now_s += timeout
        return events


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    def __init__(self, *, polls: bool = True) -> None:
        self._jumping = _JumpingSelector(polls)
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now_s


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end under virtual time. Raises Stalled on a deadlock."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)
