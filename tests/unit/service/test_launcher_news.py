"""What a launcher tells of by itself: shown and published, and no engine's state follows from it."""

import asyncio

from rotator.core.values import State
from rotator.ports import LauncherAway, LauncherNews
from rotator.service.mailbox import LauncherTold
from rotator.sim.clock import run
from tests.fakes import Service, make_box, make_service

ONE = {"a": ((0,), 82.0)}


async def tell(service: Service, engine: str | None, text: str, *, over: bool = False) -> None:
    kind = "nomad.unreachable" if engine is None else "nomad.allocation"
    service.loop.tell(LauncherTold(LauncherNews("nomad", engine, "node", kind, text, over)))
    await asyncio.sleep(0.1)


def test_what_concerns_one_engine_stands_in_its_notes_until_it_is_over() -> None:
    async def story() -> None:
        async with make_service(make_box(**ONE)) as service:
            await service.ask("a")
            await tell(service, "a", "its node is drained")
            assert service.operator.engine("a").notes == ("its node is drained",)
            assert service.state("a") is State.AWAKE
            await tell(service, "a", "over", over=True)
            assert service.operator.engine("a").notes == ()

    run(story())


def test_what_concerns_all_stands_in_readiness_and_is_published() -> None:
    async def story() -> None:
        async with make_service(make_box(**ONE)) as service:
            seen = service.loop.world.bus.last_id
            await tell(service, None, "Nomad is away")
            readiness = service.operator.readiness()
            assert readiness.ready
            assert readiness.reasons == ("Nomad is away",)
            [event] = [e for e in service.loop.world.bus.since(seen) if e.kind == "nomad.unreachable"]
            assert event.data["reason"] == "Nomad is away"
            await tell(service, None, "over", over=True)
            assert service.operator.readiness().reasons == ()

    run(story())


def test_news_of_an_engine_that_is_no_more_is_dropped() -> None:
    async def story() -> None:
        async with make_service(make_box(**ONE)) as service:
            await tell(service, "gone", "its node is drained")
            assert service.operator.readiness().reasons == ()
            assert service.loop.bugs == 0

    run(story())


def test_an_error_of_cuda_in_its_log_is_part_of_why_an_engine_failed() -> None:
    async def story() -> None:
        box = make_box(**ONE)
        async with make_service(box) as service:
            await service.ask("a")
            service.launcher.told_by_log = "CUDA: illegal memory access; last log lines: x"
            box.engines["a"].die("exit code 1")
            await service.until("a", State.FAILED)
            assert "exit code 1; CUDA: illegal memory access" in service.operator.engine("a").reason

    run(story())


def test_an_engine_that_is_no_longer_configured_is_ended_once_its_launcher_answers() -> None:
    async def story() -> None:
        box = make_box(**ONE, b=((1,), 80.0))
        async with make_service(box) as service:
            await service.ask("a")
            await service.ask("b")
        left = service.config.model_copy(update={"engines": service.config.engines[:1]})
        again = make_service(box, left, service.ledger)
        again.launcher.find_error = LauncherAway("Nomad is away")
        async with again:
            await asyncio.sleep(1)
            seen = [e.kind for e in again.bus.since(0)]
            assert "orphan.left" in seen
            assert box.engines["b"].running
            again.launcher.find_error = None
            await asyncio.sleep(10)
            assert not box.engines["b"].running
            assert box.engines["a"].running

    run(story())
