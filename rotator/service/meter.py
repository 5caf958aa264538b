"""Tokens and their times, taken from answers as they pass: a few additions an event, one look at the end.

An engine tells its tokens in ``usage`` (OpenAI: ``prompt_tokens`` and ``completion_tokens``; Anthropic and Responses:
``input_tokens`` and ``output_tokens``), last of all in a body or stream. Text that a model wrote cannot pass for it:
inside a JSON string the quotes around the word are escaped.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from rotator.service.metrics import Metrics
from rotator.service.traffic import Ticket

TAIL_BYTES = 4096  # usage stands within so many bytes of the end
_USAGE = b'"usage"'
_PROMPT = re.compile(rb'"(?:prompt|input)_tokens"\s*:\s*(\d{1,12})')
_COMPLETION = re.compile(rb'"(?:completion|output)_tokens"\s*:\s*(\d{1,12})')
_EVENT = b"\n\n"
_DONE = b"[DONE]\n\n"


class Metered(NamedTuple):
    """Whose answer it is, and who counts."""

    metrics: Metrics
    ticket: Ticket

    def whole(self, body: bytes) -> None:
        """An answer that came in one piece."""
        if (usage := tokens_of(body)) is not None:
            self.metrics.answered(self.ticket.model, usage[0], usage[1])


class Meter:
    """Of one stream. ``clock`` is the loop's."""

    __slots__ = ("_before", "_clock", "_events", "_first_s", "_last", "_metered")

    def __init__(self, metered: Metered, clock: Callable[[], float]) -> None:
        self._metered = metered
        self._clock = clock
        self._events = 0
        self._first_s = 0.0
        self._before = self._last = b""

    def events(self, data: bytes) -> None:
        """Whole events of a stream, as they are passed on."""
        if not self._events:
            self._first_s = self._clock()
        self._events += data.count(_EVENT) or 1
        self._before, self._last = self._last, data

    def end(self) -> None:
        """The stream is over, whole or not."""
        if not self._events:
            return
        metrics, ticket = self._metered
        usage = tokens_of(self._before[-TAIL_BYTES:] + self._last[-TAIL_BYTES:])
        told = self._events - self._last.endswith(_DONE)
        prompt, completion = usage if usage is not None else (0, told)
        first_s = self._first_s - ticket.entered_s + ticket.waited_s
        lasted_s = self._clock() - self._first_s - ticket.stalled_s
        per_token_s = max(0.0, lasted_s) / (completion - 1) if completion > 1 else None
        metrics.answered(
            ticket.model, prompt, completion, estimated=usage is None, first_s=first_s, per_token_s=per_token_s
        )


def tokens_of(tail: bytes) -> tuple[int, int] | None:
    """Prompt and completion tokens by the last usage in the bytes; None where it tells neither."""
    at = tail.rfind(_USAGE, max(0, len(tail) - 2 * TAIL_BYTES))
    if at < 0:
        return None
    prompt, completion = _PROMPT.search(tail, at), _COMPLETION.search(tail, at)
    if prompt is None and completion is None:
        return None
    return int(prompt[1]) if prompt else 0, int(completion[1]) if completion else 0
