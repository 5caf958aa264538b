"""Recipe and site in, the text of a job and of its variables out. Nomad's own parser makes the job from both."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rotator.jobs.files import template_text
from rotator.jobs.findings import JobsError
from rotator.jobs.hcl import var_file
from rotator.jobs.recipe import Recipe, Value, env_word, load_recipe, words
from rotator.jobs.site import EngineSite, NodeSite, Site, load_site

LEASE = "gpu-lease@"
AGENTS = "agents"
ROTATOR = "rotator"
MIB = 1 << 20
# What a container needs beside the masters: the ranks' own heaps, CUDA contexts, compiled graphs.
WORKING_MIB = 32 * 1024
# The stock allocator's locked allocations are rounded up to powers of two: 1.3 to 1.8 times as much (vLLM #56410).
STOCK_FACTOR = 1.8
_UTILIZATION = 0.92  # vLLM's own default
_PROGRESS_MARGIN_S = 300.0


@dataclass(frozen=True, slots=True)
class Rendered:
    """One job: ``hcl`` and ``variables`` go to Nomad's parser, ``values`` are the same variables as Python values."""

    name: str
    job_id: str
    namespace: str
    template: str
    hcl: str
    variables: str
    values: Mapping[str, Any]
    why: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_engine(self) -> bool:
        return self.template.startswith("engine")


def names(site: Site) -> tuple[str, ...]:
    """Every job of a site, in the order in which they are to be run."""
    leases = [f"{LEASE}{node}" for node in site.lease.nodes] if site.lease else []
    agents = [AGENTS] if site.agents else []
    return (*leases, *agents, *site.engines, *([ROTATOR] if site.rotator else []))


def render(site: Site, name: str) -> Rendered:
    """One job of a site. Raises JobsError."""
    if name in site.engines:
        try:
            return _engine(site, name, site.engines[name])
        except JobsError as e:
            raise JobsError(*(f"engine '{name}': {problem}" for problem in e.problems)) from None
    if name == AGENTS and site.agents:
        return _agents(site)
    if name == ROTATOR and site.rotator:
        return _rotator(site)
    if site.lease and name.startswith(LEASE) and name.removeprefix(LEASE) in site.lease.nodes:
        return _lease(site, name.removeprefix(LEASE))
    raise JobsError(f"job '{name}': is not in the site file: name one of {', '.join(names(site))}")


def render_all(site: Site) -> tuple[Rendered, ...]:
    return tuple(render(site, name) for name in names(site))


def render_text(name: str, site: Path) -> tuple[str, str]:
    """HCL and variables of one job. ``name``: an engine of the site, or a recipe that one engine of it uses."""
    loaded = load_site(site)
    made = render(loaded, named(loaded, name))
    return made.hcl, made.variables


def named(site: Site, name: str) -> str:
    """The job that is meant: itself, or the one engine that uses the recipe of this name."""
    users = [engine for engine, config in site.engines.items() if config.recipe == name]
    if name in names(site) or not users:
        return name
    if len(users) > 1:
        raise JobsError(f"recipe '{name}': engines {', '.join(users)} use it: name the engine")
    return users[0]


# -- engines ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Merged:
    """An engine's own arguments and environment, all layers together, with the reasons that came with them."""

    args: Mapping[str, Value]
    env: Mapping[str, str]
    why: Mapping[str, str]

    @property
    def words(self) -> tuple[str, ...]:
        return tuple(word for flag, value in self.args.items() for word in words(flag, value))


def merge(recipe: Recipe, engine: EngineSite, node: NodeSite) -> Merged:
    """The recipe's layers for this node, then the site's own. Raises JobsError for unknown profiles and gates."""
    args: dict[str, Value] = {}
    env: dict[str, Value] = {}
    why: dict[str, str] = {}
    for layer in recipe.layers(node.arch, engine.profile, engine.gates):
        for settings, into in ((layer.args, args), (layer.env, env)):
            for key, setting in settings.items():
                into[key] = setting.value
                if setting.why:
                    why[key] = setting.why
    args.update(engine.args)
    env.update(engine.env)
    why.update(engine.why)
    texts = {key: env_word(value) for key, value in env.items()}
    return Merged(args, {key: text for key, text in texts.items() if text is not None}, why)


def _engine(site: Site, name: str, engine: EngineSite) -> Rendered:
    recipe = load_recipe(engine.recipe)
    node = site.nodes[engine.nodes[0]]
    merged = merge(recipe, engine, node)
    values = _common(site, name, engine, recipe, merged)
    if len(engine.nodes) == 2:
        template, own = "engine-two-node", _two_nodes(site, engine)
    else:
        template, own = "engine", _one_node(site, name, engine, node, values["env"])
    return _made(site, name, values["job_id"], template, {**values, **own}, merged.why)


def _common(site: Site, name: str, engine: EngineSite, recipe: Recipe, merged: Merged) -> dict[str, Any]:
    node, image = site.nodes[engine.nodes[0]], site.images[engine.image]
    profile = engine.profile or recipe.default_profile
    pipeline = recipe.pipeline_parallel.value if recipe.pipeline_parallel else 1
    return {
        "job_id": engine.job_id or f"vllm-{name}",
        "namespace": site.namespace,
        "node_pool": node.node_pool,
        "engine": name,
        "recipe": f"{recipe.name}/{profile}" if profile else recipe.name,
        "image": image.ref,
        "entrypoint": list(image.entrypoint),
        "model_dir": engine.model_dir,
        "cache_dir": f"{node.cache_root.rstrip('/')}/{name}",
        "served_name": engine.served_name or name,
        "args": list(merged.words),
        "env": {"ROTATOR_ALLOCATOR": "on" if engine.allocator == "rotator" else "off", **merged.env},
        "tensor_parallel": engine.tensor_parallel or recipe.tensor_parallel.value,
        "pipeline_parallel": engine.pipeline_parallel or pipeline,
        "port": engine.port,
        "cpu": engine.cpu,
        "memory_mb": engine.memory_mib or _memory_mib(engine, recipe, node),
        "shm_mb": engine.shm_mib,
        "tmp_mb": engine.tmp_mib,
        "free_mib": engine.free_mib or _free_mib(node, merged),
        "gate_tries": max(1, round(engine.gate_s / 2)),
        "ipc_mode": "host" if engine.ipc_host else "",
        "overlay_root": engine.overlay.root if engine.overlay else "",
        "overlays": dict(engine.overlay.files) if engine.overlay else {},
        "kill_timeout": _seconds(engine.kill_timeout_s),
        "healthy_deadline": _seconds(recipe.start_deadline_s.value),
        "progress_deadline": _seconds(recipe.start_deadline_s.value + _PROGRESS_MARGIN_S),
    }


def _one_node(site: Site, name: str, engine: EngineSite, node: NodeSite, env: Mapping[str, str]) -> dict[str, Any]:
    spill = f"{node.spill_root.rstrip('/')}/{name}" if node.spill_root else ""
    own = {"ROTATOR_ALLOCATOR_SPILL_DIR": "/spill"} if spill and engine.allocator == "rotator" else {}
    return {
        "node": engine.nodes[0],
        "gpu_uuids": list(site.gpus_of(engine)),
        "spill_dir": spill,
        "env": {**own, **env},
    }


def _two_nodes(site: Site, engine: EngineSite) -> dict[str, Any]:
    head, worker = (site.nodes[name] for name in engine.nodes)
    if head.link is None or worker.link is None:
        raise JobsError("two nodes: each needs a 'link' to share an engine")
    return {
        "head": engine.nodes[0],
        "worker": engine.nodes[1],
        "head_gpu": head.gpus[0],
        "worker_gpu": worker.gpus[0],
        "head_env": _link_env(head),
        "worker_env": _link_env(worker),
        "master_address": head.link.address,
        "master_port": engine.master_port,
    }


def _link_env(node: NodeSite) -> dict[str, str]:
    """What NCCL and Gloo need to meet over the link instead of the first interface that they find."""
    if node.link is None:
        return {}
    return {
        "VLLM_HOST_IP": node.link.address,
        "NCCL_SOCKET_IFNAME": node.link.socket_interface,
        "GLOO_SOCKET_IFNAME": node.link.socket_interface,
        "TP_SOCKET_IFNAME": node.link.socket_interface,
        "NCCL_IB_HCA": ",".join(node.link.rdma_devices),
    }


def masters_mib(engine: EngineSite, recipe: Recipe, node: NodeSite) -> int:
    """Host memory that a sleep at level 1 locks on one node, in MiB. None on unified memory: it would free nothing."""
    if node.unified_memory:
        return 0
    factor = STOCK_FACTOR if engine.allocator == "stock" else 1.0
    return math.ceil(recipe.weights_gib.value * 1024 * factor / len(engine.nodes))


def _memory_mib(engine: EngineSite, recipe: Recipe, node: NodeSite) -> int:
    return masters_mib(engine, recipe, node) + WORKING_MIB + engine.shm_mib + engine.tmp_mib


def _free_mib(node: NodeSite, merged: Merged) -> int:
    """What vLLM itself will ask for when it starts: its share of the whole GPU."""
    return math.ceil(utilization(merged.args) * node.gpu_memory_mib)


def utilization(args: Mapping[str, Value]) -> float:
    value = args.get("--gpu-memory-utilization")
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else _UTILIZATION


# -- the other jobs --------------------------------------------------------------------------------------------------


def _lease(site: Site, node: str) -> Rendered:
    if site.lease is None:
        raise JobsError("lease: is not in the site file: add it")
    values: dict[str, Any] = {
        "job_id": f"gpu-lease-{node}",
        "namespace": site.namespace,
        "node_pool": site.nodes[node].node_pool,
        "node": node,
        "image": site.lease.image,
        "gpu_uuids": list(site.nodes[node].gpus),
    }
    return _made(site, f"{LEASE}{node}", values["job_id"], "gpu-lease", values)


def _agents(site: Site) -> Rendered:
    own = site.agents
    if own is None:
        raise JobsError("agents: is not in the site file: add it")
    values = {
        "job_id": own.job_id,
        "namespace": site.namespace,
        "nodes": list(own.nodes),
        "image": own.image,
        "config_dir": own.config_dir,
        "mounts": dict(own.mounts),
        "cpu": own.cpu,
        "memory_mb": own.memory_mib,
    }
    return _made(site, AGENTS, own.job_id, "agent", values)


def _rotator(site: Site) -> Rendered:
    own = site.rotator
    if own is None:
        raise JobsError("rotator: is not in the site file: add it")
    node = site.nodes[own.node]
    values = {
        "job_id": own.job_id,
        "namespace": site.namespace,
        "node_pool": node.node_pool,
        "node": own.node,
        "image": own.image,
        "gpu_uuids": list(node.gpus),
        "port": own.port,
        "config_dir": own.config_dir,
        "state_dir": own.state_dir,
        "nomad_address": own.nomad_address,
        "host_pids": own.host_pids,
        "env": dict(own.env),
        "mounts": dict(own.mounts),
        "cpu": own.cpu,
        "memory_mb": own.memory_mib,
    }
    return _made(site, ROTATOR, own.job_id, "rotator", values)


def _made(
    site: Site, name: str, job_id: str, template: str, values: Mapping[str, Any], why: Mapping[str, str] | None = None
) -> Rendered:
    return Rendered(
        name, job_id, site.namespace, template, template_text(template), var_file(values), values, dict(why or {})
    )


def _seconds(value: float) -> str:
    return f"{value:g}s" if value < 1_000_000 else f"{int(value)}s"
