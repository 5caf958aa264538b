"""A changed fleet file is taken: engines that it no longer has are stopped first, the rest applies at once."""

import asyncio

from rotator.config import FleetConfig
from rotator.config_diff import Changes
from rotator.core.values import Command, CommandKind
from rotator.service.loop import Loop
from rotator.service.operations import CommandTimeout, ShuttingDown
from rotator.service.operator import Operator
from rotator.service.setup import Setup

REMOVE_S = 120.0


async def take(
    loop: Loop, operator: Operator, setup: Setup, new: FleetConfig, *, within_s: float = REMOVE_S
) -> Changes:
    """Raises ConfigError and what a stop raises: then everything stays as it was, but for engines that have stopped."""
    if loop.draining:
        raise ShuttingDown
    gone = sorted(loop.fleet.engines.keys() - {e.name for e in new.engines})
    await loop.do(lambda: loop.world.traffic.retire(gone))  # who waits for one would have it started again
    try:
        await asyncio.gather(*(_out(loop, operator, name, within_s) for name in gone))
        return await loop.do(lambda: setup.apply(new))
    except BaseException:
        await loop.do(setup.keep)
        raise


async def _out(loop: Loop, operator: Operator, name: str, within_s: float) -> None:
    """Stop it, and return when no swap has to do with it: whoever carries one out must find it as it was planned."""
    give_up_at_s = loop.now_s() + within_s
    while (left_s := give_up_at_s - loop.now_s()) > 0:
        if swaps := [a.task for a in loop.active.values() if a.task and a.concerns(name)]:
            await asyncio.wait(swaps, timeout=left_s)
        elif loop.runtime(name).live:
            await operator.command(Command(CommandKind.STOP, name), wait=True, deadline_s=left_s)
        else:
            return
        await asyncio.sleep(0)  # the loop is told of a swap's end by a message
    raise CommandTimeout(f"{name} was not out within {within_s:.0f} s: it stays; reload again")
