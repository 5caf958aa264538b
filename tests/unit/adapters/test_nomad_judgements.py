"""What is concluded from what Nomad says: no socket, no clock."""

from typing import Any

import pytest

from rotator.adapters.cudalog import cuda_errors, evidence
from rotator.adapters.nomad_job import (
    Life,
    engine_tasks,
    job_problems,
    judge,
    marked,
    marked_like,
    stranger,
    var_file,
)
from rotator.adapters.nomad_words import diff_lines, end_words, placement_words
from tests.nomad_double.diff import job_diff
from tests.nomad_double.sample import sample_job


def alloc(id: str = "aaaaaaaa-1", status: str = "running", **more: Any) -> dict[str, Any]:
    return {"ID": id, "NodeName": "gpu1", "ClientStatus": status, "DesiredStatus": "run", "TaskStates": None, **more}


# -- variables -------------------------------------------------------------------------------------------------------


def test_variables_become_hcl_literals_sorted_by_name():
    made = var_file({"b": ["x", 1], "a": "say ${no} %{way}", "c": {"k": True}, "d": None})
    assert made == 'a = "say $${no} %%{way}"\nb = ["x", 1]\nc = {"k" = true}\nd = null\n'


# -- may it be run ---------------------------------------------------------------------------------------------------


def broken(**group: Any) -> dict[str, Any]:
    job = sample_job()
    job["TaskGroups"][0].update(group)
    return job


def test_a_fit_job_has_no_problems():
    assert job_problems(sample_job(), port=8001) == ()


@pytest.mark.parametrize(
    ("job", "words"),
    [
        (broken(Count=2), "set count = 1"),
        (broken(RestartPolicy=None), 'set restart { attempts = 0  mode = "fail" }'),
        (broken(RestartPolicy={"Attempts": 0, "Mode": "delay"}), "set restart"),
        (broken(ReschedulePolicy={"Attempts": 0, "Unlimited": True}), "set reschedule"),
        (broken(ReschedulePolicy=None), "set reschedule"),
        (sample_job(Update={"AutoRevert": True}), "update.auto_revert would start an old version"),
        (sample_job(port=8002), "listens on 8002, not on the fleet file's port 8001"),
        (sample_job(Type="batch"), 'type is "batch"'),
    ],
)
def test_a_job_that_nomad_would_start_behind_the_services_back_is_refused(job: dict[str, Any], words: str):
    [problem] = job_problems(job, port=8001)
    assert words in problem


def test_the_engines_task_is_the_one_without_a_lifecycle_unless_it_is_named():
    job = sample_job()
    gate, side = {"Name": "gate", "Lifecycle": {"Hook": "prestart"}}, {"Name": "side", "Lifecycle": None}
    job["TaskGroups"][0]["Tasks"] = [gate, *job["TaskGroups"][0]["Tasks"], side]
    assert engine_tasks(job) == {"engine": "vllm"}
    assert engine_tasks(job, "side") == {"engine": "side"}
    assert engine_tasks(job, "nobody") == {"engine": "vllm"}


def test_each_launch_is_another_version_and_drift_leaves_that_out():
    first = marked(sample_job(note="x"), engine="a", service="s", launch="1")
    second = marked(sample_job(note="x"), engine="a", service="s", launch="2")
    assert job_diff(first, second)["Type"] == "Edited"
    assert diff_lines(job_diff(first, second)) == ()
    assert job_diff(first, marked_like(sample_job(note="x"), first))["Type"] == "None"
    assert diff_lines(job_diff(first, marked_like(sample_job(note="y"), first)))[0].startswith("Meta[note]: x -> y")


@pytest.mark.parametrize(
    ("meta", "whose"),
    [
        ({"rotator_service": "s", "rotator_engine": "a"}, None),
        ({}, None),
        ({"rotator_service": "other"}, "another rotation service"),
        ({"rotator_service": "s", "rotator_engine": "b"}, "that of engine 'b'"),
    ],
)
def test_whose_a_registered_job_is_stands_in_its_meta(meta: dict[str, str], whose: str | None):
    found = stranger({"ID": "x", "Meta": meta}, engine="a", service="s")
    assert (found is None) if whose is None else whose in str(found)


# -- does it live ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("allocs", "life", "words"),
    [
        ([alloc()], Life.ALIVE, ""),
        ([alloc(status="pending")], Life.ALIVE, ""),
        ([alloc(status="failed", ClientDescription="Failed tasks")], Life.ENDED, "is failed (Failed tasks)"),
        ([alloc(status="complete")], Life.ENDED, "is complete"),
        ([alloc(status="lost")], Life.UNCERTAIN, "node gpu1 is down for Nomad"),
        ([], Life.UNCERTAIN, "has forgotten allocation aaaaaaaa"),
        ([alloc("another", "failed")], Life.UNCERTAIN, "has forgotten"),
        ([alloc(status="unknown")], Life.ALIVE, "disconnected from Nomad"),
        ([alloc(DesiredTransition={"Migrate": True})], Life.ALIVE, "gpu1 is being drained: Nomad will end"),
        ([alloc(DesiredStatus="stop", DesiredDescription="alloc not needed")], Life.ALIVE, "alloc not needed"),
    ],
)
def test_an_engine_has_ended_only_where_nomad_saw_it_end(allocs: list[dict[str, Any]], life: Life, words: str):
    verdict = judge(allocs, ["aaaaaaaa-1"])
    assert verdict.life is life
    assert (words in verdict.words) if words else verdict.words == ""


def test_an_engine_of_several_ranks_has_ended_with_the_first_of_them():
    both = [alloc("aaaaaaaa-1"), alloc("bbbbbbbb-1", "failed")]
    assert judge(both, ["aaaaaaaa-1", "bbbbbbbb-1"]).life is Life.ENDED
    assert judge(both, ["aaaaaaaa-1"]).life is Life.ALIVE


def test_an_end_names_the_task_that_failed_and_the_kernels_part_in_it():
    events = [
        {"Type": "Started", "DisplayMessage": "Task started by client"},
        {"Type": "Terminated", "DisplayMessage": "Exit Code: 137", "Details": {"oom_killed": "true"}},
    ]
    states = {
        "vllm": {"State": "dead", "Failed": True, "Events": events},
        "vram-gate": {
            "State": "dead",
            "Failed": False,
            "Events": [{"Type": "Terminated", "DisplayMessage": "Exit Code: 0"}],
        },
    }
    words = end_words(alloc(status="failed", TaskStates=states))
    assert (
        "task 'vllm': Task started by client | Exit Code: 137 (the kernel killed it: out of its memory limit)" in words
    )
    assert "vram-gate" not in words


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        ({"NodesEvaluated": 0, "NodesAvailable": None}, "no node is there for it"),
        ({"NodesEvaluated": 2, "ConstraintFiltered": {"${attr.x} = 1": 2}}, "2 of its nodes lack '${attr.x} = 1'"),
        ({"NodesEvaluated": 1, "DimensionExhausted": {"memory": 1}}, "1 nodes are too full: memory"),
        ({"NodesEvaluated": 3, "NodesAvailable": {"dc1": 1}}, "3 nodes were looked at, 1 available, none fits"),
        ({"NodesEvaluated": 1, "QuotaExhausted": ["gpu"]}, "quota: gpu"),
    ],
)
def test_a_failed_placement_says_what_is_lacking(metric: dict[str, Any], words: str):
    assert placement_words({"engine": metric}).startswith(f"group 'engine': {words}")


def test_a_group_that_comes_or_goes_is_a_line_of_its_own():
    two = sample_job()
    two["TaskGroups"].append({**two["TaskGroups"][0], "Name": "worker"})
    assert "group worker: added" in diff_lines(job_diff(sample_job(), two))
    assert "group worker: deleted" in diff_lines(job_diff(two, sample_job()))


# -- logs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "RuntimeError: CUDA error: an illegal memory access was encountered",
        "CUDA driver error: out of memory",
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB",
        "cuMemMap failed: CUDA_ERROR_INVALID_VALUE",
        "cudaErrorLaunchFailure: unspecified launch failure",
        "CUBLAS_STATUS_EXECUTION_FAILED when calling cublasGemmEx",
        "[rank3] NCCL WARN Cuda failure 'invalid argument'",
        "NVRM: Xid (PCI:0000:17:00): 79, pid=1234",
    ],
)
def test_errors_of_the_driver_and_its_libraries_are_found(line: str):
    assert cuda_errors(f"INFO all is well\n{line}\n") == (line,)


@pytest.mark.parametrize(
    "line", ["INFO CUDA graphs captured", "using CUBLAS_STATUS_SUCCESS", "NCCL INFO Channel 00", "cuda errors: 0 seen"]
)
def test_what_only_sounds_like_it_is_left_alone(line: str):
    assert cuda_errors(line) == ()


def test_ranks_that_repeat_each_other_are_told_once():
    text = "\n".join(f"(TP{rank} pid={rank}00) CUDA error: device-side assert triggered" for rank in range(8))
    assert len(cuda_errors(text)) == 1


def test_evidence_begins_with_the_error_and_ends_with_the_last_words():
    text = "CUDA error: unknown\n" + "\n".join(f"line {i}" for i in range(9))
    assert evidence(text) == "CUDA: CUDA error: unknown; last log lines: line 4 | line 5 | line 6 | line 7 | line 8"
    assert evidence("") == ""
