"""The policies in the running service: what happens by itself happens for a reason that the journal keeps."""

import asyncio
from collections.abc import Mapping

import pytest

from rotator.config import FootprintConfig
from rotator.core.values import Command, CommandKind, Depth, State
from rotator.service.timers import Timers
from rotator.service.traffic import Cut, Limits
from rotator.sim.clock import run
from tests.fakes import GIB, FakeLedger, Service, make_box, make_config, make_service

PAIR = {"a": ((0, 1), 80.0), "b": ((0, 1), 80.0)}


def journalled(ledger: FakeLedger, action: str) -> list[tuple[str, str]]:
    """Engine and reason of every transition of that kind that ended well."""
    return [
        (i.engine, i.reason) for i, o in ledger.transitions.values() if i.action == action and o and o.result == "ok"
    ]


async def sleep_of(service: Service, name: str) -> None:
    command = Command(CommandKind.SLEEP, name, issued_at_s=service.loop.now_s())
    await service.operator.command(command, wait=True, deadline_s=60.0)


def test_an_idle_engine_goes_down_the_ladder_and_the_journal_says_why() -> None:
    async def story() -> None:
        box = make_box(**PAIR)
        config = make_config(box, "policies: {idle_sleep_s: 60, idle_sink_s: 300, idle_stop_s: 900}", a={"disk": True})
        async with make_service(box, config) as service:
            await service.ask("a")
            await asyncio.sleep(70)
            assert (service.state("a"), service.fleet.engines["a"].depth) == (State.ASLEEP, Depth.HOST)
            await asyncio.sleep(320)
            assert (service.state("a"), service.fleet.engines["a"].depth) == (State.ASLEEP, Depth.DISK)
            assert service.fleet.host_used_bytes() == {"": 0}
            await asyncio.sleep(900)
            assert service.state("a") is State.STOPPED
            assert "nobody has used a for 60 s" in journalled(service.ledger, "sleep")[0][1]
            assert "its masters go from host RAM to disk" in journalled(service.ledger, "sink")[0][1]
            assert "has slept for 900 s" in journalled(service.ledger, "stop")[0][1]

    run(story())


def test_probes_and_canaries_do_not_keep_an_engine_awake() -> None:
    async def story() -> None:
        box = make_box(**PAIR)
        async with make_service(box, make_config(box, "policies: {idle_sleep_s: 60}")) as service:
            await service.ask("a")
            used_s = service.traffic.last_used_s("a")
            for _ in range(14):
                await asyncio.sleep(5)
                await service.loop.world.control.is_healthy("http://fake/a", deadline_s=1.0)
                service.traffic.visit("a").leave("ok")
                service.traffic.eta_s("a")
            assert service.traffic.last_used_s("a") == used_s
            assert service.state("a") is State.ASLEEP

    run(story())


def test_an_engine_that_is_usually_asked_for_now_is_woken_before_anybody_asks() -> None:
    async def story() -> None:
        box = make_box(**PAIR)
        async with make_service(box, make_config(box, "policies: {prewake_horizon_s: 60}")) as service:
            for _ in range(30):
                await service.ask("a")
                await asyncio.sleep(40)
            await sleep_of(service, "a")
            await asyncio.sleep(30)
            assert service.state("a") is State.AWAKE
            assert any("a is likely wanted soon" in reason for _, reason in journalled(service.ledger, "wake"))

    run(story())


def test_what_a_wake_costs_is_remembered_by_depth_over_a_restart() -> None:
    async def story() -> None:
        box, ledger = make_box(**PAIR), FakeLedger()
        config = make_config(box, "policies: {idle_sink_s: 50, prewake_chance: null}", a={"disk": True})
        async with make_service(box, config, ledger) as service:
            await service.ask("a")
            await sleep_of(service, "a")
            await service.ask("a")
            await sleep_of(service, "a")
            await asyncio.sleep(60)
            assert service.fleet.engines["a"].depth is Depth.DISK
            box.engines["a"].wake_s = 7.0
            await service.ask("a")
            costs: Mapping[Depth, float] = service.fleet.engines["a"].costs.wakes
            assert (round(costs[Depth.HOST]), round(costs[Depth.DISK])) == (1, 7)
            assert service.fleet.engines["a"].costs.wake_s == costs[Depth.HOST]  # what a plan counts with by default
            await service.loop.recorder.settled()
        async with make_service(box, config, ledger) as service:
            assert service.fleet.engines["a"].costs.wakes == costs
            assert service.traffic.history("a").service_s is not None

    run(story())


def test_an_elastic_engine_hands_over_bytes_and_keeps_its_weights() -> None:
    async def story() -> None:
        box = make_box(a=((0,), 55.0), b=((0,), 55.0))
        footprint = FootprintConfig(awake_gib=55, residue_gib=1, kv_gib=40)
        elastic = {"elastic": True, "footprint": footprint}
        async with make_service(box, make_config(box, a=elastic, b=elastic)) as service:
            await service.ask("a")
            await service.ask("b")
            await service.ask("a")
            assert service.fleet.engines["b"].depth is Depth.KV
            assert [line.split()[:2] for line in box.log if line.startswith(("free", "restore", "sleep", "wake"))] == [
                ["free", "a"], ["free", "b"], ["restore", "a"]
            ]  # fmt: skip
            assert 0 < box.engines["b"].held() < 55 * GIB
            check = await service.operator.check_ledger()
            assert check.matches, check.differences
            engine = service.fleet.engines["b"]
            engine.held_bytes = None  # nobody can say what it holds: then all that it may hold
            assert engine.charge_on("GPU-0") == engine.awake_on("GPU-0")

    run(story())


def test_what_requests_taught_is_written_down_also_when_no_engine_moves() -> None:
    async def story() -> None:
        box = make_box(**PAIR)
        async with make_service(box) as service:
            for _ in range(3):
                await service.ask("a", serves_s=0.5)
            await Timers(service.loop)._keep_histories()
            await service.loop.recorder.settled()
            written = service.ledger.engines["a"].history
            assert written is not None
            assert written["service_s"] == 0.5
            assert sum(written["gaps"]) > 0

    run(story())


def test_an_engine_that_refuses_to_put_its_masters_on_disk_sleeps_on_and_is_asked_again_only_later() -> None:
    async def story() -> None:
        box = make_box(**PAIR)
        text = "policies: {idle_sleep_s: 20, idle_sink_s: 50, prewake_chance: null}"
        async with make_service(box, make_config(box, text, a={"disk": True})) as service:
            await service.ask("a")
            await service.until("a", State.ASLEEP)
            box.engines["a"].masters_error = "no space left on device"
            await asyncio.sleep(80)
            assert (service.state("a"), service.fleet.engines["a"].depth) == (State.ASLEEP, Depth.HOST)
            tried = [o for i, o in service.ledger.transitions.values() if i.action == "sink"]
            assert [o.result for o in tried if o] == ["failed"]
            assert "no space left on device" in str(tried[0])
            box.engines["a"].masters_error = None
            await asyncio.sleep(80)
            assert service.fleet.engines["a"].depth is Depth.DISK

    run(story())


def test_an_engine_that_hangs_while_its_masters_move_is_killed_for_its_state_is_unknown() -> None:
    async def story() -> None:
        box = make_box(**PAIR)
        text = "policies: {idle_sleep_s: 20, idle_sink_s: 50, prewake_chance: null}"
        config = make_config(box, text, a={"disk": True, "sleep_deadline_s": 5.0})
        async with make_service(box, config) as service:
            await service.ask("a")
            await service.until("a", State.ASLEEP)
            box.engines["a"].hang = True
            await asyncio.sleep(60)
            assert "stop a" in box.log
            assert any("did not go deeper" in str(o) for _, o in service.ledger.transitions.values())

    run(story())


def test_clients_in_one_line_are_let_in_by_their_shares() -> None:
    async def story() -> None:
        box = make_box(**PAIR)
        async with make_service(box) as service:
            service.traffic.configure({n: Limits(256, 600.0, 8, in_flight_max=1) for n in ("a", "b")})
            service.traffic.shares = {"paying": 2.0}
            order: list[str] = []

            async def ask(client: str) -> None:
                ticket = await service.traffic.enter("a", "a", deadline_s=None, client=client)
                order.append(client)
                await asyncio.sleep(0.1)
                ticket.leave("ok")

            crowd = [asyncio.create_task(ask("crowd")) for _ in range(30)]
            await asyncio.sleep(0.01)
            paying = [asyncio.create_task(ask("paying")) for _ in range(10)]
            await asyncio.gather(*crowd, *paying)
            assert order[:16].count("paying") >= 9  # though all of the crowd were there before
            assert order[:16].count("crowd") >= 5

    run(story())


def test_a_stream_whose_engine_cannot_come_back_is_cut_once_it_has_stood_still_for_as_long_as_it_may() -> None:
    async def story() -> None:
        box = make_box(**PAIR)
        plain = "policies: {swap_share: null, preempt: false, stall_max_s: 60, drain_bound_s: 0, prewake_chance: null}"
        async with make_service(box, make_config(box, plain)) as service:
            limits = Limits(256, 600.0, 100, stall_max_s=60.0)
            service.traffic.configure({"a": limits, "b": limits})
            await service.ask("b")
            await service.ask("a")
            stream = asyncio.create_task(service.ask("a", serves_s=30.0))
            await asyncio.sleep(3.0)
            await service.ask("b")
            await service.operator.set_pin("b", True)
            stood_from_s = service.loop.now_s()
            with pytest.raises(Cut, match=r"stood still for as long as it may.* a cannot go on.* pinned"):
                await stream
            assert 50.0 < service.loop.now_s() - stood_from_s < 63.0
            assert service.traffic.in_flight("a") == 0

    run(story())


def test_a_stream_is_not_frozen_again_once_it_has_stood_still_for_as_long_as_it_may() -> None:
    async def story() -> None:
        box = make_box(**PAIR)
        plain = "policies: {swap_share: null, preempt: false, stall_max_s: 8, drain_bound_s: 0, prewake_chance: null}"
        async with make_service(box, make_config(box, plain)) as service:
            limits = Limits(256, 600.0, 100, stall_max_s=8.0)
            service.traffic.configure({"a": limits, "b": limits})
            await service.ask("b")
            await service.ask("a")
            stream = asyncio.create_task(service.ask("a", serves_s=120.0))
            await asyncio.sleep(3.0)
            for _ in range(8):
                await asyncio.wait({stream}, timeout=1.0)
                other = asyncio.create_task(service.ask("b", serves_s=0.1))
                await asyncio.wait({stream, other}, timeout=10.0)
                other.cancel()
            assert service.traffic.stalled_s("a") <= 8.0 + 3.0  # one freeze more than allowed may have begun
            assert await stream >= 0.0

    run(story())
