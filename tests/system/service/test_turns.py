"""Many clients, models that cannot be awake together, and nobody loses anything."""

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.system.service.rig import SOON_S, Rig, engine, eventually, rig_up

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Rig]:
    names = ("a", "b", "c")
    async with rig_up(tmp_path_factory.mktemp("turns"), [engine(name) for name in names]) as rig:
        yield rig


@pytest_asyncio.fixture(loop_scope="module")
async def rig(shared: Rig) -> AsyncIterator[Rig]:
    yield shared
    await shared.check()


async def test_many_clients_over_models_that_cannot_be_awake_together_all_get_their_undisturbed_answers(
    rig: Rig,
) -> None:
    asked = [(model, f"question {i}", 20 + 15 * (i % 5)) for i in range(6) for model in ("a", "b", "c")]
    undisturbed = {ask: await rig.say(*ask) for ask in sorted(asked)}
    chats = []
    for number, (model, prompt, tokens) in enumerate(asked):
        chats.append(rig.chat(model, prompt, tokens, stream=number % 3 != 0))
        await asyncio.sleep(0.03)
    answers = [await chat.end() for chat in chats]
    assert [(a.status, a.error, a.broken) for a in answers] == [(200, None, None)] * len(asked)
    assert [a.text for a in answers] == [undisturbed[ask] for ask in asked]
    assert all(a.whole and (a.done or n % 3 == 0) for n, a in enumerate(answers))
