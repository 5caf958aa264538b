"""SIGTERM, SIGHUP and reloads: what is in flight ends in order, what a change does not concern is not touched."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.system.service.rig import Rig, engine, eventually, rig_up

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Rig]:
    async with rig_up(tmp_path_factory.mktemp("ends"), [engine("a"), engine("b")]) as rig:
        await rig.say("b")
        await rig.say("a")
        yield rig


@pytest_asyncio.fixture(loop_scope="module")
async def rig(shared: Rig) -> AsyncIterator[Rig]:
    yield shared
    shared.settings = {}
    await shared.serve()
    await shared.check()


async def serving_with(rig: Rig, on_shutdown: str) -> None:
    rig.settings = {"recovery": {"on_shutdown": on_shutdown, "shutdown_drain_s": 15}}
    await rig.restart()
    await rig.say("b")
    await rig.say("a")


async def ends_in_order(rig: Rig) -> None:
    """SIGTERM with work in flight, frozen, and waiting."""
    undisturbed = await rig.say("a", "story", 300)
    assert rig.service is not None
    streams = [await rig.chat("a", "story", 300).begun() for _ in range(2)]
    await rig.post("/engines/a/pin")
    rig.service.send_signal(signal.SIGTERM)
    await eventually(lambda: refuses(rig), what="a refusal")
    for chat in streams:
        answer = await chat.end()
        assert (answer.done, answer.text) == (True, undisturbed)
    assert await rig.ended() == 0
    await rig.events.close()


async def refuses(rig: Rig) -> bool:
    answer = await rig.chat("b").end()
    return answer.status == 503 and "shutting down" in str(answer.error)


async def test_sigterm_drains_and_leaves_the_engines_running(rig: Rig) -> None:
    await serving_with(rig, "leave")
    before = await rig.pids()
    await ends_in_order(rig)
    assert await rig.pids() == before
    assert all(before.values())


async def test_sigterm_drains_and_puts_the_engines_to_sleep(rig: Rig) -> None:
    await serving_with(rig, "sleep")
    before, urls = await rig.pids(), [e["url"] for e in await rig.get("/engines")]
    await ends_in_order(rig)
    assert await rig.pids() == before
    for url in urls:
        assert (await rig.call("GET", f"{url}/is_sleeping"))[1] == {"is_sleeping": True}


async def test_sigterm_drains_and_stops_the_engines(rig: Rig) -> None:
    await serving_with(rig, "stop")
    await ends_in_order(rig)
    assert not rig.processes()


async def test_sigterm_wakes_what_stands_still_so_that_it_can_end(rig: Rig) -> None:
    await serving_with(rig, "leave")
    undisturbed = await rig.say("a", "story", 300)
    frozen = await rig.chat("a", "story", 300).begun()
    running = await rig.chat("b", "story", 200).begun()
    assert await rig.terminate() == 0
    assert (await running.end()).done
    assert (await frozen.end()).text == undisturbed
    assert frozen.answer.done
    await rig.events.close()


async def test_nothing_comes_in_while_the_engines_are_stopped(tmp_path: Path) -> None:
    """One failed and would come back after its backoff, one has just begun to start, one is slow to go."""
    late = engine("late", gpus=[1], arguments=["--load-s", "60"])
    engines = [engine("fails"), late, engine("slow", gpus=[2], stop_grace_s=2)]
    recovery = {"on_shutdown": "stop", "shutdown_drain_s": 0.1, "backoff_first_s": 0.8}
    async with rig_up(tmp_path, engines, gpus=3, recovery=recovery) as rig:
        await asyncio.gather(rig.say("fails"), rig.say("slow"))
        await rig.post("/engines/late/start", wait=False)
        await rig.until_state("late", "starting")
        os.kill(await rig.pid("slow"), signal.SIGSTOP)
        mark = rig.events.now()
        os.kill(await rig.pid("fails"), signal.SIGKILL)
        await rig.events.wait("engine.failed", "fails", since=mark)
        assert await rig.terminate() == 0
        assert not rig.processes()


@pytest.mark.parametrize("how", ["signal", "request"])
async def test_a_reload_adds_changes_and_removes_without_touching_the_rest(tmp_path: Path, how: str) -> None:
    async with rig_up(tmp_path, [engine("a"), engine("b")]) as rig:

        async def reload() -> None:
            mark = rig.events.now()
            rig.write_fleet()
            if how == "signal":
                assert rig.service is not None
                rig.service.send_signal(signal.SIGHUP)
            else:
                assert (await rig.post("/config/reload"))["changes"]
            await rig.events.wait("config.reloaded", since=mark)

        await rig.say("b")
        undisturbed = await rig.say("a", "story", 300)
        before = await rig.pids()
        stream = await rig.chat("a", "story", 300).begun()
        rig.engines.append(engine("c", aliases=["see"]))
        rig.engines[1]["queue_max"] = 1
        await reload()
        assert rig.engine_processes("a") == before["a"]
        await rig.post("/engines/a/pin")
        assert (await rig.chat("see").end()).status == 503
        await rig.post("/engines/a/unpin")
        assert (await stream.end()).text == undisturbed
        assert await rig.say("see")
        assert {n: p for n, p in (await rig.pids()).items() if n != "c"} == before

        rig.engines.pop()
        await reload()
        await eventually(lambda: not rig.engine_processes("c"), what="the end of a removed engine")
        assert (await rig.chat("c").end()).status == 404
        assert await rig.say("a", "story", 300) == undisturbed
        assert await rig.pids() == before
        await rig.misbehave("a", slow_sleep_s=1.0, once=True)
        waiting = [rig.chat("b") for _ in range(3)]
        statuses = sorted([(await chat.end()).status for chat in waiting])
        assert statuses == [200, 429, 429], "the new bound of the queue holds"
        await rig.check()


async def test_a_reload_of_a_wrong_file_changes_nothing_and_says_what_is_wrong(rig: Rig) -> None:
    before = await rig.pids()
    right = rig.engines
    rig.engines = [*right, {"name": "x", "gpus": [7], "command": ["x"]}]
    rig.write_fleet()
    problem = await rig.problem("POST", "/config/reload")
    rig.engines = right
    assert problem["status"] == 422
    assert any("7" in line for line in problem["errors"])
    assert await rig.say("b")
    assert await rig.pids() == before
    await rig.terminate()
    await rig.events.close()
