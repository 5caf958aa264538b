"""What the composition root does besides wiring: it winds the service down, and takes a changed fleet file."""

import asyncio
import contextlib
from collections.abc import Callable

from rotator.config import FleetConfig
from rotator.core.lifecycle import is_live
from rotator.core.values import Command, CommandKind
from rotator.service.loop import Loop
from rotator.service.operations import ShuttingDown
from rotator.service.operator import Operator
from rotator.service.setup import Setup
from rotator.service.shutdown import put_away

REMOVE_S = 120.0  # for the engines that a reload's file no longer has


async def wind_down(loop: Loop, on_put_away: Callable[[], None]) -> None:
    """At SIGTERM: refuse the rest, let in-flight work finish within its bound, do with the engines as configured."""
    world, recovery = loop.world, loop.world.config.recovery
    await loop.do(loop.wind_down)
    world.traffic.shut()
    world.bus.publish("service.stopping", on_shutdown=recovery.on_shutdown)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(recovery.shutdown_drain_s):
            await loop.settled()
    if recovery.on_shutdown != "leave":
        on_put_away()
        await put_away(loop, CommandKind.SLEEP if recovery.on_shutdown == "sleep" else CommandKind.STOP)
    await loop.recorder.settled()


async def reload(loop: Loop, operator: Operator, setup: Setup, new: FleetConfig) -> tuple[str, ...]:
    """Stop engines that the file no longer has, apply the rest at once."""
    if loop.draining:
        raise ShuttingDown
    kept = {e.name for e in new.engines}
    gone = [e.name for e in loop.all_runtimes() if e.name not in kept and is_live(e.state)]
    await asyncio.gather(
        *(operator.command(Command(CommandKind.STOP, n), wait=True, deadline_s=REMOVE_S) for n in gone)
    )
    changes = await loop.do(lambda: setup.apply(new))
    return changes.lines()
