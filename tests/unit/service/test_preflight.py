"""The look before a launch: what surely cannot start is told, and nothing is started."""

import asyncio

import pytest

from rotator.config import EngineConfig
from rotator.core.values import Command, CommandKind, State
from rotator.ports import LaunchSpec
from rotator.service.operations import CommandFailed
from rotator.sim.clock import run
from tests.fakes import make_box, make_config, make_service

ONE = {"a": ((0, 1, 2, 3), 82.0)}
TWO = {**ONE, "b": ((0, 1, 2, 3), 82.0)}


class Look:
    def __init__(self, why: str | None) -> None:
        self.why = why
        self.asked: list[str] = []

    async def __call__(self, engine: EngineConfig, spec: LaunchSpec) -> str | None:
        self.asked.append(spec.engine)
        await asyncio.sleep(0.5)
        return self.why


def test_a_launch_that_surely_fails_is_refused_with_what_mends_it_and_starts_nothing() -> None:
    async def story() -> None:
        box, look = make_box(**ONE), Look("not launched: its program is gone: write it again")
        async with make_service(box) as service:
            service.loop.world.preflight = look
            with pytest.raises(CommandFailed, match="its program is gone: write it again"):
                await service.operator.command(Command(CommandKind.START, "a"), wait=True, deadline_s=60)
            assert "launch a" not in box.log
            assert service.state("a") in (State.STOPPING, State.FAILED)
            look.why = None  # somebody mended it: the retry after the backoff gets through
            await service.ask("a")
            assert service.state("a") is State.AWAKE
            assert len(look.asked) >= 2

    run(story())


def test_the_look_is_off_by_one_line() -> None:
    async def story() -> None:
        box, look = make_box(**ONE), Look("never")
        async with make_service(box, make_config(box, "recovery: {preflight: false}")) as service:
            service.loop.world.preflight = look
            await service.ask("a")
            assert look.asked == []

    run(story())


def test_nobody_yields_to_a_launch_that_surely_fails() -> None:
    async def story() -> None:
        box, look = make_box(**TWO), Look("its program is gone")
        async with make_service(box) as service:
            await service.ask("b")
            service.loop.world.preflight = look
            with pytest.raises(CommandFailed, match="its program is gone"):
                await service.operator.command(Command(CommandKind.START, "a"), wait=True, deadline_s=60)
            assert service.state("b") is State.AWAKE
            assert "sleep b" not in " ".join(box.log)

    run(story())
