"""What trials with real processes brought to light, under virtual time."""

import asyncio

import pytest

from rotator.core.values import Command, CommandKind, State
from rotator.ports import Intent, RotatorError
from rotator.service.traffic import EngineUnavailable
from rotator.sim.clock import run
from tests.fakes import make_box, make_config, make_service

BIG = {"a": ((0, 1), 82.0), "b": ((0, 1), 84.0)}


def test_a_quarantined_engine_that_was_killed_is_charged_nothing() -> None:
    async def story() -> None:
        box = make_box(2, **BIG)
        async with make_service(box) as service:
            await service.ask("a")
            box.engines["a"].lies = True
            await service.ask("b")
            assert service.state("a") is State.QUARANTINED
            check = await service.operator.check_ledger()
            assert check.matches, check.differences
            assert service.operator.engine("a").held_bytes == (0, 0)
            with pytest.raises(EngineUnavailable):
                await service.ask("a")

    run(story())


def test_an_engine_that_keeps_failing_stays_down_once_an_operator_stops_it() -> None:
    async def story() -> None:
        box = make_box(2, **BIG)
        box.engines["a"].start_error = "exit code 127"
        async with make_service(box) as service:
            with pytest.raises(RotatorError):
                await service.operator.command(Command(CommandKind.START, "a"), wait=True, deadline_s=60)
            await service.operator.command(Command(CommandKind.STOP, "a"), wait=True, deadline_s=60)
            launches = box.engines["a"].launches
            await asyncio.sleep(1000)
            assert service.state("a") is State.STOPPED
            assert box.engines["a"].launches == launches

    run(story())


def test_a_preloaded_engine_that_was_found_running_stays_down_once_an_operator_stops_it() -> None:
    async def story() -> None:
        box = make_box(2, **BIG)
        async with make_service(box) as service:
            await service.ask("a")
            ledger = service.ledger
        config = make_config(box, a={"preload": True})
        async with make_service(box, config, ledger) as service:
            await service.until("a", State.AWAKE)
            await service.operator.command(Command(CommandKind.STOP, "a"), wait=True, deadline_s=60)
            await asyncio.sleep(1000)
            assert service.state("a") is State.STOPPED

    run(story())


def test_nothing_is_planned_over_the_bytes_of_a_quarantined_engine_that_is_not_ours_to_end() -> None:
    async def story() -> None:
        box = make_box(2, **BIG)
        liar = box.engines["a"]
        liar.running = liar.lies = True
        service = make_service(box, make_config(box, a={"launcher": "attach"}))
        service.loop.world.launchers["attach"] = service.launcher  # type: ignore[index]
        async with service:
            await service.until("a", State.AWAKE)
            with pytest.raises(RotatorError, match="still holds"):
                await service.operator.command(Command(CommandKind.SLEEP, "a"), wait=True, deadline_s=60)
            with pytest.raises(EngineUnavailable, match="could have"):
                await service.ask("b")
            assert not box.engines["b"].launches
            assert liar.running

    run(story())


def test_streams_that_stand_still_when_the_service_is_told_to_end_are_woken_and_finish_first() -> None:
    async def story() -> None:
        box = make_box(2, **BIG)
        async with make_service(box) as service:
            await service.ask("b")
            await service.ask("a")
            frozen = asyncio.create_task(service.ask("a", serves_s=30.0))
            await asyncio.sleep(3.0)
            running = asyncio.create_task(service.ask("b", serves_s=30.0))
            await service.until("b", State.AWAKE)
            await service.loop.do(service.loop.wind_down)
            service.traffic.shut()
            async with asyncio.timeout(200):
                await service.loop.settled()
            await asyncio.gather(frozen, running)
            wakes = [line for line in box.log if line.startswith(("wake", "start"))]
            await asyncio.sleep(500)
            assert [line for line in box.log if line.startswith(("wake", "start"))] == wakes, "nothing else begins"

    run(story())


def test_an_attached_engines_bytes_are_not_foreign_any_more_once_it_is_found() -> None:
    async def story() -> None:
        box = make_box(2, **BIG)
        service = make_service(box, make_config(box, a={"launcher": "attach"}))
        service.loop.world.launchers["attach"] = service.launcher  # type: ignore[index]
        async with service:
            await asyncio.sleep(1.5)
            box.engines["a"].running = True
            await asyncio.sleep(2.0)
            assert service.loop.foreign_bytes("GPU-0")
            await service.loop.adopter.adopt_attached(service.fleet.engines["a"])
            await service.ask("b")
            assert service.state("a") is State.ASLEEP

    run(story())


def test_an_engine_found_in_the_middle_of_its_sleep_is_given_the_time_to_end_it() -> None:
    async def story() -> None:
        box = make_box(2, **BIG)
        async with make_service(box) as service:
            await service.ask("a")
            ledger = service.ledger
        a = box.engines["a"]
        a.asleep = a.lies = True
        await ledger.open_transition(Intent("s-1", "a", "sleep", State.AWAKE, State.ASLEEP, "b is wanted"))
        async with make_service(box, ledger=ledger) as service:
            await asyncio.sleep(5.0)
            a.lies = False
            await service.until("a", State.ASLEEP)
            assert "stop a" not in box.log
            await service.ask("a")

    run(story())


def test_an_engine_that_still_holds_its_bytes_after_the_time_of_a_sleep_has_lied() -> None:
    async def story() -> None:
        box = make_box(2, **BIG)
        async with make_service(box) as service:
            await service.ask("a")
            ledger = service.ledger
        a = box.engines["a"]
        a.asleep = a.lies = True
        await ledger.open_transition(Intent("s-1", "a", "sleep", State.AWAKE, State.ASLEEP, "b is wanted"))
        async with make_service(box, ledger=ledger) as service:
            await service.until("a", State.QUARANTINED)
            assert "stop a" in box.log

    run(story())


def test_an_engine_found_asleep_whose_wake_was_asked_for_is_seen_to_wake() -> None:
    async def story() -> None:
        box = make_box(2, **BIG)
        async with make_service(box) as service:
            await service.ask("a")
            await service.ask("b")
            ledger = service.ledger
        a, b = box.engines["a"], box.engines["b"]
        b.asleep = True
        await ledger.open_transition(Intent("s-1", "a", "wake", State.ASLEEP, State.AWAKE, "somebody waits"))
        async with make_service(box, ledger=ledger) as service:
            await asyncio.sleep(1.0)
            a.asleep = False
            await service.until("a", State.AWAKE)
            await service.ask("b")
            assert service.state("a") is State.ASLEEP

    run(story())


def test_a_sleeper_that_turns_out_to_hold_what_it_holds_awake_is_quarantined() -> None:
    async def story() -> None:
        box = make_box(**BIG)
        async with make_service(box) as service:
            await service.ask("a")
            await service.ask("b")
            assert service.state("a") is State.ASLEEP
            box.engines["b"].asleep, box.engines["a"].asleep = True, False  # somebody woke it past the service
            await service.until("a", State.QUARANTINED, within_s=30.0)
            assert "it says it sleeps, but holds" in service.fleet.engines["a"].reason

    run(story())


def test_a_sleeper_that_holds_too_much_for_a_moment_is_left_alone() -> None:
    async def story() -> None:
        box = make_box(**BIG)
        async with make_service(box) as service:
            await service.ask("a")
            await service.ask("b")
            box.engines["b"].asleep, box.engines["a"].asleep = True, False
            await asyncio.sleep(2.5)  # it is looked at every second
            box.engines["a"].asleep, box.engines["b"].asleep = True, False
            await asyncio.sleep(30.0)
            assert service.state("a") is State.ASLEEP

    run(story())
