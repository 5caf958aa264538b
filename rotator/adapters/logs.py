"""The service's own log: one line an event, as text or as JSON, and no secret in either.

Everything that this process logs goes through here: uvicorn's, APScheduler's and SQLAlchemy's loggers, too.
"""

import datetime
import logging
import sys
import traceback
from collections.abc import Callable
from typing import Any, TextIO

import orjson

from rotator.config_telemetry import LogConfig
from rotator.ports_telemetry import ABOUT

TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
# What libraries tell at INFO is about themselves.
_QUIET = ("apscheduler", "alembic", "httpx", "asyncio", "urllib3")
_FIELDS = ("request_id", "trace_id", "engine", "swap")


class _Redacting(logging.Formatter):
    def __init__(self, redact: Callable[[str], str]) -> None:
        super().__init__(TEXT)
        self._redact = redact


class TextFormatter(_Redacting):
    """A line for people; what an exception adds follows it."""

    def format(self, record: logging.LogRecord) -> str:
        return self._redact(super().format(record))


class JsonFormatter(_Redacting):
    """``time``, ``level``, ``logger``, ``message``; ``error`` with its traceback; ``request_id``, ``trace_id``,
    ``engine`` and ``swap`` where they are known. These and no others: what a library hangs on a record stays here."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line: dict[str, Any] = {
            "time": at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": self._redact(_message(record)),
        }
        if record.exc_info and record.exc_info[1] is not None:
            line["error"] = self._redact("".join(traceback.format_exception(record.exc_info[1])))
        return orjson.dumps(line | fields_of(record)).decode(errors="replace")


def _message(record: logging.LogRecord) -> str:
    try:
        text = record.getMessage()
    except (TypeError, ValueError):  # its arguments do not fit its text
        text = f"{record.msg} {record.args}"
    return text.encode(errors="replace").decode()  # a lone surrogate is no JSON


def fields_of(record: logging.LogRecord) -> dict[str, str]:
    """What the line is about: told by its caller (``extra``), else by the task that it was written in."""
    about = ABOUT.get()
    known = {} if about is None else dict(about.log_fields())
    told = {name: str(record.__dict__[name]) for name in _FIELDS if name in record.__dict__}
    return known | told


def set_up_logs(config: LogConfig, redact: Callable[[str], str], stream: TextIO | None = None) -> logging.Handler:
    """Send everything to ``stream`` (standard error where absent) from now on. Returns the handler."""
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(JsonFormatter(redact) if config.format == "json" else TextFormatter(redact))
    handler.addFilter(_is_news)
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(config.level.upper())
    for library in _QUIET:
        logging.getLogger(library).setLevel(max(logging.WARNING, root.level))
    return handler


def _is_news(record: logging.LogRecord) -> bool:
    """An answer that broke off is left without an end on purpose, so that it never looks whole: no error of ours."""
    return record.name != "uvicorn.error" or "without completing response" not in record.getMessage()
