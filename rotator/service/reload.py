"""A changed fleet file is taken: engines that it no longer has are stopped first, the rest applies at once."""

import asyncio
from collections.abc import Awaitable, Callable

from rotator.config import FleetConfig
from rotator.config_diff import Changes
from rotator.core.values import Command, CommandKind
from rotator.service.loop import Loop
from rotator.service.operations import CommandTimeout, ShuttingDown
from rotator.service.operator import Operator
from rotator.service.setup import Setup

REMOVE_S = 120.0


class Reloads:
    """One at a time, and each reads the file when its turn has come: the newest is taken last."""

    def __init__(self, loop: Loop, operator: Operator, setup: Setup, *, within_s: float = REMOVE_S) -> None:
        self._loop = loop
        self._operator = operator
        self._setup = setup
        self._within_s = within_s
        self._one_at_a_time = asyncio.Lock()

    async def take(self, read: Callable[[], Awaitable[FleetConfig]]) -> tuple[FleetConfig, Changes]:
        """Raises ShuttingDown, what ``read`` and a stop raise, and ConfigError: then everything stays as it was, but
        for engines that have stopped by then."""
        async with self._one_at_a_time:
            if self._loop.draining:
                raise ShuttingDown
            new = await read()
            return new, await self._change_to(new)

    async def _change_to(self, new: FleetConfig) -> Changes:
        loop = self._loop
        gone = sorted(loop.fleet.engines.keys() - {e.name for e in new.engines})
        await loop.do(lambda: loop.world.traffic.retire(gone))  # who waits for one would have it started again
        try:
            await asyncio.gather(*(self._out(name) for name in gone))
            return await loop.do(lambda: self._setup.apply(new))
        except BaseException:
            await loop.do(self._setup.keep)
            raise

    async def _out(self, name: str) -> None:
        """Stop it, and return when no swap has to do with it: whoever carries one out must find it as planned."""
        loop = self._loop
        give_up_at_s = loop.now_s() + self._within_s
        while (left_s := give_up_at_s - loop.now_s()) > 0:
            if swaps := [a.task for a in loop.active.values() if a.task and a.concerns(name)]:
                await asyncio.wait(swaps, timeout=left_s)
            elif loop.runtime(name).live:
                await self._operator.command(Command(CommandKind.STOP, name), wait=True, deadline_s=left_s)
            else:
                return
            await asyncio.sleep(0)  # the loop is told of a swap's end by a message
        raise CommandTimeout(f"{name} was not out within {self._within_s:.0f} s: it stays; reload again")
