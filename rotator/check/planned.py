"""Engines as the planner would see them, from the file and from what an earlier life of the service measured."""

from collections.abc import Iterable, Mapping

from rotator.check.jobs import job_words
from rotator.check.vllm import memory_share
from rotator.config import GIB, EngineConfig, FleetConfig
from rotator.config_nodes import split_gpu
from rotator.core.values import Engine, Gpu, GpuId, State
from rotator.ports import GpuInfo, Recovered, Residency
from rotator.service.pools import gpu_names, place

_RESIDUE_GIB = 2.0
# Seconds that nobody has measured yet are taken at their best: bounds that fail even so are wrong on any machine.
_WAKE_S, _SLEEP_S, _START_S = 1.0, 1.0, 90.0


def ledger_url(fleet: FleetConfig) -> str:
    """Where the service keeps its ledger."""
    return fleet.ledger.url or f"sqlite:///{fleet.state_dir / 'ledger.db'}"


def names_gpu(name: int | str, info: GpuInfo) -> bool:
    node, gpu = split_gpu(name)
    return info.node == node and gpu in (str(info.index), split_gpu(info.id)[1])


def is_allowed(fleet: FleetConfig, info: GpuInfo) -> bool:
    chosen = next((node.gpus for node in fleet.nodes if node.name == info.node), fleet.devices.gpus)
    return chosen == "all" or any(str(name) in (str(info.index), split_gpu(info.id)[1]) for name in chosen)


def placed(fleet: FleetConfig, inventory: Iterable[GpuInfo]) -> FleetConfig:
    """The fleet with every engine's GPUs named with their node, as the service would place them."""
    if not fleet.nodes:
        return fleet
    infos = tuple(inventory)
    places = place(fleet, lambda name: any(names_gpu(name, info) for info in infos), {})
    engines = tuple(e.model_copy(update={"gpus": gpu_names(e, places[e.name]), "node": None}) for e in fleet.engines)
    return fleet.model_copy(update={"engines": engines})


def planned_gpus(fleet: FleetConfig, infos: Mapping[GpuId, GpuInfo]) -> dict[GpuId, Gpu]:
    reserve = int(fleet.devices.reserve_gib * GIB)
    return {id: Gpu(id, info.total_bytes, reserve_bytes=reserve) for id, info in infos.items()}


def planned_engines(fleet: FleetConfig, infos: Mapping[GpuId, GpuInfo], known: Recovered | None = None) -> list[Engine]:
    """Every engine whose GPUs are all there, stopped; measured bytes and seconds go before configured ones."""
    found = (planned_engine(engine, infos, known) for engine in fleet.engines)
    return [engine for engine in found if engine is not None]


def planned_engine(
    engine: EngineConfig, infos: Mapping[GpuId, GpuInfo], known: Recovered | None = None
) -> Engine | None:
    own = [info for name in engine.gpus for info in infos.values() if names_gpu(name, info)]
    if len(own) != len(engine.gpus):
        return None
    rows = {r.gpu: r for r in (known.residencies if known else ()) if r.engine == engine.name}
    record = known.engines.get(engine.name) if known else None
    share = memory_share(job_words(engine) or engine.command)
    awake = [_awake_bytes(engine, info, rows.get(info.id), share) for info in own]
    residue = [_residue_bytes(engine, rows.get(info.id), size) for info, size in zip(own, awake, strict=True)]
    footprint = engine.footprint
    kv = int(footprint.kv_gib * GIB) if footprint else 0
    return Engine(
        name=engine.name,
        gpus=tuple(info.id for info in own),
        state=State.STOPPED,
        awake_bytes=tuple(awake),
        residue_bytes=tuple(residue),
        host_bytes=_host_bytes(engine, awake, residue),
        levels=engine.levels,
        can_stop=engine.launcher != "attach",
        pinned=engine.pin,
        priority=engine.priority,
        kv_bytes=tuple(min(kv, size) for size in awake) if kv else (),
        elastic=engine.elastic,
        wake_cost_s=(record.wake_s if record else None) or _WAKE_S,
        sleep_cost_s=(record.sleep_s if record else None) or _SLEEP_S,
        start_cost_s=(record.start_s if record else None) or _START_S,
    )


def is_measured(engine: Engine, known: Recovered | None) -> bool:
    """Whether its awake bytes were measured on every GPU of it."""
    seen = {r.gpu for r in (known.residencies if known else ()) if r.engine == engine.name and r.awake_bytes}
    return seen.issuperset(engine.gpus)


def is_timed(engine: Engine, known: Recovered | None) -> bool:
    """Whether its wake and sleep were measured."""
    record = known.engines.get(engine.name) if known else None
    return record is not None and record.wake_s is not None and record.sleep_s is not None


def _awake_bytes(engine: EngineConfig, info: GpuInfo, row: Residency | None, share: float) -> int:
    if row is not None and row.awake_bytes:
        return row.awake_bytes
    return int(engine.footprint.awake_gib * GIB) if engine.footprint else int(share * info.total_bytes)


def _residue_bytes(engine: EngineConfig, row: Residency | None, awake_bytes: int) -> int:
    if row is not None and row.residue_bytes is not None:
        return row.residue_bytes
    return min(awake_bytes, int((engine.footprint.residue_gib if engine.footprint else _RESIDUE_GIB) * GIB))


def _host_bytes(engine: EngineConfig, awake: list[int], residue: list[int]) -> int:
    if 1 not in engine.sleep_levels:
        return 0
    if engine.footprint and engine.footprint.host_gib is not None:
        return int(engine.footprint.host_gib * GIB)
    return sum(awake) - sum(residue)  # at the worst all that a sleep frees
