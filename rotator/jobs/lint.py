"""What is known to break: in a site's engines as they are rendered, between them, and in jobs that others wrote."""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from rotator.jobs.files import read_text
from rotator.jobs.findings import Finding, JobsError
from rotator.jobs.foreign import job_of_hcl, job_of_json, views_of
from rotator.jobs.known_broken import Situation
from rotator.jobs.recipe import Recipe, load_recipe
from rotator.jobs.render import Rendered, masters_mib, names, render
from rotator.jobs.rules import check
from rotator.jobs.site import EngineSite, Site
from rotator.jobs.view import Facts, of_rendered

_DIGEST = "field report of May 2026: a build was taken for another by its tag"


def lint_site(site: Site, only: tuple[str, ...] = ()) -> tuple[Finding, ...]:
    """Every job of a site (or those named), and what they are to each other. Raises JobsError."""
    found: list[Finding] = []
    for name in only or names(site):
        found += lint_rendered(site, render(site, name))
    return (*found, *_ports(site), *_memory(site))


def lint_rendered(site: Site, rendered: Rendered) -> tuple[Finding, ...]:
    """One job of a site."""
    if not rendered.is_engine:
        return tuple(_image(rendered))
    engine = site.engines[rendered.name]
    recipe = load_recipe(engine.recipe)
    facts = facts_of(site, engine, recipe, rendered)
    own = (*_recipe_fits(site, engine, recipe, rendered), *_gate(site, engine, rendered))
    return (*check(of_rendered(rendered), facts), *own)


def facts_of(site: Site, engine: EngineSite, recipe: Recipe, rendered: Rendered) -> Facts:
    """What recipe and site know of one engine."""
    node = site.nodes[engine.nodes[0]]
    values = rendered.values
    situation = Situation(
        vllm=site.images[engine.image].vllm,
        arch=node.arch,
        family=recipe.family,
        quantization=recipe.quantization.value,
        ranks=values["tensor_parallel"] * values["pipeline_parallel"],
        pipeline=values["pipeline_parallel"],
        levels=tuple(engine.sleep_levels or recipe.sleep_levels.value),
        allocator=engine.allocator,
        overlay=engine.overlay is not None,
    )
    return Facts(
        situation=situation,
        is_multimodal=recipe.multimodal.value,
        is_hybrid=recipe.attention.value == "hybrid",
        masters_mib=masters_mib(engine, recipe, node),
        max_kill_timeout_s=min(site.nodes[name].max_kill_timeout_s for name in engine.nodes),
        host_memory_mib=min(site.nodes[name].host_memory_mib for name in engine.nodes),
        unified_memory=node.unified_memory,
    )


def _recipe_fits(site: Site, engine: EngineSite, recipe: Recipe, rendered: Rendered) -> Iterator[Finding]:
    place = f"engine '{rendered.name}'"
    version, arch = site.images[engine.image].vllm, site.nodes[engine.nodes[0]].arch
    try:
        fits = SpecifierSet(recipe.vllm.value).contains(Version(Version(version).base_version))
    except InvalidVersion:
        problem = f"vLLM '{version}' is no version"
        yield Finding("vllm-version", place, problem, "write what `vllm --version` tells", "the site file")
        return
    if not fits:
        problem = f"vLLM {version} is not {recipe.vllm.value}, which {recipe.name} needs"
        yield Finding("vllm-version", place, problem, "take another image", recipe.vllm.source)
    if arch not in recipe.arch and "arch" not in engine.why:
        problem = f"nobody is known to have served {recipe.name} on {arch}"
        fix = f"take {' or '.join(recipe.arch)}, or try it and add what you learn to the recipe"
        yield Finding("arch", place, problem, fix, f"recipe {recipe.name}", is_error=False)
    mixed = {(site.nodes[n].arch, site.nodes[n].gpu_memory_mib) for n in engine.nodes}
    if len(mixed) > 1:
        problem = "its nodes differ in architecture or memory"
        yield Finding("nodes-equal", place, problem, "name two equal nodes", "vLLM: ranks are alike")


def _gate(site: Site, engine: EngineSite, rendered: Rendered) -> Iterator[Finding]:
    have, asked = min(site.nodes[name].gpu_memory_mib for name in engine.nodes), rendered.values["free_mib"]
    if asked > have:
        problem = f"it would wait for {asked} MiB of free VRAM on GPUs of {have} MiB"
        fix = "correct free_mib or --gpu-memory-utilization: the gate never opens, and the start fails"
        yield Finding(
            "vram-gate", f"engine '{rendered.name}'", problem, fix, "jobs/engine.nomad.hcl: its prestart task"
        )


def _image(rendered: Rendered) -> Iterator[Finding]:
    image = rendered.values["image"]
    if "@sha256:" not in image:
        problem = f"image {image} is named by a tag, which can move"
        yield Finding("image-digest", f"job '{rendered.name}'", problem, "name it by digest", _DIGEST)


def _ports(site: Site) -> Iterator[Finding]:
    """Two that would listen on one port of one node."""
    users: dict[tuple[str, int], list[str]] = defaultdict(list)
    for name, engine in site.engines.items():
        users[engine.nodes[0], engine.port].append(f"engine '{name}'")
        if len(engine.nodes) == 2:
            users[engine.nodes[0], engine.master_port].append(f"engine '{name}'.master_port")
    if site.rotator:
        users[site.rotator.node, site.rotator.port].append("rotator")
    for (node, port), who in users.items():
        if len(who) > 1:
            problem = f"port {port} of node '{node}' is also that of {' and '.join(who[1:])}"
            yield Finding("ports", who[0], problem, "change one", "Nomad: a static port goes to one allocation")


def _memory(site: Site) -> Iterator[Finding]:
    """All engines of a node are placed at once, asleep or awake: what they ask for is added up."""
    asked: dict[str, int] = defaultdict(int)
    for name, engine in site.engines.items():
        for node in engine.nodes:
            asked[node] += render(site, name).values["memory_mb"]
    for node, total in asked.items():
        have = site.nodes[node].host_memory_mib
        if total > have:
            problem = f"its engines ask for {total} MiB together and it has {have} MiB"
            fix = "set memory_mib lower where masters may go to disk, or run fewer there: Nomad places the rest nowhere"
            yield Finding("memory-sum", f"node '{node}'", problem, fix, "Nomad's scheduler")


# -- files of others -------------------------------------------------------------------------------------------------


def lint_job(job: Mapping[str, Any], *, file: str, facts: Facts | None = None) -> tuple[Finding, ...]:
    """A job as Nomad's parser gives it. Raises JobsError where it holds no vLLM engine."""
    views = views_of(job, file=file)
    if not views:
        raise JobsError(f"{file}: no task runs vLLM: nothing to judge")
    return tuple(finding for view in views for finding in check(view, facts or Facts()))


def read_job(path: Path, var_file: Path | None = None, variables: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
    """A job file of anybody's: JSON, or HCL where pygohcl is installed. Raises JobsError with what to do."""
    text = read_text(path)
    if path.suffix in (".yaml", ".yml"):
        raise JobsError(f"{path}: is YAML, and jobs are HCL or JSON: give a site file with --site")
    if path.suffix == ".json":
        return job_of_json(text, file=str(path))
    try:
        import pygohcl
    except ImportError:
        raise JobsError(f"{path}: HCL is read by pygohcl, which is missing: install it, or add --nomad") from None
    try:
        values = pygohcl.attributes_loads(read_text(var_file)) if var_file else {}
        parsed = pygohcl.loads(text)
    except pygohcl.HCLParseError as e:
        raise JobsError(f"{path}: {_first_problem(str(e))}") from None
    return job_of_hcl(parsed, {**_plain(values), **(variables or {})}, file=str(path))


def _first_problem(text: str) -> str:
    """Of a mistake and all that follows from it the first, with its line. The parser names a file of its own."""
    _, *places = re.split(r",? *tmp\.hcl:", " ".join(text.split()))
    return re.sub(r"^(\d+),[^:]*", r"line \1", places[0]) if places else text


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """pygohcl gives each attribute as a mapping with its value, or the value itself."""
    return {k: v["value"] if isinstance(v, Mapping) and set(v) >= {"name", "value"} else v for k, v in values.items()}
