"""What Nomad makes of this project's jobs: pinned by hash of text and variables, fit to be rotated, started whole."""

import json
from pathlib import Path
from typing import Any

import pytest

from rotator.adapters.nomad_files import JobText
from rotator.adapters.nomad_job import engine_tasks, job_problems
from rotator.ports import JobSpec, LaunchSpec
from tests.contract.nomad.rig import rig_up
from tests.nomad_double.golden import FOLDER, golden_key, project_jobs
from tests.nomad_double.hcl import HclError
from tests.nomad_double.jobspec import duration_ns, read_job

JOBS = {name: (hcl, variables) for name, _, hcl, variables in project_jobs()}
ENGINES = sorted(name for name in JOBS if name.startswith("vllm-"))


@pytest.mark.parametrize("name", sorted(JOBS))
def test_a_jobs_parse_is_the_golden_one(name: str) -> None:
    golden = json.loads((FOLDER / f"{name}.json").read_text())
    assert golden["key"] == golden_key(*JOBS[name]), (
        "text or variables have changed: python -m tests.nomad_double.golden"
    )
    assert golden["job"] == read_job(*JOBS[name])


@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_job_is_fit_to_be_rotated(name: str) -> None:
    job = read_job(*JOBS[name])
    port = int(next(line for line in JOBS[name][1].splitlines() if line.startswith("port = ")).split()[-1])
    assert job_problems(job, port=port) == ()
    assert set(engine_tasks(job).values()) == {"vllm"}


@pytest.mark.parametrize("name", ENGINES)
async def test_every_engine_job_starts_and_stops_as_it_is_rendered(tmp_path: Path, name: str) -> None:
    hcl, variables = JOBS[name]
    job = read_job(hcl, variables)
    async with rig_up(tmp_path, namespace=job["Namespace"], render=lambda *_: JobText(hcl, variables)) as rig:
        ports = [p["Value"] for g in job["TaskGroups"] for n in g["Networks"] or () for p in n["ReservedPorts"] or ()]
        made = JobSpec(site="site.yaml", name="e")
        spec = LaunchSpec("e", "nomad", (), {}, f"http://127.0.0.1:{ports[0]}", "", job=made)
        handle = await rig.launcher.start(spec)
        assert len(handle.ref["allocs"]) == len(job["TaskGroups"])
        await rig.launcher.stop(handle, grace_s=1)
        assert await rig.launcher.find(spec, None) is None


# -- the reading -----------------------------------------------------------------------------------------------------


def value(expression: str, **variables: Any) -> Any:
    declared = "".join(f'variable "{name}" {{ type = any }}\n' for name in variables)
    given = "".join(f"{name} = {json.dumps(v)}\n" for name, v in variables.items())
    hcl = f'{declared}job "x" {{\n group "g" {{\n task "t" {{\n config {{\n v = {expression}\n}}\n}}\n}}\n}}\n'
    return read_job(hcl, given)["TaskGroups"][0]["Tasks"][0]["Config"]["v"]


@pytest.mark.parametrize(
    ("expression", "read"),
    [
        ('"a\\tb $${c} %%{d}"', "a\tb ${c} %{d}"),
        ('"${node.unique.name} ${NOMAD_PORT_http}"', "${node.unique.name} ${NOMAD_PORT_http}"),
        ('"${var.n}"', 3),
        ('"<${var.n}>"', "<3>"),
        ("var.n * 2 + 1", 7),
        ('var.n > 2 ? "many" : "few"', "many"),
        ('concat(["a"], [for x in var.l : "${x}!" if x != "b"])', ["a", "c!"]),
        ("{ for k, v in var.m : v => k }", {"1": "x"}),
        ('merge(var.m, { y = "2", "z" : 3 })', {"x": "1", "y": "2", "z": 3}),
        ('join("-", var.l)', "b-c"),
        ("var.l[1]", "c"),
        ("<<-EOT\n  a ${var.n}\n    b\n  EOT", "a 3\n  b\n"),
    ],
)
def test_expressions_are_read_as_hcl_reads_them(expression: str, read: Any) -> None:
    assert value(expression, n=3, l=["b", "c"], m={"x": "1"}) == read


@pytest.mark.parametrize(
    ("hcl", "words"),
    [
        ('job "x" {\n tpye = "service"\n}\n', 'Unsupported argument; An argument named "tpye"'),
        ('job "x" {\n gruop "g" {\n }\n}\n', 'Unsupported block type; Blocks of type "gruop"'),
        ('job "x" {\n meta = { a = var.b }\n}\n', 'does not have an attribute named "b"'),
        ('job "x" {\n meta = { a = nosuch(1) }\n}\n', 'no function named "nosuch"'),
        ("", "A job block is required"),
    ],
)
def test_what_a_job_may_not_hold_is_refused(hcl: str, words: str) -> None:
    with pytest.raises(HclError, match=words):
        read_job(hcl, "")


def test_a_value_for_no_variable_is_refused() -> None:
    with pytest.raises(HclError, match='A "b" variable was set but was not found'):
        read_job('job "x" {\n}\n', 'b = "1"\n')


@pytest.mark.parametrize(("text", "ns"), [("1h30m", 5_400 * 10**9), ("250ms", 250 * 10**6), ("0s", 0)])
def test_durations_are_nanoseconds(text: str, ns: int) -> None:
    assert duration_ns(text) == ns


def test_a_duration_without_a_unit_is_refused() -> None:
    with pytest.raises(HclError, match="invalid duration"):
        duration_ns("30")
