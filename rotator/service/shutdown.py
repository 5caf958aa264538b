"""The service ends: its engines are stopped or put to sleep within a bound, and none comes in meanwhile."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence

from rotator.core.lifecycle import Event, is_moving
from rotator.core.values import Command, CommandKind, State
from rotator.ports import RotatorError
from rotator.service.loop import Loop
from rotator.service.mailbox import Asked
from rotator.service.operations import CommandResult
from rotator.service.owner import Facts
from rotator.service.records import EngineRuntime

_log = logging.getLogger(__name__)
PUT_AWAY_S = 120.0
CUT_S = 10.0  # for those who are killed at that bound


async def wind_down(loop: Loop, on_put_away: Callable[[], None] = lambda: None) -> None:
    """Refuse who comes, let in-flight work finish within its bound, then do with the engines as configured."""
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


async def put_away(loop: Loop, kind: CommandKind, *, within_s: float = PUT_AWAY_S) -> None:
    """Stop every engine that is this service's to stop, or put it to sleep. One that still moves at the bound is
    killed: nobody would be there to see where it ends up. Never raises: what did not go well is in the log."""
    await loop.do(loop.serve_commands_alone)
    ours = [e for e in loop.all_runtimes() if e.live and e.config.launcher != "attach"]
    try:
        async with asyncio.timeout(within_s):
            await asyncio.gather(*(_put(loop, e, kind, within_s) for e in ours))
            await _at_rest(loop, ours)
    except TimeoutError:
        _log.error("engines were not put away within %.0f s", within_s)
    late = [e for e in ours if is_moving(e.state) or (e.live and kind is CommandKind.STOP)]
    try:
        async with asyncio.timeout(CUT_S):
            await asyncio.gather(*(_kill(loop, e, "killed at the end of the shutdown", 0.0) for e in late))
            await loop.swaps_ended()
    except TimeoutError:
        for engine in (e for e in late if e.live):
            _log.error("%s may still run: %s", engine.name, engine.reason)


async def _put(loop: Loop, engine: EngineRuntime, kind: CommandKind, within_s: float) -> None:
    """By a command, which waits for its turn and for the end of a transition; a start has no end worth waiting for
    where all is to stop."""
    if kind is CommandKind.STOP and engine.state is State.STARTING:
        await _kill(loop, engine, "the service was stopped while it started", engine.config.stop_grace_s)
        return
    answer: asyncio.Future[CommandResult] = asyncio.get_running_loop().create_future()
    command = Command(kind, engine.name, force=True, issued_at_s=loop.now_s())
    loop.tell(Asked((command,), (answer,), loop.now_s() + within_s, closing=True))
    try:
        await answer
    except RotatorError as e:
        if engine.live:
            _log.error("%s of %s at shutdown: %s", kind.value, engine.name, e)


async def _at_rest(loop: Loop, engines: Sequence[EngineRuntime]) -> None:
    """Return when none of them moves: one whose command failed is being buried."""
    moved = loop.world.bus.follow(loop.world.bus.last_id)
    while any(is_moving(e.state) for e in engines):
        await anext(moved)


async def _kill(loop: Loop, engine: EngineRuntime, why: str, grace_s: float) -> None:
    """Whatever is under way with it: who still waits for its answer sees that its state has changed."""
    if await loop.moved(engine.name, Event.STOP, Facts(why)):
        await loop.undertaker.bury(engine.name, Event.GONE, why, grace_s=grace_s)
