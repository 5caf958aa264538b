"""``rotator jobs plan|diff|run`` on the wire: specs parsed as by Nomad, registered in turn, compared, refused."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from rotator.adapters.nomad_access import NomadAccess
from rotator.adapters.nomad_client import NomadClient
from rotator.adapters.nomad_job import engine_tasks, job_problems
from rotator.cli import jobs_nomad
from rotator.cli.main import run
from tests.nomad_double import NomadDouble
from tests.unit.jobs.parsed import FIXED, kept, made
from tests.unit.jobs.sites import EXAMPLE

Command = Callable[..., Awaitable[int]]


@pytest.fixture
async def nomad(tmp_path: Path) -> AsyncIterator[NomadDouble]:
    async with NomadDouble(tmp_path, token="let-me-in") as double:
        for one in made().values():
            double.teach(one.hcl, one.variables, kept(one)[1])
        yield double


@pytest.fixture
def jobs(nomad: NomadDouble, monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.setenv("NOMAD_ADDR", nomad.address)
    monkeypatch.setenv("NOMAD_NAMESPACE", "models")
    monkeypatch.setenv("NOMAD_TOKEN", "let-me-in")
    monkeypatch.setattr(jobs_nomad, "POLL_S", 0.02)

    async def command(*arguments: str, site: Path = FIXED) -> int:
        return await asyncio.to_thread(run, ["jobs", *arguments, "--site", str(site)])

    return command


async def test_jobs_are_registered_one_after_another_and_then_nothing_differs(
    jobs: Command, nomad: NomadDouble, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await jobs("diff") == 1
    assert "vllm-one): is not registered" in capsys.readouterr().out
    assert await jobs("run", "--deadline", "20") == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said] == [
        "gpu-lease@box (gpu-lease-box)",
        "one (vllm-one)",
        "two (vllm-two)",
        "rotator (rotator)",
    ]
    assert all("registered and healthy after" in line for line in said)
    registered = [path for path in nomad.asked if path.startswith("POST /v1/job/") and not path.endswith("/plan")]
    assert registered == [f"POST /v1/job/{n}" for n in ("gpu-lease-box", "vllm-one", "vllm-two", "rotator")]
    assert await jobs("diff") == 0
    assert await jobs("run") == 0
    assert capsys.readouterr().out.count("is as registered") == 8


async def test_agents_of_all_nodes_are_one_system_job(
    jobs: Command, nomad: NomadDouble, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("NOMAD_NAMESPACE")
    assert await jobs("run", "agents", "--deadline", "20", site=EXAMPLE) == 0
    assert "agents (rotator-agent): registered and healthy" in capsys.readouterr().out
    job = nomad.cluster.jobs["rotator-agent"]
    (wanted,) = job["Constraints"]
    assert (job["Type"], wanted["Operand"], wanted["RTarget"]) == ("system", "set_contains_any", "spark1,spark2")
    assert job["TaskGroups"][0]["Tasks"][0]["Config"]["args"] == ["agent", "-c", "/etc/rotator/agent.yaml"]
    assert await jobs("diff", "agents", site=EXAMPLE) == 0


async def test_what_was_changed_behind_the_site_file_is_shown(
    jobs: Command, nomad: NomadDouble, capsys: pytest.CaptureFixture[str]
) -> None:
    await jobs("run", "one")
    async with NomadClient(NomadAccess(nomad.address, namespace="models", token="let-me-in")) as client:
        job = await client.job("vllm-one")
        assert job is not None
        index = job["JobModifyIndex"]
        job["Meta"] = {**job["Meta"], "overlays": "/srv/overlays/old", "rotator_engine": "one"}
        await client.register(job, modify_index=index)
    capsys.readouterr()
    assert await jobs("diff", "one", "--json") == 1
    (outcome,) = json.loads(capsys.readouterr().out)
    (line,) = outcome["lines"]
    assert line.startswith("Meta[overlays]: /srv/overlays/old -> /srv/overlays/abc")
    assert await jobs("run", "one") == 0
    async with NomadClient(NomadAccess(nomad.address, namespace="models", token="let-me-in")) as client:
        job = await client.job("vllm-one")
    assert job is not None
    assert job["Meta"]["rotator_engine"] == "one", "the service's own mark stays"
    assert job["Meta"]["overlays"] == "/srv/overlays/abc"


async def test_the_first_job_that_fails_ends_the_run(
    jobs: Command, nomad: NomadDouble, capsys: pytest.CaptureFixture[str]
) -> None:
    nomad.cluster.deployments_fail = True
    assert await jobs("run", "one", "rotator", "--deadline", "20") == 5
    said = capsys.readouterr().out
    assert "its deployment ended: Failed due to progress deadline" in said
    assert "rotator (): not begun: an earlier job failed" in said
    assert "POST /v1/job/rotator" not in nomad.asked


async def test_a_refused_token_and_a_lost_leader_have_their_exit_codes(
    jobs: Command, nomad: NomadDouble, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nomad.leaderless = True
    assert await jobs("plan", "one") == 3
    nomad.leaderless = False
    monkeypatch.setenv("NOMAD_TOKEN", "wrong")
    assert await jobs("plan", "one") == 4
    assert "token" in capsys.readouterr().err


async def test_somebody_elses_registration_in_between_is_not_overwritten(
    jobs: Command, nomad: NomadDouble, capsys: pytest.CaptureFixture[str]
) -> None:
    await jobs("run", "one")
    async with NomadClient(NomadAccess(nomad.address, namespace="models", token="let-me-in")) as client:
        await client.stop_job("vllm-one")
    nomad.conflicts = 1
    assert await jobs("run", "one") == 4
    assert "somebody" in capsys.readouterr().err


async def test_a_file_of_ones_own_is_parsed_by_nomad_and_then_judged(
    jobs: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = made()["one"]
    spec, variables = tmp_path / "mine.hcl", tmp_path / "vars.hcl"
    spec.write_text(one.hcl)
    variables.write_text(one.variables)
    assert await jobs("lint", "--nomad", "--file", str(spec)) == 4
    assert "give the job's variables with --var-file" in capsys.readouterr().err
    assert await jobs("lint", "--nomad", "--file", str(spec), "--var-file", str(variables)) == 0
    assert "0 errors, 1 warnings" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "port"), [("one", 8501), ("two", 8502)])
def test_the_launcher_takes_our_engines_for_engines(name: str, port: int) -> None:
    job = kept(made()[name])[1]
    assert job_problems(job, port=port) == ()
    assert set(engine_tasks(job).values()) == {"vllm"}


async def test_a_job_without_a_place_is_told_and_not_registered(
    jobs: Command, nomad: NomadDouble, capsys: pytest.CaptureFixture[str]
) -> None:
    nomad.cluster.no_place = {"NodesEvaluated": 0, "NodesAvailable": {}}
    assert await jobs("plan", "one") == 1
    assert "Nomad has no place for it: group 'engine': no node is there for it" in capsys.readouterr().out
    assert await jobs("run", "one") == 5
    assert "POST /v1/job/vllm-one" not in nomad.asked


async def test_a_job_that_is_not_healthy_in_time_is_told_and_one_may_not_wait(
    jobs: Command, nomad: NomadDouble, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def none_yet(*_: object) -> None:
        return None

    monkeypatch.setattr(NomadClient, "deployment", none_yet)
    assert await jobs("run", "one", "--deadline", "1") == 5
    assert "registered, but not healthy within 1 s: no deployment yet" in capsys.readouterr().out
    assert await jobs("run", "rotator", "--no-wait") == 0
    assert capsys.readouterr().out == "rotator (rotator): registered\n"
