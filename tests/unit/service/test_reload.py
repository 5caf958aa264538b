"""A fleet file that lacks engines which are wanted, on their way, or not found out about yet."""

import asyncio

import pytest

from rotator.config import ConfigError, FleetConfig
from rotator.core.values import State
from rotator.ports import LaunchError
from rotator.service.gates import EngineUnavailable
from rotator.service.operations import CommandFailed
from rotator.service.reload import Reloads
from rotator.service.setup import Setup
from rotator.sim.clock import run
from tests.fakes import Service, make_box, make_service

BIG = {"a": ((0,), 80.0), "b": ((0,), 80.0)}


def without(config: FleetConfig, name: str) -> FleetConfig:
    return config.model_copy(update={"engines": tuple(e for e in config.engines if e.name != name)})


def setup_of(service: Service) -> Setup:
    setup = Setup(service.loop, lambda _: None, lambda _: 1)
    service.loop.rebuild = setup.rebuild
    return setup


async def take(service: Service, *files: FleetConfig) -> None:
    """Reload so many times at once, while the file is changed from one to the next."""
    reloads, left = Reloads(service.loop, service.operator, setup_of(service)), list(files)

    async def read() -> FleetConfig:
        return left.pop(0)

    await asyncio.gather(*(reloads.take(read) for _ in files))


def test_an_engine_that_clients_wait_for_is_removed_and_not_started_again() -> None:
    async def story() -> None:
        async with make_service(make_box(**BIG)) as service:
            await service.ask("a")
            await service.ask("b")
            waiting = asyncio.create_task(service.ask("a"))
            await service.until("b", State.FALLING_ASLEEP)
            await take(service, without(service.config, "a"))
            with pytest.raises(EngineUnavailable, match="'a' was removed"):
                await waiting
            assert list(service.fleet.engines) == ["b"]
            assert service.box.engines["a"].launches == 1
            assert not service.box.engines["a"].running

    run(story())


def test_an_engine_that_cannot_be_stopped_now_stays_and_serves_on() -> None:
    async def story() -> None:
        async with make_service(make_box(**BIG)) as service:
            await service.ask("a")
            running = asyncio.create_task(service.ask("a", serves_s=400.0))
            await asyncio.sleep(0.1)
            with pytest.raises(CommandFailed, match="in flight"):
                await take(service, without(service.config, "a"))
            assert list(service.fleet.engines) == ["a", "b"]
            await service.ask("a")
            await running
            await service.ask("b")
            await service.ask("a")  # from its line, too

    run(story())


def test_an_engine_with_a_swap_under_way_is_not_taken_out_from_under_it() -> None:
    async def story() -> None:
        async with make_service(make_box(**BIG)) as service:
            await service.ask("b")
            coming = asyncio.create_task(service.ask("a"))
            await service.until("b", State.FALLING_ASLEEP)
            assert service.state("a") is State.STOPPED
            with pytest.raises(ConfigError, match="engine 'a': a swap with it is under way: reload again"):
                setup_of(service).apply(without(service.config, "a"))
            await coming

    run(story())


def test_nothing_is_taken_out_or_over_before_it_is_known_whether_it_runs() -> None:
    async def story() -> None:
        service = make_service(make_box(**BIG))
        find = service.launcher.find

        async def away(*args: object) -> object:
            if asyncio.get_running_loop().time() < 20.0:
                raise LaunchError("the launcher cannot be reached")
            return await find(*args)  # type: ignore[arg-type]

        service.launcher.find = away  # type: ignore[method-assign,assignment]
        async with service:
            setup, new = setup_of(service), without(service.config, "a")
            with pytest.raises(ConfigError, match="still being looked for"):
                setup.apply(new)
            await asyncio.sleep(3.0)
            with pytest.raises(ConfigError, match="engine 'a': nobody can tell yet whether it runs"):
                setup.apply(new)
            await asyncio.sleep(30.0)
            setup.apply(new)
            assert list(service.fleet.engines) == ["b"]

    run(story())


def test_of_two_reloads_at_once_the_newer_file_is_in_force_at_the_end() -> None:
    async def story() -> None:
        async with make_service(make_box(**BIG)) as service:
            await service.ask("a")
            await take(service, without(service.config, "a"), service.config)  # the first has to wait for its stop
            assert sorted(service.fleet.engines) == ["a", "b"]

    run(story())
