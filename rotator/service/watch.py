"""What interrupts a request from outside: its client goes away, its ticket is cut, or its stream stands still too long.

All three cancel the request's own task, marked so that they can be told from a cancel that is meant to end it. That
costs no task a request: only one that lives longer than a moment gets a listener for its client's going.
"""

import asyncio
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Protocol, Self, TypeVar

from rotator.service.responses import Receive

T = TypeVar("T")

LISTEN_AFTER_S = 0.02  # requests that end sooner are not watched: a client that left meanwhile is noticed then


class Flow(Protocol):
    """The part of a ticket that says whether bytes may go to the client, and how long they could not."""

    @property
    def freezes(self) -> int: ...

    @property
    def stalled_s(self) -> float: ...

    @property
    def flowing(self) -> bool: ...

    async def wait_flow(self) -> None: ...


class FreeFlow:
    """For answers that come from no engine of ours: nothing holds them."""

    flowing = True
    freezes = 0
    stalled_s = 0.0

    async def wait_flow(self) -> None:
        return None


class Watch:
    """Made by the request's own task. ``left`` and ``reason`` (of a cut) say why ``absorb`` was true."""

    __slots__ = ("_done", "_interrupted", "_listener", "_loop", "_receive", "_task", "_timer", "left", "reason")

    def __init__(self, receive: Receive) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 # an ASGI application always runs in a task
        self._task = task
        self._loop = task.get_loop()
        self._receive = receive
        self._listener: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._interrupted = False
        self._done = False
        self.left = False
        self.reason: str | None = None

    def clock(self) -> float:
        """Seconds, on the loop's clock."""
        return self._loop.time()

    def listen_soon(self) -> None:
        """Begin to listen for the client's going, if the request takes longer than a moment. Its body was read."""
        if self._timer is None and self._listener is None:
            self._timer = self._loop.call_later(LISTEN_AFTER_S, self.listen)

    def listen(self) -> None:
        if self._listener is None and not self._done:
            self._listener = self._loop.create_task(self._listen())

    def cut(self, reason: str) -> None:
        self.reason = reason
        self._interrupt()

    def absorb(self) -> bool:
        """To be asked once in the handler of a CancelledError: whether it was ours, and nobody else cancels."""
        return self._interrupted and self._task.uncancel() == 0

    def stop(self) -> None:
        self._done = True
        if self._timer is not None:
            self._timer.cancel()
        if self._listener is not None:
            self._listener.cancel()

    async def _listen(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.left = True
        self._interrupt()

    def _interrupt(self) -> None:
        if not self._done and not self._interrupted:
            self._interrupted = True
            self._task.cancel()


class Stall:
    """Nudges a stream that stands still, every ``every_s``, out of whatever it waits for in ``wait``."""

    __slots__ = ("_every_s", "_flow", "_loop", "_nudged", "_resting", "_task", "_timer")

    def __init__(self, flow: Flow, every_s: float) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 # as above
        self._task = task
        self._loop = task.get_loop()
        self._flow = flow
        self._every_s = every_s
        self._resting = False
        self._nudged = False

    def __enter__(self) -> Self:
        self._timer = self._loop.call_later(self._every_s, self._fire)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._timer.cancel()

    async def wait(self, what: Callable[[], Awaitable[T]]) -> T | None:
        """What ``what`` returns, or None when nudged out of it: it must bear being cancelled and begun again."""
        self._resting = True
        try:
            return await what()
        except asyncio.CancelledError:
            if not self._nudged:
                raise
            self._nudged = False
            if self._task.uncancel() > 0:
                raise
            return None
        finally:
            self._resting = False

    def _fire(self) -> None:
        self._timer = self._loop.call_later(self._every_s, self._fire)
        if self._resting and not self._nudged and not self._flow.flowing:
            self._nudged = True
            self._task.cancel()
