"""What follows from what the watchdog sees: evidence first, recovery, cordons, the breaker."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from rotator.core.gpu_faults import GpuHealth
from rotator.core.lifecycle import Event
from rotator.core.values import Command, CommandKind, GpuId, State
from rotator.ports import Generation, Handle
from rotator.ports_watchdog import Blind, Case, Senses
from rotator.service.owner import Facts
from rotator.sim.clock import run
from tests.fakes import Box, FakeLedger, Service, make_box, make_config, make_service

TEXT = """
watchdog: {every_s: 5, stall_s: 60, stall_young_s: 60, probe_deadline_s: 10, probe_every_s: null}
recovery: {breaker_failures: 3, breaker_window_s: 3600, backoff_max_s: 10}
"""


@dataclass
class Watching(Blind):
    """Collects evidence by noting in which state its engine was; a GPU reports what it is told to."""

    service: Service | None = None
    reports: dict[GpuId, GpuHealth] = field(default_factory=dict)
    cases: list[tuple[str | None, State | None, bool]] = field(default_factory=list)
    moves_meanwhile: bool = False
    hangs: bool = False

    async def collect(self, case: Case, *, deadline_s: float) -> int:
        assert self.service is not None
        if self.hangs:
            await asyncio.Event().wait()
        engine = self.service.box.engines[case.engine] if case.engine else None
        state = self.service.state(case.engine) if case.engine else None
        self.cases.append((case.engine, state, bool(engine and engine.running)))
        if self.moves_meanwhile and engine is not None:
            engine.generated += 1
        return 512

    async def health(self, gpu: GpuId, *, deadline_s: float) -> GpuHealth:
        told = self.reports.get(gpu, GpuHealth(gpu))
        self.reports[gpu] = GpuHealth(gpu, told.lost)
        return told


@asynccontextmanager
async def watched(box: Box, ledger: FakeLedger | None = None) -> AsyncIterator[tuple[Service, Watching]]:
    service = make_service(box, make_config(box, TEXT), ledger)
    senses = Watching(service=service)
    service.loop.world.senses = Senses(senses, senses, senses)
    async with service:
        yield service, senses


async def look(service: Service, seconds: float) -> None:
    """Rounds of the watchdog, as its timer makes them."""
    for _ in range(int(seconds / 5)):
        await asyncio.sleep(5)
        await service.loop.sentinel.look()


def kinds(service: Service) -> list[str]:
    return [i.kind for i in service.loop.incidents.all()]


def pair() -> Box:
    return make_box(2, a=((0,), 60.0), b=((1,), 60.0))


def test_a_wedged_engine_is_examined_while_it_lives_then_killed_and_serves_again() -> None:
    async def story() -> None:
        async with watched(pair()) as (service, senses):
            await service.ask("a")
            engine = service.box.engines["a"]
            stuck = asyncio.create_task(service.ask("a", serves_s=300))
            engine.hang, engine.busy = True, 1
            async with asyncio.timeout(300):
                while not kinds(service):
                    await look(service, 5)
            await asyncio.sleep(0.1)
            assert senses.cases == [("a", State.DRAINING, True)], "once, with its admission closed, before the kill"
            assert kinds(service) == ["wedged"]
            engine.hang, engine.busy = False, 0
            await service.ask("a")
            (incident,) = service.loop.incidents.all()
            assert (incident.outcome, incident.bundle_bytes, incident.count) == ("back in service", 512, 1)
            stuck.cancel()
            await asyncio.sleep(1)
            assert service.ledger.incidents[incident.id] == incident, "the ledger knows it as it is"

    run(story())


def test_one_that_moves_while_its_evidence_is_taken_goes_on_serving() -> None:
    async def story() -> None:
        async with watched(pair()) as (service, senses):
            senses.moves_meanwhile = True
            await service.ask("a")
            engine = service.box.engines["a"]
            stuck = asyncio.create_task(service.ask("a", serves_s=300))
            engine.hang, engine.busy = True, 1
            await look(service, 75)
            assert service.state("a") is State.AWAKE
            assert engine.launches == 1
            (incident,) = service.loop.incidents.all()
            assert "by itself" in incident.outcome
            engine.hang = False
            stuck.cancel()

    run(story())


def test_an_engine_that_sleeps_or_works_is_left_alone() -> None:
    async def story() -> None:
        async with watched(pair()) as (service, senses):
            for name in ("a", "b"):
                await service.ask(name)
            service.box.engines["a"].tokens_a_look = 40
            working = asyncio.create_task(service.ask("a", serves_s=400))
            await look(service, 400)
            assert (senses.cases, kinds(service)) == ([], [])
            working.cancel()

    run(story())


def test_whatever_an_engine_is_killed_for_its_evidence_is_taken_first() -> None:
    async def story() -> None:
        async with watched(pair()) as (service, senses):
            for event in (Event.FAULT, Event.LIED):
                await service.ask("a")
                await service.loop.moved("a", event, Facts("as this test has it"))
                await asyncio.sleep(5)
            assert senses.cases == [("a", State.STOPPING, True)] * 2
            assert service.state("a") is State.QUARANTINED

    run(story())


def test_a_probe_answered_with_garbage_twice_quarantines() -> None:
    async def story() -> None:
        async with watched(pair()) as (service, _):
            await service.ask("a")

            async def garbage(*_: Any, **__: Any) -> Generation:
                return Generation((0,) * 4, (-1.0,) * 4, (None,) * 4, "!!!!")

            service.loop.world.control.generate = garbage  # type: ignore[method-assign] # a fault of this engine
            senses_look = asyncio.create_task(service.ask("a", serves_s=200))
            await look(service, 60)
            await service.until("a", State.QUARANTINED)
            assert kinds(service) == ["garbage"]
            assert "rotator release a" in service.loop.incidents.all()[0].advice
            senses_look.cancel()

    run(story())


def test_the_third_fault_within_the_window_quarantines_also_over_a_restart() -> None:
    async def story() -> None:
        box, ledger = pair(), FakeLedger()
        async with watched(box, ledger) as (service, senses):
            for _ in range(2):
                await service.ask("a")
                box.engines["a"].die()
                await service.until("a", State.FAILED)
            await asyncio.sleep(1)
            assert kinds(service) == ["crashed", "crashed"]
            assert [live for _, _, live in senses.cases] == [False, False]
            await service.until("a", State.AWAKE)
        async with watched(box, ledger) as (service, _):
            await service.until("a", State.AWAKE)
            box.engines["a"].die()
            await service.until("a", State.QUARANTINED)
            assert "3 times within 3600 s" in service.fleet.engines["a"].reason
            assert kinds(service) == ["crash_loop"]
            await service.operator.release("a")
            await service.ask("a")
            assert not service.loop.incidents.open_ones()

    run(story())


def test_a_lost_gpu_is_cordoned_as_soon_as_the_ledger_can_and_its_faults_open_no_breaker() -> None:
    async def story() -> None:
        async with watched(pair()) as (service, senses):
            for name in ("a", "b"):
                await service.ask(name)
            service.ledger.broken = True
            senses.reports["GPU-0"] = GpuHealth("GPU-0", lost="GPU is lost")
            await look(service, 5)
            assert service.state("b") is State.AWAKE
            cordoned = service.fleet.gpus["GPU-0"].cordoned
            assert cordoned is not None
            assert "power-cycle" in cordoned
            assert service.ledger.cordons == set()
            service.ledger.broken = False
            await service.until("a", State.FAILED)
            await asyncio.sleep(10)
            assert service.ledger.cordons == {"GPU-0"}
            assert service.fleet.engines["a"].faults == ()
            await service.operator.set_cordon("0", False, "")
            senses.reports.clear()
            await service.ask("a")
            assert not service.loop.incidents.open_ones()

    run(story())


def test_an_xid_of_an_application_has_its_engines_probed_and_one_of_memory_restarts_them() -> None:
    async def story() -> None:
        async with watched(pair()) as (service, senses):
            await service.ask("a")
            senses.reports["GPU-0"] = GpuHealth("GPU-0", xids=(31,))
            await look(service, 20)
            assert (service.state("a"), kinds(service)) == (State.AWAKE, ["gpu_xid"])
            senses.reports["GPU-0"] = GpuHealth("GPU-0", xids=(94,))
            await look(service, 5)
            assert service.state("a") is not State.AWAKE
            await service.ask("a")
            assert service.fleet.gpus["GPU-0"].cordoned is None

    run(story())


def test_a_gpu_of_another_node_is_heard_of_and_named_by_its_node() -> None:
    async def story() -> None:
        async with watched(pair()) as (service, senses):
            gpu = service.fleet.gpus["GPU-1"]
            gpu.info = replace(gpu.info, node="far")
            senses.reports["GPU-1"] = GpuHealth("GPU-1", reset_required="it says so")
            await look(service, 5)
            assert gpu.cordoned is not None
            assert "GPU far/1 needs a reset" in gpu.cordoned
            assert "-i 1`" in gpu.cordoned

    run(story())


def test_a_second_look_that_fails_leaves_no_engine_with_a_closed_door() -> None:
    async def story() -> None:
        async with watched(pair()) as (service, _):
            await service.ask("a")

            async def stands() -> bool:
                raise RuntimeError("as this test has it")

            await service.loop.recovery.wedged("a", "it does not move", stands)
            await service.until("a", State.FAILED)

    run(story())


def test_a_launcher_that_fails_to_watch_is_asked_again_and_the_end_is_heard() -> None:
    async def story() -> None:
        async with watched(pair()) as (service, _):
            (launcher,) = set(service.loop.world.launchers.values())
            waits, failures = launcher.wait_exit, [ValueError("an answer that nobody expected")]

            async def wait_exit(handle: Handle) -> str:
                if failures:
                    raise failures.pop()
                return await waits(handle)

            launcher.wait_exit = wait_exit  # type: ignore[method-assign] # this one instance fails once
            await service.ask("a")
            await asyncio.sleep(10)
            assert failures == []
            service.box.engines["a"].die()
            await service.until("a", State.FAILED)

    run(story())


def test_evidence_that_never_comes_holds_up_no_recovery() -> None:
    async def story() -> None:
        async with watched(pair()) as (service, senses):
            senses.hangs = True
            await service.ask("a")
            await service.loop.moved("a", Event.FAULT, Facts("as this test has it"))
            await service.until("a", State.FAILED, within_s=120)

    run(story())


def test_an_engine_that_died_while_an_operator_stopped_it_is_not_killed_again_once_it_is_back() -> None:
    async def story() -> None:
        async with watched(pair()) as (service, senses):
            senses.hangs = True  # its evidence comes late
            await service.ask("a")
            running = asyncio.create_task(service.ask("a", serves_s=2.0))
            await asyncio.sleep(0.1)
            stop = Command(CommandKind.STOP, "a")
            stopping = asyncio.create_task(service.operator.command(stop, wait=True, deadline_s=60))
            await service.until("a", State.DRAINING)
            service.box.engines["a"].die()
            await stopping
            await asyncio.gather(running, return_exceptions=True)
            await service.ask("a")
            await asyncio.sleep(300)
            assert service.state("a") is State.AWAKE
            assert service.box.engines["a"].launches == 2

    run(story())
