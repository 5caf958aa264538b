"""Engines on one node and on two have specs that repeat each other, as HCL has no includes: both say the same."""

import re
from typing import Any

import pytest

from tests.unit.jobs.sites import SPECS
from tests.unit.jobs.test_specs import PARSED, job

ONE, HEAD, WORKER = "engine", "head", "worker"
# What is a node's own: its GPU, its part of the command line, its way to the other node.
APART = {
    "vram-gate": {"config.args", "env.NVIDIA_VISIBLE_DEVICES"},
    "vllm": {"config.args", "config.devices", "env"},
    "cache-drop": set[str](),
}


SINGLE, DOUBLE = (next(p for p in SPECS if p.name == f"{name}.nomad.hcl") for name in (ONE, "engine-two-node"))


def group(name: str) -> dict[str, Any]:
    return dict(job(SINGLE if name == ONE else DOUBLE)["group"][name])


def flat(value: Any, place: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {place: value}
    return {k: v for key, inner in value.items() for k, v in flat(inner, f"{place}.{key}".lstrip(".")).items()}


def shared(name: str, task: str) -> dict[str, Any]:
    """A group's task without what may differ."""
    found = flat(group(name)["task"][task])
    return {k: v for k, v in found.items() if k not in APART[task] and not k.startswith("template.")}


@pytest.mark.parametrize("task", ["cache-drop", "vram-gate", "vllm"])
def test_head_and_worker_have_the_same_task(task: str):
    assert shared(HEAD, task) == shared(WORKER, task)


@pytest.mark.parametrize("task", ["vram-gate", "vllm"])
def test_an_engine_on_two_nodes_has_the_task_of_an_engine_on_one(task: str):
    assert shared(HEAD, task) == shared(ONE, task)


def test_an_engine_gets_its_secrets_in_the_same_way_on_two_nodes():
    assert group(HEAD)["task"]["vllm"]["template"] == group(ONE)["task"]["vllm"]["template"]


def test_groups_end_disconnect_and_listen_alike():
    for key in ("restart", "disconnect", "ephemeral_disk"):
        assert group(ONE)[key] == group(HEAD)[key] == group(WORKER)[key], key
    assert group(ONE)["service"] == group(HEAD)["service"]
    ports = {name: group(name)["network"].get("port", {}) for name in (ONE, HEAD)}
    assert ports[ONE]["http"] == ports[HEAD]["http"]


def test_jobs_of_one_node_and_of_two_roll_alike():
    one, two = job(SINGLE), job(DOUBLE)
    for key in ("type", "datacenters", "meta", "reschedule"):
        assert one[key] == two[key], key
    updates = [{k: v for k, v in spec["update"].items() if k != "health_check"} for spec in (one, two)]
    assert updates[0] == updates[1]


def settings_in(expression: str) -> dict[str, str]:
    """NAME = value of an environment that is merged from several."""
    return dict(re.findall(r"\b([A-Z][A-Z_]+) = (\S+)", expression))


def test_an_engine_on_two_nodes_has_the_environment_of_one_and_its_link_beside():
    one = settings_in(group(ONE)["task"]["vllm"]["env"])
    both = settings_in(PARSED[DOUBLE]["locals"]["env"])
    assert one.pop("NVIDIA_VISIBLE_DEVICES") == "local.gpus"
    assert {k: v for k, v in both.items() if not k.startswith("NCCL_")} == one
    for name in (HEAD, WORKER):
        own = group(name)["task"]["vllm"]["env"]
        assert own.startswith(f"merge(local.env, var.{name}_env, ")
        assert settings_in(own) == {"NVIDIA_VISIBLE_DEVICES": f"var.{name}_gpu"}


def test_files_are_mounted_alike_but_for_masters_on_disk():
    spill = r'\[ ?for dir in \[ ?var\.spill_dir ?\].*?if dir != "" ?\], '
    one, two = (PARSED[path]["locals"]["mounts"] for path in (SINGLE, DOUBLE))
    assert re.sub(spill, "", one) == two != one


def test_the_command_line_begins_alike_and_sets_the_same_sizes():
    one, two = group(ONE)["task"]["vllm"]["config"]["args"], PARSED[DOUBLE]["locals"]["args"]
    begin, _, rest = one.partition('"--host"')
    assert two.startswith(begin)
    for name in (HEAD, WORKER):
        assert group(name)["task"]["vllm"]["config"]["args"].startswith("concat(local.args, ")
    assert rest.split(", ]")[0] in group(HEAD)["task"]["vllm"]["config"]["args"]


def test_the_gates_wait_alike_for_what_each_can_see():
    """VRAM by nvidia-smi, or host memory where both are one. After its tries a gate ends with 75, a drain with 0."""
    one, two = PARSED[SINGLE]["locals"]["wait_for_vram"], PARSED[DOUBLE]["locals"]["wait_for_memory"]
    told = [re.sub(r"free=\$\(.*\)|VRAM|memory", "…", text).split() for text in (one, two)]
    assert [*told[0], "exit", "75"] == told[1]
    tasks = group(ONE)["task"]
    assert tasks["vram-gate"]["config"]["args"] == ["local.wait_for_vram\nexit 75"]
    assert tasks["vram-drain"]["config"]["args"] == ["local.wait_for_vram\nexit 0"]


def test_the_drain_after_an_engine_is_the_gate_before_it_but_for_its_moment_and_its_patience():
    gate, drain = (flat(group(ONE)["task"][task]) for task in ("vram-gate", "vram-drain"))
    assert {k for k in gate if gate[k] != drain[k]} == {"lifecycle.hook", "config.args", "env.TRIES"}
    assert gate.keys() == drain.keys()
