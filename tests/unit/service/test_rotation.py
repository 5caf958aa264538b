"""The loop over a fake box, under virtual time: engines take turns, and the truth decides."""

import asyncio

import pytest

from rotator.config import ConfigError
from rotator.core.values import Command, CommandKind, State
from rotator.ports import RotatorError
from rotator.service.operations import CommandFailed, CommandRefused
from rotator.service.setup import Setup
from rotator.service.traffic import EngineUnavailable
from rotator.sim.clock import run
from tests.fakes import GIB, FakeLedger, Service, make_box, make_config, make_service

PLAIN = "policies: {swap_share: null, preempt: false}"  # turns by minimum stay, drains by their bound: no prices
BIG = {"a": ((0, 1, 2, 3), 82.0), "b": ((0, 1, 2, 3), 84.0), "c": ((0, 1, 2, 3), 80.0)}
SMALL = {"s": ((3,), 60.0), "t": ((3,), 50.0)}


def test_models_that_cannot_be_awake_together_take_turns_and_all_requests_are_answered() -> None:
    async def story() -> None:
        box = make_box(**BIG, **SMALL)
        async with make_service(box) as service:
            await asyncio.gather(*(service.ask(name) for name in ("a", "b", "c", "s", "t", "a", "b")))
            assert [o for _, _, o in service.ledger.requests] == ["ok"] * 7
            states = {n: service.state(n) for n in "abcst"}
            assert set(states.values()) <= {State.AWAKE, State.ASLEEP}, (states, box.log)
            check = await service.operator.check_ledger()
            assert check.matches, check.differences

    run(story())


def test_one_wake_serves_everyone_who_waits() -> None:
    async def story() -> None:
        box = make_box(**BIG)
        async with make_service(box) as service:
            await service.ask("a")
            await service.ask("b")
            await asyncio.gather(*(service.ask("a") for _ in range(50)))
            assert box.log.count("wake a") == 1

    run(story())


def test_a_wake_that_nobody_waits_for_any_more_is_not_begun() -> None:
    async def story() -> None:
        box = make_box(**BIG)
        async with make_service(box, make_config(box, PLAIN)) as service:
            await service.ask("b")
            await service.ask("a")
            busy = asyncio.create_task(service.ask("a", serves_s=4.0))
            await asyncio.sleep(3.0)
            leaving = asyncio.create_task(service.ask("b"))
            await asyncio.sleep(0.5)
            assert service.state("a") is State.DRAINING
            leaving.cancel()
            await asyncio.sleep(0.1)
            assert service.state("a") is State.AWAKE
            await busy
            assert "wake b" not in box.log

    run(story())


def test_streams_in_flight_freeze_at_the_drain_bound_and_go_on_after_the_next_wake() -> None:
    async def story() -> None:
        box = make_box(**BIG)
        async with make_service(box, make_config(box, PLAIN)) as service:
            await service.ask("b")
            await service.ask("a")
            stream = asyncio.create_task(service.ask("a", serves_s=30.0))
            await asyncio.sleep(3.0)
            await service.ask("b")
            assert not stream.done()
            await stream
            assert box.log.count("wake a") == 1
            assert not any("abort" in line for line in box.log)

    run(story())


def test_an_engine_that_cannot_freeze_keeps_its_turn_until_its_work_is_done() -> None:
    async def story() -> None:
        box = make_box(**BIG)
        box.engines["a"].version = "0.19.1"
        async with make_service(box) as service:
            await service.ask("b")
            await service.ask("a")
            stream = asyncio.create_task(service.ask("a", serves_s=40.0))
            await asyncio.sleep(0.1)
            waiting = asyncio.create_task(service.ask("b"))
            await stream
            assert "sleep a 1" not in box.log
            await waiting
            assert "sleep a 1" in box.log

    run(story())


def test_force_aborts_what_is_in_flight_and_says_whose_wish_it_was() -> None:
    async def story() -> None:
        box = make_box(**BIG)
        async with make_service(box) as service:
            await service.ask("a")
            ticket = service.traffic.try_enter("a", "a")
            assert ticket is not None
            await service.operator.command(Command(CommandKind.SLEEP, "a", force=True), wait=True, deadline_s=60)
            assert ticket.cut is not None
            assert "operator" in ticket.cut
            assert "sleep a 1 abort" in box.log

    run(story())


def test_an_engine_that_lies_about_its_sleep_is_quarantined_and_killed_and_the_other_gets_the_room() -> None:
    async def story() -> None:
        box = make_box(**BIG)
        async with make_service(box) as service:
            await service.ask("a")
            box.engines["a"].lies = True
            await service.ask("b")
            assert service.state("a") is State.QUARANTINED
            assert not box.engines["a"].running
            assert "still holds" in service.operator.engine("a").reason
            with pytest.raises(EngineUnavailable, match="quarantined"):
                await service.ask("a")
            box.engines["a"].lies = False
            await service.operator.release("a")
            await service.ask("a")

    run(story())


def test_an_engine_that_wakes_to_garbage_never_gets_a_client() -> None:
    async def story() -> None:
        box = make_box(**BIG)
        async with make_service(box) as service:
            await service.ask("a")
            await service.ask("b")
            box.engines["a"].wake_garbage = True
            with pytest.raises(EngineUnavailable, match="canary"):
                await service.ask("a")
            await service.until("a", State.QUARANTINED)

    run(story())


def test_a_wake_whose_bytes_do_not_come_is_none_also_where_it_answers_well() -> None:
    async def story() -> None:
        box = make_box(**BIG)
        async with make_service(box) as service:
            await service.ask("a")
            await service.ask("b")
            box.engines["a"].unbacked = True
            with pytest.raises(EngineUnavailable, match="as asleep"):
                await service.ask("a")
            await service.until("a", State.QUARANTINED)
            box.engines["a"].unbacked = False
            await service.operator.release("a")
            await service.ask("a")

    run(story())


@pytest.mark.parametrize("what", ["sleep_error", "wake_error"])
def test_a_failed_sleep_or_wake_kills_the_engine_and_it_comes_back_by_itself(what: str) -> None:
    async def story() -> None:
        box = make_box(**BIG)
        async with make_service(box) as service:
            await service.ask("a")
            await service.ask("b")
            if what == "sleep_error":
                box.engines["b"].sleep_error = "one rank failed"
            else:
                box.engines["a"].wake_error = "CUDA out of memory"
            asking = asyncio.create_task(service.ask("a"))
            victim = "b" if what == "sleep_error" else "a"
            await service.until(victim, State.FAILED)
            box.engines["b"].sleep_error = box.engines["a"].wake_error = None
            await asking
            assert box.engines[victim].launches == 2 or what == "sleep_error"
            await service.until(victim, State.AWAKE)

    run(story())


def test_a_hung_sleep_ends_at_its_deadline_with_a_kill() -> None:
    async def story() -> None:
        box = make_box(**BIG)
        async with make_service(box, make_config(box, a={"sleep_deadline_s": 20.0})) as service:
            await service.ask("a")
            box.engines["a"].hang = True
            asking = asyncio.create_task(service.ask("b"))
            await service.until("a", State.FAILED)
            assert not box.engines["a"].running
            box.engines["a"].hang = False
            await asking

    run(story())


def test_a_crash_while_awake_is_noticed_and_its_clients_are_cut() -> None:
    async def story() -> None:
        box = make_box(**BIG)
        async with make_service(box) as service:
            await service.ask("a")
            ticket = service.traffic.try_enter("a", "a")
            assert ticket is not None
            box.engines["a"].die("exit code 1")
            await service.until("a", State.FAILED)
            assert ticket.cut is not None
            ticket.leave("failed")
            assert "exit code 1" in service.operator.engine("a").reason
            await service.ask("a")
            assert box.engines["a"].launches == 2

    run(story())


def test_an_engine_that_keeps_failing_to_start_answers_503_with_the_reason() -> None:
    async def story() -> None:
        box = make_box(**BIG)
        box.engines["a"].start_error = "vllm: command not found (exit 127)"
        async with make_service(box) as service:
            with pytest.raises(EngineUnavailable, match="exit 127"):
                await service.ask("a")
            await service.ask("b")

    run(story())


def test_pinned_engines_are_never_evicted_and_waiters_learn_it_at_once() -> None:
    async def story() -> None:
        box = make_box(**BIG)
        async with make_service(box, make_config(box, a={"pin": True})) as service:
            await service.ask("a")
            with pytest.raises(EngineUnavailable, match="pinned"):
                await service.ask("b")
            await service.operator.set_pin("a", False)
            await service.ask("b")

    run(story())


def test_no_transition_starts_without_room_in_the_journal_and_serving_goes_on() -> None:
    async def story() -> None:
        box, ledger = make_box(**BIG), FakeLedger()
        async with make_service(box, ledger=ledger) as service:
            await service.ask("a")
            ledger.broken = True
            waiting = asyncio.create_task(service.ask("b"))
            await service.ask("a")
            await asyncio.sleep(30)
            assert "start b" not in box.log
            assert not waiting.done()
            ledger.broken = False
            await waiting

    run(story())


def test_a_gpu_whose_query_hangs_is_unknown_and_serving_goes_on() -> None:
    async def story() -> None:
        box = make_box(**BIG)
        async with make_service(box) as service:
            await service.ask("a")
            box.hung_gpus.add("GPU-2")
            await asyncio.sleep(5)
            waiting = asyncio.create_task(service.ask("b"))
            await service.ask("a")
            await asyncio.sleep(20)
            assert [g.health for g in service.operator.gpus()] == ["ok", "ok", "unknown", "ok"]
            assert not waiting.done()
            box.hung_gpus.clear()
            await waiting

    run(story())


def test_foreign_bytes_are_counted_and_an_engine_that_cannot_fit_beside_them_is_refused_with_numbers() -> None:
    async def story() -> None:
        box = make_box(**BIG)
        box.foreign["GPU-1"] = 20 * GIB
        async with make_service(box) as service:
            await asyncio.sleep(2)
            with pytest.raises(EngineUnavailable, match="GiB"):
                await service.ask("a")
            box.foreign.clear()
            await asyncio.sleep(2)
            await service.ask("a")

    run(story())


def test_independent_gpu_sets_rotate_in_parallel() -> None:
    async def story() -> None:
        box = make_box(x=((0,), 80.0), y=((1,), 80.0))
        async with make_service(box) as service:
            await asyncio.gather(service.ask("x"), service.ask("y"))
            assert asyncio.get_running_loop().time() < 15, "the two starts took turns"

    run(story())


def test_after_a_restart_engines_are_adopted_with_their_footprints_and_canaries() -> None:
    box, ledger = make_box(**BIG), FakeLedger()

    async def first() -> None:
        async with make_service(box, ledger=ledger) as service:
            await service.ask("a")
            await service.ask("b")

    async def second() -> None:
        async with make_service(box, ledger=ledger) as service:
            await service.until("b", State.AWAKE)
            await service.until("a", State.ASLEEP)
            await service.ask("a")
            assert box.engines["a"].launches == box.engines["b"].launches == 1
            assert (await service.operator.check_ledger()).matches

    run(first())
    run(second())


def test_a_transition_that_was_under_way_at_the_crash_is_resolved_by_asking() -> None:
    box, ledger = make_box(**BIG), FakeLedger()

    async def first() -> None:
        async with make_service(box, ledger=ledger) as service:
            await service.ask("a")
            box.engines["a"].sleep_s = 3.0
            asking = asyncio.create_task(service.ask("b"))
            await service.until("a", State.FALLING_ASLEEP)
            await asyncio.sleep(1.0)
            asking.cancel()

    async def second() -> None:
        async with make_service(box, ledger=ledger) as service:
            await service.until("a", State.ASLEEP)
            assert all(outcome is not None for _, outcome in ledger.transitions.values())
            await service.ask("b")

    run(first())
    box.engines["a"].asleep = True  # the engine finished its sleep while the service was away
    run(second())


def test_operators_wake_sleep_and_swap_and_are_told_what_happened() -> None:
    async def story() -> None:
        box = make_box(**BIG)
        async with make_service(box) as service:
            wake = lambda name: Command(CommandKind.WAKE, name)  # noqa: E731
            sleep = lambda name: Command(CommandKind.SLEEP, name)  # noqa: E731
            (woken,) = await service.operator.command(wake("a"), wait=True, deadline_s=100)
            assert (woken.state, woken.done) == ("awake", True)
            (again,) = await service.operator.command(wake("a"), wait=True, deadline_s=100)
            assert again.done
            plan = service.operator.plan_for(wake("b"))
            assert plan.swaps[0].evict[0].engine == "a"
            assert service.state("b") is State.STOPPED
            results = await service.operator.command(sleep("a"), wake("b"), wait=True, deadline_s=100)
            assert [r.state for r in results] == ["asleep", "awake"]
            with pytest.raises(CommandRefused):
                await service.operator.command(sleep("c"), wait=True, deadline_s=100)
            box.engines["c"].start_error = "no such file"
            with pytest.raises(CommandFailed, match="no such file"):
                await service.operator.command(wake("c"), wait=True, deadline_s=100)

    run(story())


def test_two_streams_of_demand_for_two_engines_share_the_gpus_without_starving() -> None:
    async def story() -> None:
        box = make_box(**BIG)
        async with make_service(box) as service:
            await asyncio.gather(service.ask("a"), service.ask("b"))
            waits: dict[str, list[float]] = {"a": [], "b": []}

            async def client(name: str) -> None:
                while asyncio.get_running_loop().time() < 400:
                    waits[name].append(await service.ask(name, serves_s=0.5))

            await asyncio.gather(client("a"), client("b"), client("a"), client("b"))
            for name in waits:
                assert max(waits[name]) < 120  # the first turn is by guesses: no swap was measured yet
                assert max(w for w in waits[name][-200:]) < 30
                assert len(waits[name]) > 20
            now_s = asyncio.get_running_loop().time()
            assert all(0.01 < gpu.swaps.share(now_s) <= 0.12 for gpu in service.fleet.gpus.values())

    run(story())


def test_without_bytes_by_process_the_difference_decides() -> None:
    async def story() -> None:
        box = make_box(**BIG)
        box.by_pid = False
        async with make_service(box) as service:
            await service.ask("a")
            await service.ask("b")
            await service.ask("a")
            assert service.operator.engine("a").residue_bytes == (GIB,) * 4
            await asyncio.sleep(2)
            check = await service.operator.check_ledger()
            assert check.matches, check.differences

    run(story())


def test_a_launcher_that_this_release_lacks_is_refused_with_what_to_do_instead() -> None:
    async def story() -> None:
        box = make_box(**BIG)
        async with make_service(box) as service:
            setup = Setup(service.loop, lambda _: None, lambda _: 1)
            engines = tuple(e.model_copy(update={"launcher": "nomad"}) for e in service.config.engines)
            with pytest.raises(ConfigError, match=r"'nomad' is not available.*'attach'"):
                setup.apply(service.config.model_copy(update={"engines": engines}))

    run(story())


def test_errors_of_the_service_share_one_tree() -> None:
    assert issubclass(EngineUnavailable, RotatorError)
    assert issubclass(CommandFailed, RotatorError)
    assert Service is not None
