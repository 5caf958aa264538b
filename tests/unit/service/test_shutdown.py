"""The end of the service: every engine is put away as configured, and none comes in meanwhile."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from rotator.core.lifecycle import Event
from rotator.core.values import Command, CommandKind, State
from rotator.ports import Handle, LaunchSpec
from rotator.service.operations import ShuttingDown
from rotator.service.owner import Facts
from rotator.service.shutdown import put_away
from rotator.sim.clock import run
from tests.fakes import Box, Service, make_box, make_config, make_service

STOP, SLEEP = CommandKind.STOP, CommandKind.SLEEP
TWO = {"a": ((0,), 60.0), "b": ((1,), 60.0)}
RIVALS = {"a": ((0,), 60.0), "b": ((0,), 60.0)}
NOW = "policies: {swap_share: null, preempt: false, prewake_chance: null, min_stay_s: 0}"


async def ends(service: Service, kind: CommandKind, drain_s: float = 1.0, within_s: float = 120.0) -> None:
    """As the composition root winds a service down."""
    await service.loop.do(service.loop.wind_down)
    service.traffic.shut()
    try:
        async with asyncio.timeout(drain_s):
            await service.loop.settled()
    except TimeoutError:
        pass
    await put_away(service.loop, kind, within_s=within_s)


def told(story: Callable[[Service, Box], Awaitable[None]], **engines: tuple[tuple[int, ...], float]) -> None:
    async def whole() -> None:
        box = make_box(**engines)
        async with make_service(box, make_config(box, NOW)) as service:
            await story(service, box)

    run(whole())


def asked(service: Service, kind: CommandKind, name: str) -> "asyncio.Task[object]":
    """An operator who waits."""
    return asyncio.create_task(service.operator.command(Command(kind, name), wait=True, deadline_s=600))


async def start(service: Service, name: str) -> "asyncio.Task[object]":
    """Begin to start it; return while it still starts."""
    starting = asked(service, CommandKind.START, name)
    await service.until(name, State.STARTING)
    return starting


def test_every_engine_is_stopped_asleep_or_awake() -> None:
    async def story(service: Service, box: Box) -> None:
        await service.ask("b")
        await service.ask("a")
        await ends(service, STOP)
        assert not any(e.running for e in box.engines.values())

    told(story, **RIVALS)


def test_an_engine_whose_backoff_ends_meanwhile_stays_down() -> None:
    async def story(service: Service, box: Box) -> None:
        await asyncio.gather(service.ask("a"), service.ask("b"))
        box.engines["a"].die()
        await service.until("a", State.FAILED)
        service.fleet.engines["a"].retry_at_s = service.loop.now_s()
        await ends(service, STOP)
        assert not any(e.running for e in box.engines.values())
        assert box.log.count("start a") == 1

    told(story, **TWO)


@pytest.mark.parametrize("kind", [STOP, SLEEP])
def test_an_engine_that_starts_is_not_left_behind(kind: CommandKind) -> None:
    async def story(service: Service, box: Box) -> None:
        box.engines["a"].start_s = 30.0
        starting = await start(service, "a")
        await ends(service, kind)
        assert service.state("a") is (State.STOPPED if kind is STOP else State.ASLEEP)
        assert box.engines["a"].running is (kind is SLEEP)
        await asyncio.gather(starting, return_exceptions=True)

    told(story, **TWO)


def test_a_start_that_is_to_be_stopped_is_not_waited_for() -> None:
    async def story(service: Service, box: Box) -> None:
        box.engines["a"].start_s = 90.0
        begun_s = service.loop.now_s()
        starting = await start(service, "a")
        await ends(service, STOP)
        assert service.loop.now_s() - begun_s < 20
        await asyncio.gather(starting, return_exceptions=True)

    told(story, **TWO)


@pytest.mark.parametrize("kind", [STOP, SLEEP])
def test_one_that_still_moves_at_the_bound_is_killed(kind: CommandKind) -> None:
    async def story(service: Service, box: Box) -> None:
        await service.ask("b")
        await service.ask("a")
        box.engines["b"].wake_s = 500.0
        waking = asked(service, CommandKind.WAKE, "b")
        await service.until("b", State.WAKING)
        begun_s = service.loop.now_s()
        await ends(service, kind, within_s=10.0)
        assert not box.engines["b"].running
        assert service.loop.now_s() - begun_s < 30
        await asyncio.gather(waking, return_exceptions=True)

    told(story, **RIVALS)


def test_a_swap_under_way_evicts_but_brings_nobody_in() -> None:
    async def story(service: Service, box: Box) -> None:
        await service.ask("b")
        await service.ask("a")
        box.engines["a"].sleep_s = 5.0
        waking = asked(service, CommandKind.WAKE, "b")
        await service.until("a", State.FALLING_ASLEEP)
        wakes = box.log.count("wake b")
        await ends(service, SLEEP)
        assert (service.state("a"), service.state("b")) == (State.ASLEEP, State.ASLEEP)
        assert box.log.count("wake b") == wakes
        await asyncio.gather(waking, return_exceptions=True)

    told(story, **RIVALS)


def test_who_drains_for_one_that_no_longer_comes_in_is_put_away_at_once() -> None:
    async def story(service: Service, box: Box) -> None:
        await service.ask("b")
        await service.ask("a")
        service.fleet.engines["a"].config = service.fleet.engines["a"].config.model_copy(update={"drain_bound_s": 90.0})
        busy = asyncio.create_task(service.ask("a", serves_s=80.0))
        await asyncio.sleep(0.1)
        waking = asked(service, CommandKind.WAKE, "b")
        await service.until("a", State.DRAINING)
        begun_s = service.loop.now_s()
        await ends(service, STOP)
        assert service.loop.now_s() - begun_s < 20
        assert not any(e.running for e in box.engines.values())
        await asyncio.gather(busy, waking, return_exceptions=True)

    told(story, **RIVALS)


def test_a_launch_decided_just_before_does_not_happen_any_more() -> None:
    async def story(service: Service, box: Box) -> None:
        await ends(service, STOP)
        assert not await service.loop.moved("a", Event.LAUNCH, Facts("decided before"))
        assert service.state("a") is State.STOPPED

    told(story, **TWO)


def test_what_a_launcher_starts_after_all_is_ended_again() -> None:
    """Stopped while its launcher was still asked, so that nobody knew of a process to end."""

    async def story(service: Service, box: Box) -> None:
        launch = service.launcher.start

        async def late(spec: LaunchSpec) -> Handle:
            await asyncio.sleep(5.0)
            return await launch(spec)

        service.launcher.start = late  # type: ignore[method-assign]
        starting = await start(service, "a")
        await ends(service, STOP)
        assert "start a" in box.log
        assert not box.engines["a"].running
        await asyncio.gather(starting, return_exceptions=True)

    told(story, **TWO)


def test_an_operators_wishes_are_refused_with_the_reason() -> None:
    async def story(service: Service, box: Box) -> None:
        await service.ask("a")
        busy = asyncio.create_task(service.ask("a", serves_s=30.0))
        await asyncio.sleep(0.1)
        starting = await start(service, "b")
        queued = asked(service, STOP, "b")
        await asyncio.sleep(0.1)
        ending = asyncio.create_task(ends(service, STOP))
        with pytest.raises(ShuttingDown, match="shutting down"):
            await queued
        with pytest.raises(ShuttingDown):
            await service.operator.command(Command(CommandKind.WAKE, "b"), wait=True, deadline_s=99)
        assert not service.operator.readiness().ready
        await ending
        await asyncio.gather(busy, starting, return_exceptions=True)

    told(story, **TWO)


def test_a_forced_stop_does_not_wait_for_those_whom_it_cuts() -> None:
    async def story(service: Service, box: Box) -> None:
        await service.ask("a")
        ticket = service.traffic.try_enter("a", "a")  # a client that is slow to take its leave
        assert ticket is not None
        await service.operator.command(Command(STOP, "a", force=True), wait=True, deadline_s=60)
        assert ticket.cut is not None
        assert not box.engines["a"].running

    told(story, **TWO)
