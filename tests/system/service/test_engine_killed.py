"""An engine that dies or stands still, at every step of a swap: it comes back by itself, the other one serves."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.system.service.rig import Rig, engine, eventually, rig_up

pytestmark = pytest.mark.asyncio(loop_scope="module")
DEADLINES = {"sleep_deadline_s": 2, "wake_deadline_s": 2}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Rig]:
    engines = [engine("a", **DEADLINES), engine("b", **DEADLINES), engine("c", arguments=["--load-s", "1"])]
    settings = {
        "policies": {"drain_bound_s": 0.5},
        "recovery": {"health_every_s": 0.5, "health_failures_max": 2},
        "canary": {"deadline_s": 3},
    }
    async with rig_up(tmp_path_factory.mktemp("dying"), engines, **settings) as rig:
        await rig.say("b")
        yield rig


@pytest_asyncio.fixture(loop_scope="module")
async def rig(shared: Rig) -> AsyncIterator[Rig]:
    """``a`` is awake and ``b`` asleep, both have woken since they last failed."""
    for name in ("b", "a", "b", "a"):
        await shared.say(name)
    await shared.settled()
    yield shared
    await shared.check()


async def relaunched(rig: Rig, name: str, old: set[int], since: int) -> None:
    """It failed, and another process has taken its place without anybody's doing."""
    await rig.events.wait("engine.failed", name, since)
    await rig.until_state(name, "awake", "asleep")
    new = rig.engine_processes(name)
    assert new, "it did not come back"
    assert not new & old


def kill(pids: set[int], number: signal.Signals = signal.SIGKILL) -> None:
    for pid in pids:
        os.kill(pid, number)


async def test_killed_while_it_streams(rig: Rig) -> None:
    undisturbed = await rig.say("a", "story", 400)
    mark, old = rig.events.now(), rig.engine_processes("a")
    streams = [await rig.chat("a", "story", 400).begun() for _ in range(3)]
    whole = rig.chat("a", "story", 400, stream=False)
    await asyncio.sleep(0.2)
    kill(old)
    for chat in streams:
        answer = await chat.end()
        assert not answer.claims_to_be_complete, answer
        assert answer.error or answer.broken
        assert undisturbed.startswith(answer.text)
    answer = await whole.end()
    assert answer.status >= 500
    assert answer.error
    await relaunched(rig, "a", old, mark)
    assert await rig.say("b")
    assert await rig.say("a", "story", 400) == undisturbed


async def test_killed_while_it_drains(rig: Rig) -> None:
    mark, old = rig.events.now(), rig.engine_processes("a")
    stream = await rig.chat("a", "story", 3000).begun()
    other = rig.chat("b")
    await rig.events.wait("engine.draining", "a", mark)
    kill(old)
    assert not (await stream.end()).claims_to_be_complete
    assert (await other.end()).done
    await relaunched(rig, "a", old, mark)
    assert await rig.say("a")


async def test_killed_while_it_falls_asleep(rig: Rig) -> None:
    await rig.misbehave("a", slow_sleep_s=1.5)
    mark, old = rig.events.now(), rig.engine_processes("a")
    stream = await rig.chat("a", "story", 3000).begun()
    other = rig.chat("b")
    await rig.events.wait("engine.falling_asleep", "a", mark)
    kill(old)
    assert not (await stream.end()).claims_to_be_complete
    assert (await other.end()).done
    await relaunched(rig, "a", old, mark)
    assert await rig.say("a")


async def test_killed_while_it_sleeps_with_a_frozen_stream(rig: Rig) -> None:
    mark, old = rig.events.now(), rig.engine_processes("a")
    stream = await rig.chat("a", "story", 3000).begun()
    other = await rig.chat("b", "story", 100).begun()
    kill(old)
    assert not (await stream.end()).claims_to_be_complete
    assert (await other.end()).done
    await relaunched(rig, "a", old, mark)
    assert await rig.say("b")
    assert await rig.say("a")


async def test_killed_while_it_wakes(rig: Rig) -> None:
    await rig.misbehave("b", slow_wake_s=1.5)
    mark, old = rig.events.now(), rig.engine_processes("b")
    waiting = rig.chat("b")
    await rig.events.wait("engine.waking", "b", mark)
    kill(old)
    await relaunched(rig, "b", old, mark)
    assert (await waiting.end()).done, waiting.answer
    assert await rig.say("a")


async def test_killed_while_it_answers_its_canary(rig: Rig) -> None:
    await rig.misbehave("b", hang_generate=True)
    mark, old = rig.events.now(), rig.engine_processes("b")
    waiting = rig.chat("b")

    async def asked() -> bool:
        state = await rig.stub_state("b")
        return bool(state["waiting"] or state["running"]) and not state["sleeping"]

    await eventually(asked, what="the canary")
    kill(old)
    await relaunched(rig, "b", old, mark)
    assert (await waiting.end()).done, waiting.answer
    assert await rig.say("a")


async def test_killed_while_it_starts(rig: Rig) -> None:
    if await rig.state("c") != "stopped":
        await rig.post("/engines/c/stop")
    mark = rig.events.now()
    waiting = rig.chat("c")
    await rig.events.wait("engine.starting", "c", mark)
    await eventually(lambda: bool(rig.engine_processes("c")), what="the process")
    old = rig.engine_processes("c")
    kill(old)
    await relaunched(rig, "c", old, mark)
    assert (await waiting.end()).done, waiting.answer
    assert await rig.say("a")


async def test_stopped_while_awake_it_misses_its_health_checks_and_is_replaced(rig: Rig) -> None:
    mark, old = rig.events.now(), rig.engine_processes("a")
    stream = await rig.chat("a", "story", 3000).begun()
    kill(old, signal.SIGSTOP)
    await relaunched(rig, "a", old, mark)
    assert not (await stream.end()).claims_to_be_complete
    assert await rig.say("b")
    assert await rig.say("a")


async def test_stopped_while_it_falls_asleep_it_is_killed_at_the_deadline(rig: Rig) -> None:
    await rig.misbehave("a", slow_sleep_s=0.5)
    mark, old = rig.events.now(), rig.engine_processes("a")
    other = rig.chat("b")
    await rig.events.wait("engine.falling_asleep", "a", mark)
    kill(old, signal.SIGSTOP)
    assert (await other.end()).done
    failed = await rig.events.wait("engine.failed", "a", mark)
    assert "sleep failed" in failed["data"]["reason"]
    await relaunched(rig, "a", old, mark)
    assert await rig.say("a")


async def test_stopped_while_asleep_it_is_killed_at_the_wakes_deadline(rig: Rig) -> None:
    mark, old = rig.events.now(), rig.engine_processes("b")
    kill(old, signal.SIGSTOP)
    waiting = rig.chat("b")
    failed = await rig.events.wait("engine.failed", "b", mark)
    assert "wake failed" in failed["data"]["reason"]
    await relaunched(rig, "b", old, mark)
    assert (await waiting.end()).done, waiting.answer
    assert await rig.say("a")
