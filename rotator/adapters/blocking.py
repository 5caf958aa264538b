"""Blocking work off the event loop, with a deadline."""

import asyncio
import contextlib
import contextvars
import threading
from collections.abc import Callable
from typing import TypeVar

from rotator.ports import LaunchError

T = TypeVar("T")
THREADS_MAX = 64  # at one time; so many are there only where the system does not answer
_NAME = "off the loop"


async def off_loop(work: Callable[[], T], *, deadline_s: float, doing: str) -> T:
    """Run ``work`` in a thread of its own. Raises LaunchError naming ``doing`` when it outlasts ``deadline_s``
    (seconds), and at once while THREADS_MAX others have not ended.

    What outlasts it is left to end by itself: nothing waits for it, neither the loop, nor other work (as it would for
    room in a pool), nor the process's exit."""
    if sum(thread.name == _NAME for thread in threading.enumerate()) >= THREADS_MAX:
        raise LaunchError(f"{doing} was not tried: {THREADS_MAX} earlier reads still hang (see dmesg)")
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()
    context = contextvars.copy_context()

    def run() -> None:
        try:
            result = context.run(work)
        except Exception as e:
            _tell(loop, done, lambda error=e: done.set_exception(error))  # type: ignore[misc] # its type is Exception
        else:
            _tell(loop, done, lambda: done.set_result(result))

    threading.Thread(target=run, name=_NAME, daemon=True).start()
    try:
        async with asyncio.timeout(deadline_s):
            return await done
    except TimeoutError:
        if done.done() and not done.cancelled():
            raise  # it is the work's own
        raise LaunchError(
            f"{doing} took longer than {deadline_s:g} s: the system does not answer (see dmesg for stuck processes)"
        ) from None


def _tell(loop: asyncio.AbstractEventLoop, done: "asyncio.Future[T]", settle: Callable[[], None]) -> None:
    """In the loop, unless it has ended meanwhile, or whoever asked has gone."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(lambda: None if done.done() else settle())
