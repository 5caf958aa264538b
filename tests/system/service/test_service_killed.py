"""kill -9 of the service at every step of a swap: whoever comes next finds the engines, doubles none and leaks none."""

import os
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.system.service.rig import Chat, Rig, engine, eventually, rig_up

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Rig]:
    engines = [engine("a"), engine("b"), engine("c", arguments=["--load-s", "1.5"])]
    settings = {"policies": {"drain_bound_s": 0.6}}
    async with rig_up(tmp_path_factory.mktemp("killed"), engines, **settings) as rig:
        await rig.say("b")
        yield rig


@pytest_asyncio.fixture(loop_scope="module")
async def rig(shared: Rig) -> Rig:
    """``a`` is awake and ``b`` asleep, both well-behaved."""
    for name in ("b", "a"):
        await shared.say(name)
        await shared.misbehave(name)
    await shared.settled()
    return shared


def assert_broken(chat: Chat, tokens_wanted: str) -> None:
    answer = chat.answer
    assert not answer.claims_to_be_complete, answer
    assert tokens_wanted.startswith(answer.text)


async def killed_and_back(rig: Rig, *chats: Chat) -> None:
    """Kill the service, start it again; all that must hold then."""
    before = await rig.pids()
    await rig.kill()
    for chat in chats:
        await chat.end()
    assert await rig.pids() == before, "the engines do not outlive their service"
    await rig.serve()
    await rig.check()
    assert await rig.pids() == before, "an engine was doubled or lost"


async def test_at_the_intent(rig: Rig) -> None:
    long = await rig.chat("a", "story", 2000).begun()
    mark = rig.events.now()
    waiting = rig.chat("b")
    await rig.events.wait("swap.begun", "b", mark)
    await killed_and_back(rig, long, waiting)
    assert not long.answer.claims_to_be_complete
    assert not waiting.answer.claims_to_be_complete
    assert await rig.say("b")
    assert await rig.say("a")


async def test_while_the_engine_in_the_way_drains(rig: Rig) -> None:
    long = await rig.chat("a", "story", 2000).begun()
    mark = rig.events.now()
    waiting = rig.chat("b")
    await rig.events.wait("engine.draining", "a", mark)
    await killed_and_back(rig, long, waiting)
    assert not long.answer.claims_to_be_complete
    assert await rig.state("a") == "awake"
    assert await rig.say("b")
    assert await rig.say("a")


async def test_while_an_engine_falls_asleep_with_a_stream_in_flight(rig: Rig) -> None:
    await rig.misbehave("a", slow_sleep_s=1.5, once=True)
    undisturbed = await rig.say("a", "story", 300)
    long = await rig.chat("a", "story", 300).begun()
    mark = rig.events.now()
    waiting = rig.chat("b")
    await rig.events.wait("engine.falling_asleep", "a", mark)
    await eventually(lambda: says_it_sleeps(rig, "a"), what="the sleep")
    await killed_and_back(rig, long, waiting)
    assert_broken(long, undisturbed)
    assert await rig.state("a") == "asleep"
    assert await rig.say("b")
    assert await rig.say("a")


async def test_while_an_engine_wakes(rig: Rig) -> None:
    await rig.misbehave("b", slow_wake_s=1.5, once=True)
    undisturbed = await rig.say("a", "story", 300)
    long = await rig.chat("a", "story", 300).begun()
    mark = rig.events.now()
    waiting = rig.chat("b")
    await rig.events.wait("engine.waking", "b", mark)
    await eventually(lambda: wakes(rig, "b"), what="the wake call")
    await killed_and_back(rig, long, waiting)
    assert_broken(long, undisturbed)
    assert not waiting.answer.claims_to_be_complete
    assert await rig.say("b")
    assert await rig.say("a")


async def test_while_a_woken_engine_answers_its_canary(rig: Rig) -> None:
    await rig.misbehave("b", hang_generate=True)
    url = (await rig.view("b"))["url"]
    waiting = rig.chat("b")
    await eventually(lambda: runs(rig, url), what="the canary")
    assert await rig.state("b") == "waking"
    before = await rig.pids()
    await rig.kill()
    assert not (await waiting.end()).claims_to_be_complete
    await rig.call("POST", f"{url}/stub/misbehave", json={"reset": True})
    await rig.serve()
    await rig.check()
    assert await rig.pids() == before
    assert await rig.state("b") == "awake"
    assert await rig.say("b")
    assert await rig.say("a")


async def test_while_an_engine_starts(rig: Rig) -> None:
    if await rig.state("c") != "stopped":
        await rig.post("/engines/c/stop")
    mark = rig.events.now()
    waiting = rig.chat("c")
    await rig.events.wait("engine.starting", "c", mark)
    await eventually(lambda: bool(rig.engine_processes("c")), what="the process")
    await killed_and_back(rig, waiting)
    assert not waiting.answer.claims_to_be_complete
    assert await rig.state("c") == "awake"
    assert await rig.say("b")
    assert await rig.say("c")


async def test_while_an_engine_is_stopped(rig: Rig) -> None:
    mark = rig.events.now()
    await rig.post("/engines/b/stop", wait=False)
    await rig.events.wait("engine.stopping", "b", mark)
    await rig.kill()
    await rig.serve()
    await rig.check()
    assert await rig.say("b")
    assert await rig.say("a")


async def test_while_it_is_idle_and_twice_in_a_row(rig: Rig) -> None:
    await killed_and_back(rig)
    await killed_and_back(rig)
    assert {n: await rig.state(n) for n in ("a", "b")} == {"a": "awake", "b": "asleep"}
    assert await rig.say("b")
    assert await rig.say("a")


async def test_in_the_middle_of_looking_which_engines_run(rig: Rig) -> None:
    before = await rig.pids()
    await rig.kill()
    first = rig.spawn()
    await eventually(lambda: first.poll() is not None or b"ledger.db" in open_files(first.pid), what="an open ledger")
    first.kill()
    await rig.ended()
    await rig.serve()
    await rig.check()
    assert await rig.pids() == before


def open_files(pid: int) -> bytes:
    found = []
    try:
        for name in os.listdir(f"/proc/{pid}/fd"):
            try:
                found.append(os.readlink(f"/proc/{pid}/fd/{name}"))
            except OSError:
                continue
    except OSError:
        return b""
    return " ".join(found).encode()


async def says_it_sleeps(rig: Rig, name: str) -> bool:
    return bool((await rig.stub_state(name))["sleeping"])


async def wakes(rig: Rig, name: str) -> bool:
    """Whether the wake call has come to the engine: it says so in its metrics only while it is carried out."""
    view = await rig.view(name)
    return view["state"] == "waking" and (await rig.stub_state(name))["sleeping"]


async def runs(rig: Rig, url: str) -> bool:
    state = (await rig.call("GET", f"{url}/stub/state"))[1]
    return bool(state["running"] or state["waiting"]) and not state["sleeping"]
