"""What happens inside, told outside: spans of traces, and what a log line is about.

A span is spoken of by its W3C ``traceparent``, the text that goes over the wire; so nobody here knows whose library
makes them.
"""

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Literal, Protocol

SpanKind = Literal["server", "client", "internal"]
Attribute = str | int | float | bool


class Span(Protocol):
    """One timed piece of work. None of its calls raises or blocks."""

    @property
    def traceparent(self) -> str: ...

    @property
    def trace_id(self) -> str:
        """32 hexadecimal digits."""
        ...

    def set(self, name: str, value: Attribute) -> None: ...

    def link(self, traceparent: str) -> None:
        """Say that another span, perhaps of another trace, has to do with this one."""
        ...

    def end(self, error: str = "", *, at_wall_s: float | None = None) -> None:
        """It is over, now or then (Unix seconds); later calls change nothing."""
        ...


class Tracer(Protocol):
    def begin(
        self,
        name: str,
        *,
        kind: SpanKind = "internal",
        parent: str = "",
        at_wall_s: float | None = None,
        attributes: Mapping[str, Attribute] | None = None,
    ) -> Span:
        """Begin a span, under ``parent`` where that is a valid traceparent, else a trace of its own. Never raises."""
        ...


class About(Protocol):
    """What the work of a task is about."""

    def log_fields(self) -> Mapping[str, str]:
        """``request_id``, ``trace_id``, ``engine``, ``swap``: those that are known now."""
        ...


# Each task has its own value, so this is no state that two of them share: the way in which Python hands on context.
ABOUT: ContextVar[About | None] = ContextVar("about", default=None)
