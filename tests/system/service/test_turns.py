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


async def test_long_streams_frozen_across_five_swaps_equal_an_undisturbed_run_and_are_kept_alive(rig: Rig) -> None:
    undisturbed = await rig.say("a", "tell a long story", 900, stream=True)
    mark = rig.events.now()
    long = [await rig.chat("a", "tell a long story", 900).begun() for _ in range(3)]
    while not all(chat.task.done() for chat in long) and len(rig.events.find("engine.asleep", "a", mark)) < 5:
        slept = rig.events.now()
        other = rig.chat("b", "a short one", 4)
        await rig.events.wait("engine.asleep", "a", slept)
        await asyncio.sleep(0.5)  # it stands still long enough for its clients to see comments
        assert (await other.end()).done
        await rig.events.wait("engine.awake", "a", slept)
    answers = [await chat.end() for chat in long]
    assert [(a.error, a.broken, a.done) for a in answers] == [(None, None, True)] * 3
    assert [a.text for a in answers] == [undisturbed] * 3
    assert len(rig.events.find("engine.asleep", "a", mark)) >= 5
    assert all(len(a.comments) >= 2 for a in answers)


async def test_a_whole_answer_that_was_frozen_is_the_same_as_an_undisturbed_one(rig: Rig) -> None:
    undisturbed = await rig.say("a", "once more", 150)
    mark = rig.events.now()
    whole = rig.chat("a", "once more", 150, stream=False)
    await until_running(rig, "a")
    assert await rig.say("b")
    assert (await whole.end()).text == undisturbed
    assert rig.events.find("engine.asleep", "a", mark)


async def test_a_wake_that_nobody_waits_for_any_more_is_not_begun(rig: Rig) -> None:
    await rig.say("b")
    await rig.misbehave("b", slow_sleep_s=1.0, once=True)
    mark = rig.events.now()
    waiting = rig.chat("a", "never mind")
    await rig.events.wait("engine.falling_asleep", "b", mark)
    assert await is_queued(rig, 1)
    await waiting.leave()
    await eventually(lambda: is_queued(rig, 0), within_s=2, what="an empty queue")
    ended = await rig.events.wait("swap.ended", "a", mark)
    assert "nobody waits" in ended["data"]["error"]
    await rig.settled()
    assert not rig.events.find("engine.waking", "a", mark)


async def test_a_client_that_leaves_while_the_engine_in_its_way_drains_lets_that_engine_go_on(rig: Rig) -> None:
    await rig.say("b")
    await rig.misbehave("b")
    mark = rig.events.now()
    busy = await rig.chat("b", "busy", 150).begun()
    waiting = rig.chat("a", "never mind")
    await rig.events.wait("engine.draining", "b", mark)
    await waiting.leave()
    assert (await busy.end()).done
    await rig.settled()
    assert not rig.events.find("engine.waking", "a", mark)
    assert await rig.state("b") == "awake"


async def test_an_engine_drops_a_request_whose_client_left_in_mid_stream(rig: Rig) -> None:
    leaving = await rig.chat("b", "long", 2000).begun()
    assert (await rig.stub_state("b"))["running"] == 1
    await leaving.leave()
    await eventually(lambda: is_idle(rig, "b"), within_s=3, what="an idle engine")


async def test_an_engine_drops_a_frozen_request_whose_client_left_and_is_not_woken_for_it(rig: Rig) -> None:
    await rig.say("a")
    leaving = await rig.chat("a", "long", 2000).begun()
    mark = rig.events.now()
    staying = await rig.chat("b", "in its way", 200).begun()
    assert await rig.state("a") == "asleep"
    await leaving.leave()
    assert (await staying.end()).done
    await eventually(lambda: is_idle(rig, "a"), within_s=3, what="no request in the sleeping engine")
    await rig.settled()
    assert not rig.events.find("engine.waking", "a", mark)


async def is_queued(rig: Rig, count: int) -> bool:
    return len(await rig.get("/queue")) == count


async def is_idle(rig: Rig, name: str) -> bool:
    state = await rig.stub_state(name)
    return not state["running"] and not state["waiting"]


async def until_running(rig: Rig, name: str) -> None:
    async def runs() -> bool:
        return bool((await rig.stub_state(name))["running"])

    await eventually(runs, within_s=SOON_S, what=f"a request in {name}")
