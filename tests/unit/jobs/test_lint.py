"""Every rule once refused and once let pass: in a site's engines, and in jobs that others wrote."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from rotator.jobs import JobsError, Site, load_site
from rotator.jobs.known_broken import KnownBroken, Situation, When, applies, known_broken, match
from rotator.jobs.lint import lint_job, lint_site, read_job
from rotator.jobs.view import Facts
from tests.unit.jobs.sites import EXAMPLE, SPECS, changed, site_data

DIGEST = "@sha256:" + "1" * 64


def rules(site: Site, *only: str) -> set[str]:
    return {f.rule for f in lint_site(site, only)}


# -- a site's engines ------------------------------------------------------------------------------------------------

SITE_CASES: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    # rule, engine, what breaks, what does not
    ("gpu-count", "dsv4-flash", {"tensor_parallel": 2}, {"tensor_parallel": 2, "pipeline_parallel": 2}),
    ("dsv4-kv-fp8", "dsv4-flash", {"args": {"--kv-cache-dtype": "auto"}}, {"args": {"--kv-cache-dtype": "fp8_e4m3"}}),
    ("dsv4-kv-fp8", "dsv4-flash", {"args": {"--kv-cache-dtype": None}}, {}),
    (
        "dsv4-eager",
        "dsv4-flash",
        {"args": {"--enforce-eager": True}},
        {"args": {"--enforce-eager": True}, "why": {"--enforce-eager": "to find a hang"}},
    ),
    (
        "fork",
        "dsv4-flash",
        {"env": {"VLLM_WORKER_MULTIPROC_METHOD": "fork"}},
        {"env": {"VLLM_WORKER_MULTIPROC_METHOD": "spawn"}},
    ),
    ("level-2", "glm-5.1", {"sleep_levels": [1, 2]}, {"sleep_levels": [1]}),
    ("kv-offload", "glm-5.1", {"args": {"--kv-offloading-size": 64}}, {"args": {"--kv-cache-memory-bytes": 64}}),
    (
        "kv-offload",
        "glm-5.1",
        {"args": {"--kv-transfer-config": {"kv_connector": "OffloadingConnector"}}},
        {"args": {"--kv-transfer-config": {"kv_connector": "LMCacheConnectorV1"}}},
    ),
    (
        "expandable-segments",
        "glm-5.1",
        {"env": {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments: True"}},
        {"env": {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"}},
    ),
    ("api-servers", "nemotron-omni", {"args": {"--api-server-count": 2}}, {"args": {"--api-server-count": 1}}),
    ("gpu-share", "glm-5.1", {"args": {"--gpu-memory-utilization": 90}}, {"args": {"--gpu-memory-utilization": 1.0}}),
    ("gpu-share", "glm-5.1", {"args": {"--gpu-memory-utilization": 0}}, {}),
    ("vram-gate", "glm-5.1", {"free_mib": 97_888}, {"free_mib": 97_887}),
    ("memory-masters", "dsv4-flash", {"memory_mib": 120_000}, {"memory_mib": 170_000}),
    ("memory-node", "glm-5.1", {"memory_mib": 1_600_000}, {"memory_mib": 330_000}),
    ("kill-timeout", "glm-5.1", {"kill_timeout_s": 301}, {"kill_timeout_s": 300}),
    ("ports", "glm-5.1", {"port": 8501}, {"port": 8599}),
    ("ports", "glm-5.1", {"port": 8400}, {}),
    ("ports", "dsv4-flash-spark", {"master_port": 8510}, {}),
    ("known-broken/pipeline-parallel-sleep", "dsv4-flash", {"tensor_parallel": 2, "pipeline_parallel": 2}, {}),
    (
        "known-broken/dsv4-mega-moe-sm12x",
        "dsv4-flash",
        {"args": {"--moe-backend": "deep_gemm_mega_moe"}},
        {"args": {"--moe-backend": "marlin"}},
    ),
    (
        "known-broken/dsv4-fp4-indexer-sm12x",
        "dsv4-flash",
        {"args": {"--attention_config.use_fp4_indexer_cache": "True"}},
        {},
    ),
    (
        "known-broken/dsv4-nvfp4-expert-parallel",
        "dsv4-flash-nvfp4",
        {"args": {"--enable-expert-parallel": True}},
        {},
    ),
    ("known-broken/nemotron-rtx-pro-moe", "nemotron-omni", {"args": {"--moe-backend": None}}, {}),
    (
        "known-broken/dsv4-breakable-graphs-sm121",
        "dsv4-flash-spark",
        {"env": {"VLLM_USE_BREAKABLE_CUDAGRAPH": "1"}},
        {"env": {"VLLM_USE_BREAKABLE_CUDAGRAPH": "0"}},
    ),
    ("unified-memory", "dsv4-flash-spark", {"why": {}}, {}),
    ("memory-sum", "glm-5.1", {"memory_mib": 600_000}, {}),
]


@pytest.mark.parametrize(("rule", "engine", "bad", "good"), SITE_CASES)
def test_a_sites_engine_is_refused_for_it_and_let_pass_without(
    rule: str, engine: str, bad: dict[str, Any], good: dict[str, Any]
):
    assert rule in rules(changed(engine, **bad), engine)
    assert rule not in rules(changed(engine, **good), engine)


def with_image(**changes: Any) -> Site:
    data = site_data()
    data["images"]["vllm"] = {**data["images"]["vllm"], **changes}
    return Site.model_validate(data)


def test_an_image_named_by_tag_is_refused():
    assert "image-digest" in rules(with_image(ref="vllm/vllm-openai:v0.26.0"), "glm-5.1")
    assert "image-digest" in rules(with_image(ref="vllm/vllm-openai@sha256:12"), "glm-5.1")


def test_a_rotator_an_agent_or_a_lease_named_by_tag_is_refused_too():
    data = site_data()
    data["rotator"]["image"] = data["agents"]["image"] = data["lease"]["image"] = "some/image:latest"
    found = [f.place for f in lint_site(Site.model_validate(data)) if f.rule == "image-digest"]
    assert found == ["job 'gpu-lease@box'", "job 'agents'", "job 'rotator'"]


@pytest.mark.parametrize("version", ["0.20.0", "0.20.2", "0.20.2rc1.dev3+gabc"])
def test_vllm_0_20_is_refused_on_sm120_with_more_than_one_rank_and_nowhere_else(version: str):
    site = with_image(vllm=version)
    assert "known-broken/nccl-sm120-0.20" in rules(site, "glm-5.1")
    assert "known-broken/nccl-sm120-0.20" not in rules(site, "gemma-4-26b")
    assert "known-broken/nccl-sm120-0.20" not in rules(with_image(vllm="0.21.0"), "glm-5.1")


def test_a_release_that_a_recipe_does_not_know_is_refused():
    assert "vllm-version" in rules(with_image(vllm="0.23.0"), "qwen3.6-27b")
    assert "vllm-version" in rules(with_image(vllm="newest"), "qwen3.6-27b")
    assert "vllm-version" not in rules(with_image(vllm="0.24.0"), "qwen3.6-27b")


def on(arch: str, **engine: Any) -> Site:
    data = site_data()
    data["nodes"]["box"]["arch"] = arch
    data["engines"]["glm-5.1"] |= engine
    return Site.model_validate(data)


def test_an_architecture_that_nobody_tried_is_warned_of_unless_it_is_meant():
    assert "arch" in rules(on("sm90"), "glm-5.1")
    assert "arch" not in rules(on("sm90", why={"arch": "we try it"}), "glm-5.1")


def test_nodes_that_differ_cannot_share_an_engine():
    data = site_data()
    data["nodes"]["spark2"] = {**data["nodes"]["spark2"], "gpu_memory_mib": 90000}
    assert "nodes-equal" in rules(Site.model_validate(data), "dsv4-flash-spark")


def test_level_2_is_refused_for_models_with_recurrent_state():
    found = lint_site(changed("qwen3.6-27b", sleep_levels=[2]), ("qwen3.6-27b",))
    assert [f.problem for f in found if f.rule == "level-2"] == [
        "sleep level 2 for nvfp4 weights loses their scales",
        "sleep level 2 for a model with recurrent state: its state is not rebuilt",
    ]


def test_every_finding_says_where_what_how_to_mend_it_and_where_it_is_known_from():
    (found,) = lint_site(changed("glm-5.1", kill_timeout_s=400), ("glm-5.1",))
    assert found.line == (
        "engine 'glm-5.1': kill_timeout of 400 s is above the client's max_kill_timeout of 300 s: "
        "raise max_kill_timeout on the client, or give less: the client cuts it short without a word "
        "[kill-timeout; known from: Nomad: max_kill_timeout is 30 s by default]"
    )


def test_a_reason_lets_a_warning_pass_but_never_an_error():
    site = changed("glm-5.1", kill_timeout_s=400, why={"kill-timeout": "we like it"})
    assert "kill-timeout" in rules(site, "glm-5.1")


# -- the table of what is known to be broken -------------------------------------------------------------------------


def test_every_entry_of_the_table_says_problem_fix_and_source():
    table = known_broken()
    assert len({e.id for e in table}) == len(table) > 10
    assert all(e.problem and e.fix and e.source for e in table)


@pytest.mark.parametrize("entry", known_broken(), ids=lambda e: e.id)
def test_every_entry_applies_to_what_it_describes_and_not_to_what_differs_in_one(entry: KnownBroken):
    when = entry.when
    versions = {">=0.20,<0.21": "0.20.2", ">=0.14,<0.17": "0.15.1", "<0.24": "0.23.0", "<0.29": "0.28.1"}
    fits = Situation(
        vllm=versions[when.vllm] if when.vllm else None,
        arch=when.arch[0] if when.arch else None,
        family=when.family[0] if when.family else None,
        quantization=when.quantization[0] if when.quantization else None,
        ranks=when.ranks_min,
        pipeline=when.pipeline_min,
        levels=(when.level,) if when.level else (),
        allocator=when.allocator,
        overlay=when.overlay,
        settings={name: value or "" for name, value in when.has.items()},
    )
    assert entry in match(fits)
    assert not applies(when, Situation(settings={name: value or "" for name, value in when.lacks.items()}))


FIELD: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    # entry, an engine that breaks, what of it is otherwise where it does not
    ("nccl-sm120-0.20", {"vllm": "0.20.2", "arch": "sm120", "ranks": 2}, {"arch": "sm90"}),
    ("pool-skipped-0.14", {"vllm": "0.16.0", "allocator": "stock"}, {"allocator": "rotator"}),
    ("free-races-kernels", {"vllm": "0.19.1", "allocator": "stock", "overlay": False}, {"overlay": True}),
    (
        "kv-tagged-runtime-lost",
        {"vllm": "0.28.0", "allocator": "stock", "overlay": False, "settings": {"--enable-lora": ""}},
        {"vllm": "0.29.0"},
    ),
    ("qwen3-next-level-2", {"family": "qwen3-next", "levels": (1, 2)}, {"levels": (1,)}),
    ("mimo-fp8-tp8", {"family": "mimo-v2.5", "quantization": "fp8", "ranks": 8}, {"ranks": 4}),
    (
        "nemotron-nvfp4-tp",
        {"family": "nemotron-omni", "quantization": "nvfp4", "arch": "sm121", "ranks": 2},
        {"settings": {"--moe-backend": "flashinfer_cutlass"}},
    ),
]


@pytest.mark.parametrize(("entry", "breaks", "otherwise"), FIELD, ids=lambda v: v if isinstance(v, str) else "")
def test_what_the_field_saw_break_is_known(entry: str, breaks: dict[str, Any], otherwise: dict[str, Any]):
    assert entry in {e.id for e in match(Situation(**breaks))}
    assert entry not in {e.id for e in match(Situation(**{**breaks, **otherwise}))}


def test_what_is_not_known_of_an_engine_makes_no_entry_apply():
    assert match(Situation()) == ()
    assert not applies(When(vllm=">=0.20"), Situation(vllm="a fork"))


# -- jobs of others --------------------------------------------------------------------------------------------------


def good_job() -> dict[str, Any]:
    """An engine's job as Nomad's parser gives it, with nothing to refuse."""
    words = ["vllm", "serve", "/models/x", "--tensor-parallel-size", "2", "--enable-sleep-mode"]
    config = {
        "image": f"vllm/vllm-openai{DIGEST}",
        "entrypoint": words[:2],
        "args": [*words[2:], "--host", "127.0.0.1", "--port", "8501"],
        "readonly_rootfs": True,
        "mount": [{"type": "bind", "source": "/c", "target": "/root/.cache"}],
        "ulimit": [{"memlock": "-1"}],
    }
    task = {
        "Name": "vllm",
        "Driver": "docker",
        "Config": config,
        "Env": {"VLLM_SERVER_DEV_MODE": "1", "NVIDIA_VISIBLE_DEVICES": "GPU-a,GPU-b"},
        "KillTimeout": 30_000_000_000,
        "LogConfig": {"MaxFiles": 10, "MaxFileSizeMB": 10},
        "Resources": {"MemoryMB": 65536, "Devices": None},
        "Templates": [{"ChangeMode": "noop"}],
        "Lifecycle": None,
    }
    group = {
        "Name": "engine",
        "Count": 1,
        "RestartPolicy": {"Attempts": 0, "Mode": "fail"},
        "ReschedulePolicy": {"Attempts": 0, "Unlimited": False},
        "EphemeralDisk": {"SizeMB": 300},
        "Services": [{"Name": "x", "Checks": [{"CheckRestart": None}]}],
        "Tasks": [task],
    }
    return {"ID": "x", "Type": "service", "Update": {"AutoRevert": False, "Canary": 0}, "TaskGroups": [group]}


def put(job: dict[str, Any], place: str, value: Any) -> dict[str, Any]:
    changed_job = copy.deepcopy(job)
    inner: Any = changed_job
    *path, last = place.replace("G.", "TaskGroups.0.").replace("T.", "TaskGroups.0.Tasks.0.").split(".")
    for key in path:
        inner = inner[int(key)] if key.isdigit() else inner[key]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return changed_job


FOREIGN_CASES: list[tuple[str, str, Any]] = [
    ("device-block", "T.Resources.Devices", [{"Name": "nvidia/gpu", "Count": 2}]),
    ("gpus-all", "T.Env.NVIDIA_VISIBLE_DEVICES", "all"),
    ("gpus-all", "T.Env.NVIDIA_VISIBLE_DEVICES", None),
    ("gpu-count", "T.Env.NVIDIA_VISIBLE_DEVICES", "GPU-a"),
    ("sleep-mode", "T.Config.args", ["/models/x", "--host", "127.0.0.1"]),
    ("dev-mode", "T.Env.VLLM_SERVER_DEV_MODE", None),
    ("loopback", "T.Config.args", ["/models/x", "--enable-sleep-mode", "--host", "0.0.0.0"]),
    ("loopback", "T.Config.args", ["/models/x", "--enable-sleep-mode"]),
    ("image-digest", "T.Config.image", "vllm/vllm-openai:latest"),
    ("fork", "T.Env.VLLM_WORKER_MULTIPROC_METHOD", "fork"),
    (
        "json-shell",
        "T.Config.entrypoint",
        ["/bin/bash", "-c", """vllm serve --speculative-config '{"method":"mtp"}'"""],
    ),
    ("dsv4-kv-fp8", "T.Config.args", ["/models/DeepSeek-V4-Flash", "--enable-sleep-mode", "--host", "127.0.0.1"]),
    (
        "dsv4-eager",
        "T.Config.args",
        ["/models/DeepSeek-V4-Flash", "--kv-cache-dtype=fp8", "--enforce-eager", "--enable-sleep-mode"],
    ),
    ("api-servers", "T.Config.args", ["/m", "--enable-sleep-mode", "--api-server-count", "4"]),
    ("kill-timeout", "T.KillTimeout", 120_000_000_000),
    ("logs-disk", "T.LogConfig", {"MaxFiles": 10, "MaxFileSizeMB": 50}),
    ("crash-loop", "G.RestartPolicy", {"Attempts": 2, "Mode": "fail"}),
    ("crash-loop", "G.RestartPolicy", {"Attempts": 0, "Mode": "delay"}),
    ("crash-loop", "G.ReschedulePolicy", {"Attempts": 0, "Unlimited": True}),
    ("crash-loop", "G.ReschedulePolicy", None),
    ("auto-revert", "Update.AutoRevert", True),
    ("canary", "Update.Canary", 1),
    ("count", "G.Count", 2),
    ("check-restart", "G.Services", [{"Checks": [{"CheckRestart": {"Limit": 3}}]}]),
    ("template-mode", "T.Templates", [{"ChangeMode": "restart"}]),
    ("template-mode", "T.Templates", [{}]),
    ("writable-cache", "T.Config.mount", []),
    ("memlock", "T.Config.ulimit", []),
]


@pytest.mark.parametrize(
    ("image", "vllm", "ranks", "refused"),
    [
        (f"vllm/vllm-openai{DIGEST}", "0.20.2", "2", True),
        ("vllm/vllm-openai:v0.20.2-cu129", None, "2", True),
        ("vllm/vllm-openai:v0.20.2", None, "1", False),
        ("vllm/vllm-openai:v0.26.0", None, "2", False),
        ("registry.example:5000/other:0.20.2", None, "2", False),
    ],
)
def test_a_pair_that_is_known_to_break_is_refused_in_somebody_elses_job_too(
    image: str, vllm: str | None, ranks: str, refused: bool
):
    args = ["/m", "--tensor-parallel-size", ranks, "--enable-sleep-mode", "--host", "127.0.0.1"]
    job = put(put(good_job(), "T.Config.image", image), "T.Config.args", args)
    found = {f.rule for f in lint_job(job, file="x", facts=Facts(Situation(vllm=vllm, arch="sm120")))}
    assert ("known-broken/nccl-sm120-0.20" in found) is refused


def test_a_good_job_of_somebody_else_passes():
    assert lint_job(good_job(), file="x.json") == ()
    assert lint_job({"Job": good_job()}, file="x.json") == ()


@pytest.mark.parametrize(("rule", "place", "value"), FOREIGN_CASES)
def test_a_job_of_somebody_else_is_refused_for_it(rule: str, place: str, value: Any):
    assert rule in {f.rule for f in lint_job(put(good_job(), place, value), file="x.json")}


def test_tasks_before_and_after_the_engine_are_not_taken_for_engines():
    job = good_job()
    gate = {"Name": "gate", "Config": {"image": "vllm/vllm-openai:tag"}, "Lifecycle": {"Hook": "prestart"}}
    job["TaskGroups"][0]["Tasks"].insert(0, gate)
    assert lint_job(job, file="x.json") == ()


def test_a_job_without_an_engine_is_told(tmp_path: Path):
    job = put(put(good_job(), "T.Config", {"image": "redis", "args": []}), "T.Name", "redis")
    with pytest.raises(JobsError, match="no task runs vLLM"):
        lint_job(job, file="x.json")
    with pytest.raises(JobsError, match="is no Nomad job"):
        lint_job({"hello": 1}, file="x.json")


HCL = """
variable "image" { type = string }
variable "gpus" {
  type    = string
  default = "all"
}
job "theirs" {
  group "engine" {
    restart {
      attempts = 3
      mode     = "delay"
    }
    task "vllm" {
      driver = "docker"
      config {
        image = var.image
        args  = concat(["--model", "/m", "--host", "0.0.0.0"], ["--enforce-eager"])
      }
      env {
        NVIDIA_VISIBLE_DEVICES = var.gpus
      }
      kill_timeout = "2m"
      resources {
        memory = 1000
        device "nvidia/gpu" { count = 4 }
      }
      template {
        data        = "x"
        destination = "y"
      }
    }
  }
}
"""


def test_hcl_of_somebody_else_is_read_as_far_as_it_can_be(tmp_path: Path):
    file = tmp_path / "theirs.nomad.hcl"
    file.write_text(HCL)
    found = {f.rule for f in lint_job(read_job(file), file=str(file))}
    assert found >= {"device-block", "gpus-all", "crash-loop", "template-mode", "loopback", "kill-timeout", "dev-mode"}
    assert "image-digest" not in found  # it is not known which image
    assert "sleep-mode" not in found  # an expression may hide it


def test_a_file_of_variables_tells_what_an_expression_hid(tmp_path: Path):
    file, variables = tmp_path / "theirs.hcl", tmp_path / "vars.hcl"
    file.write_text(HCL)
    variables.write_text('image = "vllm/vllm-openai:latest"\ngpus = "GPU-a"\n')
    found = {f.rule for f in lint_job(read_job(file, variables), file=str(file))}
    assert "image-digest" in found
    assert "gpus-all" not in found


def test_json_of_somebody_else_is_read(tmp_path: Path):
    file = tmp_path / "theirs.json"
    file.write_text(json.dumps(good_job()))
    assert lint_job(read_job(file), file=str(file)) == ()


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("x.json", "{", "is not valid JSON"),
        ("x.json", "[]", "is no JSON object"),
        ("x.hcl", "a b\nc: d\n", r"x\.hcl: line 1: Invalid block definition; [^.]*\.$"),
        ("x.yaml", "engines: {}", r"x\.yaml: is YAML, .*--site"),
        ("x.hcl", 'variable "a" {}', "has no job block"),
    ],
)
def test_a_file_that_is_no_job_is_told(tmp_path: Path, name: str, text: str, said: str):
    (tmp_path / name).write_text(text)
    with pytest.raises(JobsError, match=said):
        read_job(tmp_path / name)


@pytest.mark.parametrize("spec", [s for s in SPECS if s.name.startswith("engine")], ids=lambda p: p.name)
def test_our_own_specs_pass_as_if_they_were_somebody_elses(spec: Path):
    assert lint_job(read_job(spec), file=spec.name) == ()


def test_the_example_passes_as_a_whole():
    assert lint_site(load_site(EXAMPLE)) == ()
