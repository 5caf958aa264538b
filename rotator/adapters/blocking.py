"""Blocking work off the event loop, with a deadline."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

from rotator.ports import LaunchError

T = TypeVar("T")


async def off_loop(work: Callable[[], T], *, deadline_s: float, doing: str) -> T:
    """Run ``work`` in a thread. Raises LaunchError naming ``doing`` when it outlasts ``deadline_s`` (seconds): the
    thread is left to end by itself, the loop never waits for it."""
    try:
        async with asyncio.timeout(deadline_s):
            return await asyncio.to_thread(work)
    except TimeoutError:
        raise LaunchError(
            f"{doing} took longer than {deadline_s:g} s: the system does not answer (see dmesg for stuck processes)"
        ) from None
