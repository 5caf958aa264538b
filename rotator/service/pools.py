"""Which node of its pool an engine gets: the one it had, else the one whose GPUs were promised least."""

from collections import defaultdict
from collections.abc import Callable, Mapping

from rotator.config import EngineConfig, FleetConfig
from rotator.config_nodes import split_gpu

_UNKNOWN_GIB = 80.0  # of an engine without a configured footprint: they must only be comparable


def gpu_names(engine: EngineConfig, node: str) -> tuple[str, ...]:
    """Its GPUs' names with their node; those that name one keep it."""
    return tuple(str(g) if split_gpu(g)[0] or not node else f"{node}/{g}" for g in engine.gpus)


def place(
    config: FleetConfig, exists: Callable[[str], bool], earlier: Mapping[str, str], away: frozenset[str] = frozenset()
) -> dict[str, str]:
    """A node for every engine, by its name; empty for this machine. ``exists`` says whether there is a GPU of that
    name, ``earlier`` where engines were, ``away`` which nodes do not answer: nobody new is sent there if it can be
    helped. An engine whose pool has no fitting node gets the pool's name, which no GPU has."""
    pools: dict[str, list[str]] = defaultdict(list)
    for node in config.nodes:
        if node.pool:
            pools[node.pool].append(node.name)
    chosen = {e.name: e.node or "" for e in config.engines if e.node not in pools}
    promised: dict[str, float] = defaultdict(float)
    for engine in config.engines:
        if engine.name in chosen:
            _promise(promised, engine, chosen[engine.name])
    for engine in config.engines:
        if engine.node is None or engine.name in chosen:
            continue
        fit = [n for n in pools[engine.node] if all(exists(name) for name in gpu_names(engine, n))]
        before = earlier.get(engine.name)
        if before not in fit:
            before = min(fit, key=lambda n: (n in away, _load(promised, engine, n)), default=engine.node)
        chosen[engine.name] = before
        _promise(promised, engine, before)
    return chosen


def _promise(promised: dict[str, float], engine: EngineConfig, node: str) -> None:
    for name in gpu_names(engine, node):
        promised[name] += engine.footprint.awake_gib if engine.footprint else _UNKNOWN_GIB


def _load(promised: Mapping[str, float], engine: EngineConfig, node: str) -> float:
    return max(promised[name] for name in gpu_names(engine, node))
