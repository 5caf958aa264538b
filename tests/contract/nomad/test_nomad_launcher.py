"""The launcher over the double: one engine's job from its start to its end, and all that can come between."""

import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from rotator.ports import Handle, LauncherAway, LaunchError, NodeError
from tests.contract.nomad.rig import Rig, eventually, rig_up, second
from tests.nomad_double import NomadDouble

SLEEPER = (sys.executable, "-S", "-c", "import signal; signal.pause()")


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with rig_up(tmp_path) as made:
        yield made


@contextlib.asynccontextmanager
async def watched(rig: Rig, handle: Handle) -> AsyncIterator[asyncio.Task[str]]:
    """Its exit being waited for, as the loop does."""
    exit_ = asyncio.create_task(rig.launcher.wait_exit(handle))
    await eventually(lambda: any("event/stream" in asked for asked in rig.nomad.asked))
    try:
        yield exit_
    finally:
        exit_.cancel()
        await asyncio.gather(exit_, return_exceptions=True)


async def soon(exit_: asyncio.Task[str]) -> str:
    async with asyncio.timeout(10):
        return await exit_


async def still_waits(exit_: asyncio.Task[str]) -> bool:
    await asyncio.sleep(0.2)
    return not exit_.done()


# -- start -----------------------------------------------------------------------------------------------------------


async def test_a_start_plans_registers_against_the_plan_and_returns_its_allocation(rig: Rig) -> None:
    handle = await rig.launcher.start(rig.spec())
    assert handle.ref["job_id"] == "vllm-a"
    assert handle.ref["allocs"] == [rig.alloc()["ID"]]
    asked = [a for a in rig.nomad.asked if a.startswith("POST")]
    assert asked == ["POST /v1/jobs/parse", "POST /v1/job/vllm-a/plan", "POST /v1/job/vllm-a"]
    meta = rig.nomad.cluster.jobs["vllm-a"]["Meta"]
    assert (meta["rotator_engine"], meta["rotator_service"]) == ("a", "svc")


async def test_an_engine_that_crashed_is_revived_as_another_version(rig: Rig) -> None:
    first = await rig.launcher.start(rig.spec(argv=[sys.executable, "-S", "-c", "raise SystemExit(3)"]))
    async with watched(rig, first) as exit_:
        assert "Exit Code: 3" in await soon(exit_)
    assert await rig.launcher.find(rig.spec(argv=SLEEPER), None) is None
    again = await rig.launcher.start(rig.spec(argv=SLEEPER))
    assert again.ref["allocs"] != first.ref["allocs"]
    assert rig.nomad.cluster.jobs["vllm-a"]["Version"] == 1


async def test_a_running_job_is_never_doubled(rig: Rig) -> None:
    await rig.launcher.start(rig.spec())
    with pytest.raises(LaunchError, match=r"job 'vllm-a' has allocation \w{8} already"):
        await rig.launcher.start(rig.spec())
    assert len(rig.nomad.cluster.of_job("vllm-a")) == 1


async def test_a_job_without_a_place_says_why_and_is_not_registered(rig: Rig) -> None:
    rig.nomad.cluster.no_place = {"NodesEvaluated": 2, "ConstraintFiltered": {"${node.unique.name} = gpu9": 2}}
    with pytest.raises(
        LaunchError, match=r"no place for it: group 'engine': 2 of its nodes lack '\$\{node.unique.name\} = gpu9'"
    ):
        await rig.launcher.start(rig.spec())
    assert "vllm-a" not in rig.nomad.cluster.jobs


async def test_a_place_lost_after_the_plan_takes_the_job_back(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = rig.nomad.cluster.plan

    def hopeful(job: dict[str, Any]) -> dict[str, Any]:
        planned = plan(job)
        rig.nomad.cluster.no_place = {"NodesEvaluated": 1, "DimensionExhausted": {"cores": 1}}
        return planned

    monkeypatch.setattr(rig.nomad.cluster, "plan", hopeful)
    with pytest.raises(LaunchError, match="has not placed job 'vllm-a': group 'engine': 1 nodes are too full: cores"):
        await rig.launcher.start(rig.spec())
    assert rig.nomad.cluster.jobs["vllm-a"]["Stop"], "a place found later would start it behind everybody's back"


async def test_a_conflict_starts_nothing(rig: Rig) -> None:
    await rig.launcher.stop(await rig.launcher.start(rig.spec()), grace_s=1)
    rig.nomad.conflicts = 1
    with pytest.raises(LaunchError, match="somebody changed it meanwhile"):
        await rig.launcher.start(rig.spec())
    assert not rig.nomad.cluster.live("vllm-a")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"Type": "batch"}, 'set type = "service"'),
        ({"TaskGroups": []}, "it has no group"),
        ({"Namespace": "models"}, "its job is for namespace 'models', and nomad.namespace is 'default'"),
    ],
)
async def test_a_job_that_is_no_engine_is_refused(rig: Rig, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(LaunchError, match=words):
        await rig.launcher.start(rig.spec(**changes))


async def test_a_missing_job_file_says_what_to_correct(rig: Rig) -> None:
    spec = rig.spec()
    (rig.folder / "engine.nomad.hcl").unlink()
    with pytest.raises(LaunchError, match=r"engine 'a': job file .* cannot be read.*correct 'job.file'"):
        await rig.launcher.start(spec)


async def test_another_services_job_is_left_alone(rig: Rig) -> None:
    await rig.launcher.start(rig.spec())
    other = second(rig.nomad, [], service="other")
    with pytest.raises(LaunchError, match="belongs to another rotation service"):
        await other.find(rig.spec(), None)
    with pytest.raises(LaunchError, match="belongs to another rotation service"):
        await other.start(rig.spec())
    await rig.launcher.stop(await rig.launcher.start(rig.spec("b", 8002)), grace_s=1)
    assert await other.start(rig.spec("b", 8002)), "what its service has stopped is free"
    await other.close()


# -- exits -----------------------------------------------------------------------------------------------------------


async def test_a_crash_is_told_at_once_with_the_cuda_error_of_its_log(rig: Rig) -> None:
    script = "import sys; print('CUDA error: an illegal memory access was encountered', file=sys.stderr); sys.exit(1)"
    handle = await rig.launcher.start(rig.spec(argv=[sys.executable, "-S", "-c", script]))
    async with watched(rig, handle) as exit_:
        words = await soon(exit_)
    assert "is failed (Failed tasks); task 'vllm': Exit Code: 1; CUDA: CUDA error: an illegal memory access" in words
    assert "illegal memory access" in (rig.folder / "a.log").read_text(), "Nomad forgets logs with their allocation"


async def test_a_cut_stream_loses_nothing(rig: Rig) -> None:
    handle = await rig.launcher.start(rig.spec(argv=SLEEPER))
    async with watched(rig, handle) as exit_:
        await eventually(lambda: rig.nomad.cut_streams() == 1)
        task = next(iter(rig.nomad.cluster.tasks[rig.alloc()["ID"]].values()))
        task.send(signal.SIGKILL)  # told while nobody listens
        assert "Signal: 9" in await soon(exit_)


async def test_an_outage_is_no_exit_and_what_happened_in_it_is_told_after_it(rig: Rig) -> None:
    handle = await rig.launcher.start(rig.spec(argv=SLEEPER))
    async with watched(rig, handle) as exit_:
        await rig.nomad.stop()
        said = await rig.until_said("nomad.unreachable")
        assert "Engines that serve go on" in said
        assert await rig.launcher.is_alive(handle)
        assert await still_waits(exit_)
        next(iter(rig.nomad.cluster.tasks[rig.alloc()["ID"]].values())).send(signal.SIGKILL)
        await rig.nomad.start()
        assert "Signal: 9" in await soon(exit_)
    assert rig.said("nomad.unreachable_over")


@pytest.mark.parametrize(("fault", "kind"), [("leader", "nomad.leader"), ("token", "nomad.token")])
async def test_a_nomad_that_cannot_answer_is_no_exit(rig: Rig, fault: str, kind: str) -> None:
    handle = await rig.launcher.start(rig.spec(argv=SLEEPER))
    async with watched(rig, handle) as exit_:
        if fault == "leader":
            rig.nomad.leaderless = True
        else:
            rig.nomad.token = "another"
        rig.nomad.cut_streams()
        await rig.until_said(kind)
        assert await still_waits(exit_)
        with pytest.raises(LaunchError, match="Nomad"):
            await rig.launcher.stop(handle, grace_s=0)


async def test_a_lost_allocation_serves_on_until_nothing_of_it_answers(rig: Rig) -> None:
    handle = await rig.launcher.start(rig.spec(argv=SLEEPER))
    async with watched(rig, handle) as exit_:
        await rig.nomad.cluster.lose("vllm-a")
        assert "node gpu1 is down for Nomad (it serves on)" in await rig.until_said("nomad.allocation")
        assert await still_waits(exit_)
        assert await rig.launcher.is_alive(handle)
        assert await rig.launcher.find(rig.spec(argv=SLEEPER), handle.ref) is not None


async def test_a_disconnected_node_and_its_return_are_told(rig: Rig) -> None:
    handle = await rig.launcher.start(rig.spec())
    async with watched(rig, handle) as exit_:
        await rig.nomad.cluster.disconnect("vllm-a")
        assert "node gpu1 is disconnected from Nomad" in await rig.until_said("nomad.allocation")
        await rig.nomad.cluster.reconnect("vllm-a")
        await rig.until_said("nomad.allocation_over")
        assert not exit_.done()


async def test_a_drain_is_told_before_it_ends_the_engine(rig: Rig) -> None:
    handle = await rig.launcher.start(rig.spec(argv=SLEEPER))
    async with watched(rig, handle) as exit_:
        await rig.nomad.cluster.drain(end=False)
        assert "node gpu1 is being drained: Nomad will end" in await rig.until_said("nomad.allocation")
        assert await still_waits(exit_)
        await rig.nomad.cluster.drain()
        assert "node gpu1 is being drained" in await soon(exit_)
    left = await rig.launcher.find(rig.spec(argv=SLEEPER), None)
    assert left is not None, "the job waits for another node: it would start there behind everybody's back"
    await rig.launcher.stop(left, grace_s=1)
    assert await rig.launcher.find(rig.spec(argv=SLEEPER), None) is None
    with pytest.raises(LaunchError, match="no node is there for it"):
        await rig.launcher.start(rig.spec(argv=SLEEPER))


async def test_an_engine_that_lives_with_a_cuda_error_is_told(tmp_path: Path) -> None:
    async with rig_up(tmp_path, resync_s=0.2) as rig:
        handle = await rig.launcher.start(rig.spec(argv=SLEEPER))
        async with watched(rig, handle):
            await eventually(lambda: rig.alloc()["ClientStatus"] == "running")
            rig.nomad.log("vllm-a", "[rank2] NCCL WARN something\n[rank3] NCCL WARN something\n")
            assert await rig.until_said("engine.cuda_error") == "[rank2] NCCL WARN something"


async def test_a_failed_deployment_is_told(rig: Rig) -> None:
    rig.nomad.cluster.deployments_fail = True
    handle = await rig.launcher.start(rig.spec())
    async with watched(rig, handle):
        said = await rig.until_said("nomad.deployment")
    assert said == "Nomad's deployment is failed: Failed due to progress deadline"


async def test_drift_is_told_by_field_and_is_over_with_it(tmp_path: Path) -> None:
    async with rig_up(tmp_path, resync_s=0.1) as rig:
        handle = await rig.launcher.start(rig.spec())
        async with watched(rig, handle):
            await eventually(lambda: rig.nomad.asked.count("POST /v1/job/vllm-a/plan") == 2)
            assert rig.said("nomad.drift") == []
            job = rig.nomad.cluster.jobs["vllm-a"]
            job["TaskGroups"][0]["Tasks"][0]["Config"]["image"] = "vllm@sha256:1"
            job["JobModifyIndex"] += 1
            said = await rig.until_said("nomad.drift")
            assert "vllm.Config.image: vllm@sha256:1 -> vllm@sha256:0" in said
            job["TaskGroups"][0]["Tasks"][0]["Config"]["image"] = "vllm@sha256:0"
            job["JobModifyIndex"] += 1
            await rig.until_said("nomad.drift_over")


# -- find and stop ---------------------------------------------------------------------------------------------------


async def test_a_start_whose_answer_was_lost_is_found_by_its_job(rig: Rig) -> None:
    started = await rig.launcher.start(rig.spec(argv=SLEEPER))
    other = second(rig.nomad, [])
    found = await other.find(rig.spec(argv=SLEEPER), None)
    assert found is not None
    assert found.ref == started.ref
    await other.close()


async def test_a_known_engine_is_found_while_nomad_is_away_if_it_is_there(rig: Rig) -> None:
    handle = await rig.launcher.start(rig.spec(argv=SLEEPER))
    await eventually(lambda: rig.alloc()["ClientStatus"] == "running")
    await rig.nomad.stop()
    found = await rig.launcher.find(rig.spec(argv=SLEEPER), handle.ref)
    assert found == handle
    with pytest.raises(LauncherAway):
        await rig.launcher.find(rig.spec(argv=SLEEPER), None)


async def test_its_processes_are_known_by_their_allocation(rig: Rig) -> None:
    handle = await rig.launcher.start(rig.spec(argv=SLEEPER))
    await eventually(lambda: rig.alloc()["ClientStatus"] == "running")
    task = next(iter(rig.nomad.cluster.tasks[rig.alloc()["ID"]].values()))
    assert await rig.launcher.pids(handle) == {task.pid}


@pytest.mark.parametrize("grace_s", [5.0, 0.0])
async def test_a_stop_returns_when_nothing_is_left(rig: Rig, grace_s: float) -> None:
    handle = await rig.launcher.start(rig.spec(argv=SLEEPER))
    await eventually(lambda: rig.alloc()["ClientStatus"] == "running")
    await rig.launcher.stop(handle, grace_s=grace_s)
    assert await rig.launcher.pids(handle) == frozenset()
    assert rig.nomad.cluster.jobs["vllm-a"]["Status"] == "dead"
    assert await rig.launcher.find(rig.spec(argv=SLEEPER), handle.ref) is None
    killed = any("signal" in asked for asked in rig.nomad.asked)
    assert killed == (grace_s == 0.0)


async def test_one_that_will_not_go_is_killed_after_its_grace(rig: Rig) -> None:
    deaf = "import signal,time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); signal.pause()"
    handle = await rig.launcher.start(rig.spec(argv=[sys.executable, "-S", "-c", deaf]))
    await eventually(lambda: next(iter(rig.nomad.cluster.tasks[rig.alloc()["ID"]].values())).read("stdout") != b"")
    await rig.launcher.stop(handle, grace_s=0.2)
    assert any(asked.endswith("/signal") for asked in rig.nomad.asked)
    assert await rig.launcher.pids(handle) == frozenset()


async def test_what_nomad_lost_sight_of_is_ended_all_the_same(rig: Rig) -> None:
    handle = await rig.launcher.start(rig.spec(argv=SLEEPER))
    await eventually(lambda: rig.alloc()["ClientStatus"] == "running")
    await rig.nomad.cluster.lose("vllm-a")
    assert await rig.launcher.pids(handle)
    rig.nomad.cluster._stop_soon = lambda *_: None  # type: ignore[method-assign] # its node hears of nothing
    await rig.launcher.stop(handle, grace_s=0.1)
    assert await rig.launcher.pids(handle) == frozenset()


# -- several nodes ---------------------------------------------------------------------------------------------------


class FakeAgents:
    def __init__(self) -> None:
        self.left: dict[str, Sequence[Any]] = {"": (), "gpu2": ()}
        self.packages: dict[str, Mapping[str, str]] = {
            node: {"nvidia-nccl-cu13": "2.27.7", "flashinfer-python": "0.5.2"} for node in self.left
        }
        self.away = ""
        self.killed: list[str] = []

    async def processes(
        self, engine: str, nodes: Sequence[str] = ("",), *, job: str = "", deadline_s: float
    ) -> Mapping[str, Sequence[Any]]:
        if self.away:
            raise NodeError(f"node {self.away}: its agent does not answer")
        return {node: self.left[node] for node in nodes}

    async def kill(
        self, engine: str, nodes: Sequence[str] = ("",), *, job: str = "", grace_s: float, deadline_s: float
    ) -> Mapping[str, Sequence[Any]]:
        self.killed.append(f"{engine} of {job}")
        return await self.processes(engine, nodes, deadline_s=deadline_s)

    async def versions(self, nodes: Sequence[str], *, deadline_s: float) -> Mapping[str, Mapping[str, str]]:
        return {node: self.packages[node] for node in nodes}

    async def pids(self, engine: str, nodes: Sequence[str], *, deadline_s: float) -> frozenset[int]:
        return frozenset({7})


class Left:
    pid, name = 12, "VLLM::Worker"


def leave_a_process(agents: FakeAgents) -> None:
    agents.left["gpu2"] = (Left(),)


def differ(agents: FakeAgents) -> None:
    agents.packages["gpu2"] = {"nvidia-nccl-cu13": "2.26.2", "flashinfer-python": "0.5.2"}


def be_away(agents: FakeAgents) -> None:
    agents.away = "gpu2"


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        (leave_a_process, r"on gpu2 processes of it are left: 12 \(VLLM::Worker\)"),
        (differ, "nccl differs: this machine has 2.27.7, gpu2 has 2.26.2"),
        (be_away, "gpu2: its agent does not answer"),
    ],
)
async def test_an_engine_over_nodes_starts_only_on_clean_and_equal_ones(
    tmp_path: Path, trouble: Any, words: str
) -> None:
    agents = FakeAgents()
    async with rig_up(tmp_path, agents=agents) as rig:
        trouble(agents)
        with pytest.raises(LaunchError, match=f"engine 'a' was not started: .*{words}"):
            await rig.launcher.start(rig.spec(nodes=("", "gpu2")))
        assert "vllm-a" not in rig.nomad.cluster.jobs
        mended = FakeAgents()
        agents.left, agents.packages, agents.away = mended.left, mended.packages, ""
        handle = await rig.launcher.start(rig.spec(nodes=("", "gpu2")))
        assert await rig.launcher.pids(handle) == {7}


async def test_a_stop_over_nodes_is_done_when_nothing_is_left_on_any(tmp_path: Path) -> None:
    agents = FakeAgents()
    async with rig_up(tmp_path, agents=agents) as rig:
        handle = await rig.launcher.start(rig.spec(nodes=("", "gpu2")))
        leave_a_process(agents)
        with pytest.raises(LaunchError, match=r"Nomad ended its allocations, but on gpu2 processes of it are left"):
            await rig.launcher.stop(handle, grace_s=1)
        be_away(agents)
        with pytest.raises(LaunchError, match="nobody can say whether something of it is left: node gpu2"):
            await rig.launcher.stop(handle, grace_s=1)
        agents.left, agents.away = FakeAgents().left, ""
        await rig.launcher.stop(handle, grace_s=1)
        assert agents.killed[-1] == "a of vllm-a"


async def test_an_engine_over_nodes_that_nobody_can_look_at_is_refused(rig: Rig) -> None:
    with pytest.raises(LaunchError, match="nobody can look at"):
        await rig.launcher.start(rig.spec(nodes=("", "gpu2")))


async def test_the_double_ends_what_it_started(tmp_path: Path) -> None:
    async with rig_up(tmp_path) as rig:
        await rig.launcher.start(rig.spec(argv=SLEEPER))
        await eventually(lambda: rig.alloc()["ClientStatus"] == "running")
        nomad: NomadDouble = rig.nomad
    assert all(task._ended.done() for tasks in nomad.cluster.tasks.values() for task in tasks.values())
