from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from rotator.adapters.vllm import VllmControl
from tests.contract.vllm.stub import Stub, start_stub


@pytest.fixture
async def control() -> AsyncIterator[VllmControl]:
    made = VllmControl(connect_s=1.0)
    yield made
    await made.close()


@pytest.fixture
async def stub() -> AsyncIterator[Callable[..., Awaitable[Stub]]]:
    started: list[Stub] = []

    async def start(version: str = "0.26.0", **settings: Any) -> Stub:
        started.append(await start_stub(version, **settings))
        return started[-1]

    yield start
    for one in started:
        await one.runner.cleanup()
