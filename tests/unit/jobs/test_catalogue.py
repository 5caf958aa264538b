"""Recipes: what is shipped, what a recipe must say, and how its layers become arguments."""

import pytest

from rotator.config_text import read_mapping
from rotator.jobs import JobsError, Recipe, Site, load_catalogue, load_recipe, load_site
from rotator.jobs.files import jobs_folder, parse_as
from rotator.jobs.lint import lint_site
from rotator.jobs.recipe import words
from rotator.jobs.render import merge
from rotator.jobs.schema import json_schema
from tests.unit.jobs.sites import EXAMPLE, ROOT, site_data

CATALOGUE = load_catalogue()
DSV4 = (jobs_folder() / "catalogue" / "deepseek-v4-flash-fp8.yaml").read_text(encoding="utf-8")


def test_the_catalogue_holds_the_engines_that_the_field_rotates():
    families = {recipe.family for recipe in CATALOGUE.values()}
    assert families == {"deepseek-v4", "glm-5", "mimo-v2.5", "qwen3.6", "qwen3-vl", "gemma-4", "nemotron-omni"}
    assert len(CATALOGUE) == 9


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_recipe_lints_clean_on_every_architecture_that_it_names(name: str):
    recipe = CATALOGUE[name]
    for arch, layer in recipe.arch.items():
        chosen = [(profile, ()) for profile in recipe.profiles or (None,)]
        for profile, gates in (*chosen, (recipe.default_profile, tuple(layer.gates))):
            assert lint_site(_alone(recipe, arch, profile, gates), ("e",)) == (), (arch, profile, gates)


def _alone(recipe: Recipe, arch: str, profile: str | None, gates: tuple[str, ...]) -> Site:
    ranks = recipe.tensor_parallel.value
    data = site_data()
    node = {**data["nodes"]["box"], "arch": arch, "gpus": [f"GPU-{i}" for i in range(ranks)]}
    engine = {"recipe": recipe.name, "nodes": ["box"], "image": "vllm", "model_dir": "/m", "port": 8501}
    engine |= {"gates": gates, **({"profile": profile} if profile else {})}
    return Site.model_validate({"nodes": {"box": node}, "images": data["images"], "engines": {"e": engine}})


def test_the_example_site_lints_without_a_word():
    assert lint_site(load_site(EXAMPLE)) == ()


def test_the_example_site_serves_every_recipe_of_the_catalogue():
    assert {e.recipe for e in load_site(EXAMPLE).engines.values()} == set(CATALOGUE)


def test_deepseek_v4_flash_comes_in_three_profiles_with_two_draft_tokens():
    for name in ("deepseek-v4-flash-fp8", "deepseek-v4-flash-nvfp4"):
        recipe = CATALOGUE[name]
        assert set(recipe.profiles) == {"latency", "throughput", "balanced"}
        assert recipe.args["--speculative-config"].value == {"method": "mtp", "num_speculative_tokens": 2}
        assert set(recipe.arch) == {"sm120", "sm121"}
        assert recipe.args["--kv-cache-dtype"].value == "fp8"


def test_a_gate_of_the_architecture_is_off_until_a_site_names_it():
    site = load_site(EXAMPLE)
    engine, node = site.engines["dsv4-flash"], site.nodes["box"]
    recipe = CATALOGUE["deepseek-v4-flash-fp8"]
    gate = "VLLM_DEEPSEEK_V4_FLASHINFER_SM120_DECODE"
    assert gate not in merge(recipe, engine, node).env
    assert merge(recipe, engine.model_copy(update={"gates": ("flashinfer-decode",)}), node).env[gate] == "1"


def test_the_sites_own_word_wins_over_profile_architecture_and_recipe():
    site = load_site(EXAMPLE)
    recipe, node = CATALOGUE["deepseek-v4-flash-fp8"], site.nodes["box"]
    engine = site.engines["dsv4-flash"].model_copy(
        update={"args": {"--max-num-seqs": 2, "--enable-expert-parallel": None}, "env": {"OMP_NUM_THREADS": 4}}
    )
    merged = merge(recipe, engine, node)
    assert merged.args["--max-num-seqs"] == 2
    assert "--enable-expert-parallel" not in merged.words
    assert merged.env["OMP_NUM_THREADS"] == "4"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("source: gb10-report}", "source: hearsay}"), "source 'hearsay' is no key of 'sources'"),
        (("default_profile: balanced", "default_profile: best"), "default_profile 'best' is no profile"),
        (('value: ">=0.20.0"', 'value: "newest"'), "'newest' is no version specifier"),
        (("quantization: {value: fp8,", "quantization: {value: fp9,"), "quantization.value"),
        (("--block-size: {value: 256, source: vllm-recipes}", "--block-size: {value: 256}"), "source: is missing"),
        (("family: deepseek-v4", "famly: deepseek-v4"), "unknown key: did you mean 'family'?"),
    ],
)
def test_a_recipe_that_is_wrong_is_told_with_its_place(change: tuple[str, str], said: str):
    text = DSV4.replace(*change, 1)
    assert text != DSV4
    with pytest.raises(JobsError) as e:
        parse_as(Recipe, text, "mine.yaml")
    assert any(line.startswith("mine.yaml: ") and said in line for line in e.value.problems), e.value.problems


def test_a_value_without_a_source_must_say_that_it_was_not_measured():
    data = read_mapping(DSV4)
    data["weights_gib"] = {"value": 150, "source": "not measured; by the size of its files"}
    assert Recipe.model_validate(data).weights_gib.value == 150


def test_a_recipe_that_is_not_there_is_told_with_those_that_are():
    with pytest.raises(JobsError, match=r"recipe 'gpt-9': is not in the catalogue: name one of deepseek-v4-flash-fp8"):
        load_recipe("gpt-9")


def test_a_mapping_becomes_json_in_one_word_and_false_becomes_nothing():
    assert words("--speculative-config", {"n": 2, "method": "mtp"}) == (
        "--speculative-config",
        '{"method":"mtp","n":2}',
    )
    assert words("--trust-remote-code", True) == ("--trust-remote-code",)
    assert words("--trust-remote-code", False) == ()
    assert words("--served", ["a", "b"]) == ("--served", "a", "b")
    assert words("--gpu-memory-utilization", 0.9) == ("--gpu-memory-utilization", "0.9")


@pytest.mark.parametrize("what", ["recipe", "site"])
def test_the_schema_in_the_docs_is_current(what: str):
    assert (ROOT / "docs" / f"{what}.schema.json").read_text(encoding="utf-8") == json_schema(what)
