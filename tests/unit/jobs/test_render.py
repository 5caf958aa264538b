"""Site and recipe in, variables out: golden texts, literals, and what a site may not say."""

import json
from collections.abc import Mapping
from typing import Any

import pygohcl
import pytest
from hypothesis import given
from hypothesis import settings as bounded
from hypothesis import strategies as st

from rotator.jobs import JobsError, Site, load_site, render, render_all, render_text
from rotator.jobs.hcl import literal, var_file
from rotator.jobs.view import command, of_rendered, settings
from tests.unit.jobs.sites import EXAMPLE, ROOT, changed, site_data

GOLDEN = ROOT / "tests" / "unit" / "jobs" / "golden"
SITE = load_site(EXAMPLE)


@pytest.mark.parametrize(
    "name", ["dsv4-flash", "dsv4-flash-spark", "glm-5.1", "nemotron-omni", "gpu-lease@box", "agents", "rotator"]
)
def test_a_render_is_the_golden_text(name: str):
    made = render(SITE, name)
    assert made.variables == (GOLDEN / f"{made.job_id}.vars.hcl").read_text(encoding="utf-8")


def test_every_variable_of_a_spec_gets_a_value_and_no_other_does():
    for made in render_all(SITE):
        declared = pygohcl.loads(made.hcl)["variable"]
        assert set(made.values) == set(declared), made.name


def test_every_value_has_the_type_that_its_variable_declares():
    kinds = {"string": str, "number": int, "bool": bool, "list(string)": list, "map(string)": dict}
    for made in render_all(SITE):
        for name, declared in pygohcl.loads(made.hcl)["variable"].items():
            value = made.values[name]
            assert type(value) is kinds[declared["type"]], (made.name, name)
            inner = value if isinstance(value, list) else list(value.values()) if isinstance(value, dict) else []
            assert all(isinstance(v, str) for v in inner), (made.name, name)


def test_the_variables_read_back_as_the_values():
    for made in render_all(SITE):
        assert pygohcl.attributes_loads(made.variables) == dict(made.values), made.name


_texts = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0"), max_size=30)


@bounded(max_examples=40)
@given(st.dictionaries(st.from_regex(r"[a-z]{1,8}", fullmatch=True), st.one_of(_texts, st.lists(_texts, max_size=3))))
def test_no_text_can_break_out_of_its_literal(values: dict[str, Any]):
    import unicodedata

    whole = {k: unicodedata.normalize("NFC", v) if isinstance(v, str) else v for k, v in values.items()}
    flat = {k: [unicodedata.normalize("NFC", one) for one in v] if isinstance(v, list) else v for k, v in whole.items()}
    read = pygohcl.attributes_loads(var_file(flat)) if flat else {}
    assert read == flat


def test_a_template_in_a_text_stands_for_itself():
    assert literal("${x} %{y}") == '"$${x} %%{y}"'


def test_json_arguments_are_one_list_element_each():
    words = command(render(SITE, "dsv4-flash"))
    assert json.loads(words[words.index("--speculative-config") + 1]) == {"method": "mtp", "num_speculative_tokens": 2}


def test_what_must_hold_for_every_engine_comes_last():
    """vLLM takes the last word: a recipe or a site that says otherwise does not win."""
    site = changed("dsv4-flash", args={"--host": "0.0.0.0", "--port": 1})
    named = settings(of_rendered(render(site, "dsv4-flash")))
    assert (named["--host"], named["--port"]) == ("127.0.0.1", "8501")


def test_memory_covers_the_masters_and_more_with_the_stock_allocator():
    ours = render(SITE, "dsv4-flash").values["memory_mb"]
    stock = render(changed("dsv4-flash", allocator="stock"), "dsv4-flash").values["memory_mb"]
    assert ours > 148.66 * 1024 + 32 * 1024
    assert stock > 1.8 * 148.66 * 1024 + 32 * 1024


def test_the_gate_waits_for_what_vllm_will_ask_for():
    assert render(SITE, "dsv4-flash").values["free_mib"] == 86141  # 0.88 of 97887 MiB, rounded up


def test_two_nodes_get_each_its_own_address_and_the_worker_is_headless():
    made = render(SITE, "dsv4-flash-spark")
    assert made.template == "engine-two-node"
    assert made.values["head_env"]["VLLM_HOST_IP"] == "10.0.0.1"
    assert made.values["worker_env"]["VLLM_HOST_IP"] == "10.0.0.2"
    assert "--headless" in command(made, rank=1)
    assert "--headless" not in command(made)
    assert settings(of_rendered(made))["--master-addr"] == "10.0.0.1"


def test_masters_on_disk_need_our_allocator():
    assert render(SITE, "glm-5.1").values["env"]["ROTATOR_ALLOCATOR_SPILL_DIR"] == "/spill"
    stock = render(changed("glm-5.1", allocator="stock"), "glm-5.1").values["env"]
    assert stock == {"ROTATOR_ALLOCATOR": "off", "VLLM_USE_FLASHINFER_MOE_FP4": "1"}


def test_a_job_is_found_by_its_engine_or_by_a_recipe_that_one_engine_uses():
    by_engine, by_recipe = render_text("glm-5.1", EXAMPLE), render_text("glm-5.1-reap-478b-nvfp4", EXAMPLE)
    assert by_engine == by_recipe
    with pytest.raises(JobsError, match="engines dsv4-flash, dsv4-flash-spark use it"):
        render_text("deepseek-v4-flash-fp8", EXAMPLE)
    with pytest.raises(JobsError, match="job 'nobody': is not in the site file"):
        render_text("nobody", EXAMPLE)


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("engines", "glm-5.1", "nodes"), ["moon"], "engine 'glm-5.1': node 'moon' is not in 'nodes'"),
        (("engines", "glm-5.1", "image"), "none", "engine 'glm-5.1': image 'none' is not in 'images'"),
        (("engines", "glm-5.1", "gpus"), ["GPU-9"], "GPU GPU-9 is not of node 'box'"),
        (("engines", "glm-5.1", "nodes"), ["box", "spark1"], "'gpus' is for one node"),
        (("engines", "dsv4-flash-spark", "nodes"), ["spark1", "spark1"], "names a node twice"),
        (("lease", "nodes"), ["moon"], "lease: node 'moon' is not in 'nodes'"),
        (("rotator", "node"), "moon", "rotator: node 'moon' is not in 'nodes'"),
        (("engines", "glm-5.1", "model_dir"), "models", "model_dir"),
        (("nodes", "box", "gpus"), [0, 1], "gpus"),
        (("agents", "nodes"), ["nowhere"], "agents: node 'nowhere' is not in 'nodes'"),
    ],
)
def test_a_site_that_cannot_be_is_refused(place: tuple[str, ...], value: Any, said: str):
    data = site_data()
    inner: Any = data
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        Site.model_validate(data)


def test_unknown_profiles_and_gates_are_told_with_those_that_are_there():
    with pytest.raises(JobsError, match="has no profile 'best': name one of latency, throughput, balanced"):
        render(changed("dsv4-flash", profile="best"), "dsv4-flash")
    with pytest.raises(JobsError, match="has on sm120 no gate 'turbo': name one of flashinfer-decode"):
        render(changed("dsv4-flash", gates=["turbo"]), "dsv4-flash")


def test_the_same_site_gives_the_same_text():
    values: Mapping[str, Any] = render(SITE, "glm-5.1").values
    assert var_file(dict(reversed(values.items()))) == render(SITE, "glm-5.1").variables
