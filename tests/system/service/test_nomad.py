"""The whole service with its engines as Nomad's allocations: stub engines, run by a double of Nomad on a socket."""

import contextlib
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from rotator.adapters.nomad_job import var_file
from tests.nomad_double import NomadDouble
from tests.nomad_double.sample import HCL, sample_job
from tests.system.service.rig import Rig, eventually, free_port

pytestmark = pytest.mark.asyncio(loop_scope="module")


def on_nomad(folder: Path, name: str) -> dict[str, Any]:
    """An engine for the fleet file, whose job takes its port from there."""
    file = folder / "engine.nomad.hcl"
    file.write_text(HCL)
    return {
        "name": name,
        "gpus": [0],
        "launcher": "nomad",
        "port": free_port(),
        "job": {"file": str(file), "variables": {"job_id": "vllm-{name}", "port": "{port}"}},
        "start_deadline_s": 40,
        "stop_grace_s": 1,
        "footprint": {"awake_gib": 13, "residue_gib": 1},
    }


def teach(nomad: NomadDouble, rig: Rig, name: str) -> None:
    port = next(e["port"] for e in rig.engines if e["name"] == name)
    argv = [sys.executable, "-m", "rotator.demo.engine", "--name", name, "--port", str(port), "--gpus", "0"]
    argv += ["--weights-gib", "8", "--kv-gib", "4"]
    # What a container's own start would look like to the rig: it counts processes by these.
    job = sample_job(f"vllm-{name}", port=port, argv=argv, env={"ROTATOR_ENGINE": name})
    nomad.teach(HCL, var_file({"job_id": f"vllm-{name}", "port": str(port)}), job)


@contextlib.asynccontextmanager
async def fleet_on_nomad(folder: Path) -> AsyncIterator[tuple[Rig, NomadDouble]]:
    rig = Rig(folder, [on_nomad(folder, "a"), on_nomad(folder, "b")])
    environ = {**os.environ, **rig.box.env()}
    async with NomadDouble(folder / "nomad", token="s3cret", environ=environ) as nomad:
        (folder / "token").write_text("s3cret\n")
        rig.settings["nomad"] = {"address": nomad.address, "token_file": "token", "deadline_s": 3, "resync_s": 1}
        for engine in rig.engines:
            teach(nomad, rig, engine["name"])
        try:
            await rig.serve()
            yield rig, nomad
        finally:
            await nomad.stop()
            await rig.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Rig, NomadDouble]]:
    async with fleet_on_nomad(tmp_path_factory.mktemp("nomad")) as both:
        yield both


@pytest_asyncio.fixture(loop_scope="module")
async def rig(shared: tuple[Rig, NomadDouble]) -> Rig:
    """``a`` is awake and ``b`` asleep."""
    for name in ("b", "a"):
        await shared[0].say(name)
    await shared[0].settled()
    return shared[0]


@pytest.fixture
def nomad(shared: tuple[Rig, NomadDouble]) -> NomadDouble:
    return shared[1]


async def test_two_engines_take_turns_as_allocations(rig: Rig, nomad: NomadDouble) -> None:
    long = await rig.chat("a", "story", 400).begun()
    assert await rig.say("b")
    answer = await long.end()
    assert answer.done
    assert answer.error is None
    await rig.check()
    assert {a["JobID"] for a in nomad.cluster.allocs.values()} == {"vllm-a", "vllm-b"}
    assert len(nomad.cluster.allocs) == 2, "turns are taken by sleeping, not by starting anew"
    for name in ("a", "b"):
        assert (await rig.view(name))["pids"] == sorted(rig.engine_processes(name))


async def fall(nomad: NomadDouble, how: str, *, over: bool = False) -> None:
    """Nomad goes away in one of three ways, or comes back from it."""
    match how:
        case "nomad.unreachable":
            await (nomad.start() if over else nomad.stop())
        case "nomad.leader":
            nomad.leaderless = not over
        case "nomad.token":
            nomad.token = "s3cret" if over else "another"
    nomad.cut_streams()


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("nomad.unreachable", "cannot be reached"),
        ("nomad.leader", "Nomad has no leader now"),
        ("nomad.token", "refuses our token"),
    ],
)
async def test_requests_are_served_and_take_turns_while_nomad_is_away(
    rig: Rig, nomad: NomadDouble, how: str, words: str
) -> None:
    mark = rig.events.now()
    long = await rig.chat("a", "story", 300).begun()
    await fall(nomad, how)
    told = await rig.events.wait(how, since=mark)
    assert words in told["data"]["reason"]
    assert await rig.say("b")
    assert (await long.end()).done
    assert any(words in reason for reason in (await rig.readiness())["reasons"])
    await fall(nomad, how, over=True)
    await rig.events.wait(f"{how}_over", since=mark)
    await rig.check()
    assert (await rig.readiness())["reasons"] == []


async def test_a_service_that_was_killed_adopts_its_allocations(rig: Rig, nomad: NomadDouble) -> None:
    before, allocs = await rig.pids(), set(nomad.cluster.allocs)
    await rig.restart()
    await rig.check()
    assert await rig.pids() == before
    assert await rig.say("b")
    assert await rig.say("a")
    assert set(nomad.cluster.allocs) == allocs, "an engine was started anew"


async def test_a_service_that_comes_back_while_nomad_is_away_serves_with_what_is_there(
    rig: Rig, nomad: NomadDouble
) -> None:
    before = await rig.pids()
    await nomad.stop()
    await rig.restart()
    assert await rig.say("b")
    assert await rig.say("a")
    assert await rig.pids() == before
    await nomad.start()
    await rig.check()


async def test_an_engine_that_fails_its_sleep_is_killed_through_nomad_and_comes_back(
    rig: Rig, nomad: NomadDouble
) -> None:
    await rig.misbehave("a", fail_sleep_rank=0)
    nomad.log("vllm-a", "CUDA error: unspecified launch failure\n")
    mark = rig.events.now()
    assert await rig.say("b")
    failed = await rig.events.wait("engine.failed", "a", mark)
    assert "CUDA error: unspecified launch failure" in failed["data"]["reason"]
    assert any(asked.endswith("/signal") for asked in nomad.asked), "it was not killed"
    assert await rig.say("a")
    await rig.check()
    rows = (await rig.get("/ledger?table=transitions&engine=a&action=stop"))["rows"]
    assert rows[0]["result"] == "ok", "its bytes were not back"


async def test_an_allocation_that_nomad_lost_serves_on_and_takes_turns(rig: Rig, nomad: NomadDouble) -> None:
    mark, before = rig.events.now(), await rig.pids()
    await nomad.cluster.lose("vllm-a")
    told = await rig.events.wait("nomad.allocation", "a", mark)
    assert "is down for Nomad (it serves on)" in told["data"]["reason"]
    assert any("it serves on" in note for note in (await rig.view("a"))["notes"])
    assert await rig.say("b")
    assert await rig.say("a")
    assert await rig.pids() == before
    await nomad.cluster.reconnect("vllm-a")
    await rig.events.wait("nomad.allocation_over", "a", mark)
    await rig.check()


async def test_an_allocation_that_dies_is_revived_by_the_service_alone(rig: Rig, nomad: NomadDouble) -> None:
    mark, version = rig.events.now(), nomad.cluster.jobs["vllm-a"]["Version"]
    os.kill(await rig.pid("a"), 9)
    stopping = await rig.events.wait("engine.stopping", "a", mark)
    assert "Signal: 9" in stopping["data"]["reason"]
    await rig.events.wait("engine.awake", "a", mark)
    assert nomad.cluster.jobs["vllm-a"]["Version"] > version
    await rig.check()


async def test_a_node_that_is_drained_costs_its_engines_with_the_reason(rig: Rig, nomad: NomadDouble) -> None:
    mark = rig.events.now()
    await nomad.cluster.drain(end=False)
    told = await rig.events.wait("nomad.allocation", "a", mark)
    assert "being drained" in told["data"]["reason"]
    assert any("being drained" in note for note in (await rig.view("a"))["notes"])
    assert await rig.say("a"), "it serves until its node is empty"
    await nomad.cluster.drain()
    await rig.events.wait("engine.failed", "a", mark)
    await rig.events.wait("engine.failed", "b", mark)

    async def says_why() -> bool:
        return "no place for it" in (await rig.view("a"))["reason"]

    await eventually(says_why, what="the reason why it cannot come back")
