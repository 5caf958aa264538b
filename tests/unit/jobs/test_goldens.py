"""Our specs as Nomad's own parser understands them (``parsed.py`` keeps its answers)."""

from typing import Any

import pytest

from rotator.jobs.lint import lint_job
from rotator.jobs.view import command
from tests.unit.jobs.parsed import kept, key, made

MADE = made()


def parsed(name: str) -> dict[str, Any]:
    return kept(MADE[name])[1]


def task(name: str, group: str, which: str) -> dict[str, Any]:
    groups = {g["Name"]: g for g in parsed(name)["TaskGroups"]}
    return next(dict(t) for t in groups[group]["Tasks"] if t["Name"] == which)


@pytest.mark.parametrize("name", MADE)
def test_nomads_parser_has_seen_the_spec_and_the_variables_of_today(name: str):
    one = MADE[name]
    assert kept(one)[0] == key(one), "spec or variables changed: ask a Nomad, by python -m tests.unit.jobs.parsed"
    job = parsed(name)
    assert (job["ID"], job["Name"], job["Namespace"]) == (one.job_id, one.job_id, "models")


def test_the_words_that_the_lint_judges_are_those_that_nomad_will_run():
    for name, group, rank in (("one", "engine", 0), ("two", "head", 0), ("two", "worker", 1)):
        config = task(name, group, "vllm")["Config"]
        assert [*config["entrypoint"], *config["args"]] == list(command(MADE[name], rank=rank)), (name, group)


@pytest.mark.parametrize("name", ["one", "two"])
def test_what_nomad_parsed_passes_the_lint_but_for_the_clients_own_setting(name: str):
    assert {f.rule for f in lint_job(parsed(name), file="parsed")} == {"kill-timeout"}


def test_a_template_in_an_argument_stands_for_itself():
    args = task("one", "engine", "vllm")["Config"]["args"]
    assert args[args.index("--override") + 1] == 'a "quoted" ${template} and %{more}'


def test_mounts_come_out_with_the_overlay_read_only_and_the_cache_writable():
    mounts = {m["target"]: m for m in task("one", "engine", "vllm")["Config"]["mounts"]}
    assert mounts["/opt/vllm/vllm/device_allocator/cumem.py"] == {
        "type": "bind",
        "source": "/srv/overlays/abc/cumem.py",
        "target": "/opt/vllm/vllm/device_allocator/cumem.py",
        "readonly": True,
    }
    assert mounts["/models/current"]["readonly"] is True
    assert "readonly" not in mounts["/root/.cache"]
    assert mounts["/spill"]["source"] == "/srv/masters/one"
    assert mounts["/tmp"]["tmpfs_options"] == {"size": 8192 << 20}


def test_the_environment_names_gpus_engine_and_dev_mode_over_what_a_recipe_says():
    env = task("one", "engine", "vllm")["Env"]
    assert env["NVIDIA_VISIBLE_DEVICES"] == "GPU-a,GPU-b"
    assert (env["ROTATOR_ENGINE"], env["VLLM_SERVER_DEV_MODE"], env["PLAIN"]) == ("one", "1", "1")
    assert task("two", "worker", "vllm")["Env"]["VLLM_HOST_IP"] == "10.0.0.2"
    assert task("two", "worker", "vllm")["Env"]["NCCL_IB_DISABLE"] == "0"


def test_an_engine_stays_down_and_no_task_takes_a_device():
    for name in ("one", "two"):
        for group in parsed(name)["TaskGroups"]:
            assert (group["RestartPolicy"]["Attempts"], group["RestartPolicy"]["Mode"]) == (0, "fail")
            assert (group["ReschedulePolicy"]["Attempts"], group["ReschedulePolicy"]["Unlimited"]) == (0, False)
            assert not any(t["Resources"]["Devices"] for t in group["Tasks"])


def test_the_worker_is_healthy_when_it_runs_and_the_head_when_it_answers():
    groups = {g["Name"]: g for g in parsed("two")["TaskGroups"]}
    assert groups["head"]["Update"]["HealthCheck"] == "checks"
    assert groups["worker"]["Update"]["HealthCheck"] == "task_states"
    assert not groups["worker"]["Services"]


def test_the_lease_takes_the_gpus_that_it_names():
    (device,) = task("gpu-lease@box", "lease", "hold")["Resources"]["Devices"]
    assert (device["Name"], device["Count"]) == ("nvidia/gpu", 2)
    assert device["Constraints"] == [{"LTarget": "${device.ids}", "RTarget": "GPU-a,GPU-b", "Operand": "set_contains"}]


def test_a_recipe_file_is_looked_for_beside_the_site_file():
    assert MADE["one"].values["recipe"] == "fixed"
