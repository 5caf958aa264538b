"""The specs themselves: their syntax, their keys, and what no engine's job may lack."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pygohcl
import pytest

from tests.unit.jobs.keys import FILE
from tests.unit.jobs.sites import ROOT, SPECS

PARSED = {path: pygohcl.loads(path.read_text(encoding="utf-8")) for path in SPECS}
ENGINES = [path for path in SPECS if path.name.startswith("engine")]


def job(path: Path) -> dict[str, Any]:
    (found,) = PARSED[path]["job"].values()
    return dict(found)


def tasks(path: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for group, inner in job(path)["group"].items():
        for task, config in inner["task"].items():
            yield group, task, config


def unknown(value: Any, known: Mapping[str, Any] | None, place: str) -> Iterator[str]:
    if isinstance(value, list):
        for one in value:
            yield from unknown(one, known, place)
    elif isinstance(value, dict) and known is not None:
        for key, inner in value.items():
            if key not in known and "*" not in known:
                yield f"{place}.{key}"
            else:
                yield from unknown(inner, known.get(key, known.get("*")), f"{place}.{key}")


def test_the_five_specs_are_there():
    names = {path.name.removesuffix(".nomad.hcl") for path in SPECS}
    assert names == {"agent", "engine", "engine-two-node", "gpu-lease", "rotator"}


@pytest.mark.parametrize("path", SPECS, ids=lambda p: p.name)
def test_every_key_is_one_that_nomad_knows(path: Path):
    assert list(unknown(PARSED[path], FILE, path.name)) == []


def test_a_key_that_nomad_does_not_know_is_seen():
    assert list(unknown({"job": {"x": {"group": {"g": {"counts": 1}}}}}, FILE, "f")) == ["f.job.x.group.g.counts"]


@pytest.mark.parametrize("path", SPECS, ids=lambda p: p.name)
def test_every_variable_is_used_and_every_one_used_is_declared(path: Path):
    text = path.read_text(encoding="utf-8")
    assert set(re.findall(r"\bvar\.(\w+)", text)) == set(PARSED[path]["variable"])
    assert set(re.findall(r"\blocal\.(\w+)", text)) <= set(PARSED[path].get("locals", {}))


@pytest.mark.parametrize("path", SPECS, ids=lambda p: p.name)
def test_mounts_are_given_in_one_way(path: Path):
    """Blocks and a list of them are two keys of the driver: a reader of one would miss the other."""
    for _, _, task in tasks(path):
        assert "mount" not in task["config"]


@pytest.mark.parametrize("path", ENGINES, ids=lambda p: p.name)
def test_an_engine_that_ends_stays_down(path: Path):
    spec = job(path)
    assert spec["reschedule"] == {"attempts": 0, "unlimited": False}
    assert (spec["update"]["auto_revert"], spec["update"]["canary"]) == (False, 0)
    for group in spec["group"].values():
        assert group["restart"] == {"attempts": 0, "mode": "fail"}
        assert group["count"] == 1
        assert (group["disconnect"]["replace"], group["disconnect"]["reconcile"]) == (False, "keep_original")


@pytest.mark.parametrize("path", ENGINES, ids=lambda p: p.name)
def test_no_engine_takes_a_device_and_each_names_its_gpus(path: Path):
    for _, name, task in tasks(path):
        assert "device" not in task["resources"]
        if name in ("vllm", "vram-gate", "vram-drain"):
            assert task["config"]["runtime"] == "nvidia"
    text = path.read_text(encoding="utf-8")
    assert text.count("NVIDIA_VISIBLE_DEVICES") >= 2
    assert '"all"' not in re.sub(r'cap_drop\s*=\s*\["all"\]', "", text)


@pytest.mark.parametrize("path", ENGINES, ids=lambda p: p.name)
def test_an_engines_container_can_write_its_caches_and_nothing_else(path: Path):
    mounts = PARSED[path]["locals"]["mounts"]
    assert '"/root/.cache"' in mounts
    assert '"/tmp"' in mounts
    assert re.search(r"overlay_root}/\$\{file}.*readonly = true", mounts)
    for _, name, task in tasks(path):
        assert task["config"]["readonly_rootfs"] is True
        assert task["config"]["cap_drop"] == ["all"]
        if name == "vllm":
            assert task["config"]["ulimit"]["memlock"] == "-1"


@pytest.mark.parametrize("path", ENGINES, ids=lambda p: p.name)
def test_nobody_shoots_a_sleeping_engine(path: Path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"^\s*check_restart\s*\{", text, re.MULTILINE)
    for _, name, task in tasks(path):
        if "template" in task:
            assert task["template"]["change_mode"] == "noop", name


@pytest.mark.parametrize("path", SPECS, ids=lambda p: p.name)
def test_logs_fit_the_disk_at_their_fullest(path: Path):
    """Nomad's default is ten files of 10 MB for each of two streams, on 300 MB."""
    for group in job(path)["group"].values():
        logs = [task.get("logs", {}) for task in group["task"].values()]
        total = sum(2 * one.get("max_files", 10) * one.get("max_file_size", 10) for one in logs)
        assert total < group["ephemeral_disk"]["size"]


@pytest.mark.parametrize("path", ENGINES, ids=lambda p: p.name)
def test_every_engine_waits_for_vram_before_it_starts(path: Path):
    gates = [task for _, name, task in tasks(path) if name == "vram-gate"]
    assert len(gates) == len(job(path)["group"])
    assert all(gate["lifecycle"] == {"hook": "prestart", "sidecar": False} for gate in gates)
    assert "exit 75" in path.read_text(encoding="utf-8")


def test_two_nodes_drop_the_page_cache_before_a_start():
    path = next(p for p in ENGINES if "two-node" in p.name)
    drops = [task for _, name, task in tasks(path) if name == "cache-drop"]
    assert len(drops) == 2
    assert all(drop["lifecycle"]["hook"] == "prestart" for drop in drops)
    assert "drop_caches" in PARSED[path]["locals"]["drop_caches"]
    assert path.read_text(encoding="utf-8").count('"--headless"') == 1


def test_only_the_lease_takes_devices_and_those_it_names():
    path = next(p for p in SPECS if p.name.startswith("gpu-lease"))
    device = job(path)["group"]["lease"]["task"]["hold"]["resources"]["device"]["nvidia/gpu"]
    assert device["constraint"] == {
        "attribute": "device.ids",
        "operator": "set_contains",
        "value": 'join(",", var.gpu_uuids)',
    }


def test_there_is_never_a_second_rotator_and_it_sees_the_gpus_and_keeps_its_ledger():
    path = next(p for p in SPECS if p.name.startswith("rotator"))
    spec = job(path)
    task = spec["group"]["rotator"]["task"]["rotator"]
    assert spec["update"]["canary"] == 0
    assert spec["group"]["rotator"]["count"] == 1
    assert task["config"]["runtime"] == "nvidia"
    assert '"/var/lib/rotator"' in task["config"]["mounts"]
    assert '"utility"' in task["env"]
    assert task["identity"] == {"env": True}


def test_an_agent_runs_on_each_node_that_is_named_with_the_rights_of_its_unit_and_no_others():
    spec = job(next(p for p in SPECS if p.name.startswith("agent")))
    task = spec["group"]["agent"]["task"]["agent"]
    assert (spec["type"], spec["node_pool"]) == ("system", "all")
    assert spec["constraint"] == {
        "attribute": "node.unique.name",
        "operator": "set_contains_any",
        "value": 'join(",", var.nodes)',
    }
    assert not {"count", "reschedule", "disconnect"} & {*spec, *spec["group"]["agent"]}, "not for system jobs"
    unit = (ROOT / "deploy" / "systemd" / "rotator-agent.service").read_text(encoding="utf-8")
    rights = re.findall(r"CAP_(\w+)", unit.split("CapabilityBoundingSet=")[1].splitlines()[0])
    assert {right.lower() for right in rights} == set(task["config"]["cap_add"])
    assert task["config"]["cap_drop"] == ["all"]
    assert (task["config"]["pid_mode"], task["config"]["network_mode"], task["user"]) == ("host", "host", "root")
