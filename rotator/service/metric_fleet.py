"""The fleet as gauges: engines, GPUs, host RAM, ledger and incidents, read from the loop's records at each scrape.

A scrape runs in the event loop's thread, between two decisions: it reads and changes nothing, and asks no engine, GPU
or ledger.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable

from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from rotator import __version__
from rotator.core.values import Health, State
from rotator.ports_nodes import HERE
from rotator.service.loop import Loop
from rotator.service.metric_table import Families
from rotator.service.operations import LedgerCheck
from rotator.service.records import EngineRuntime, GpuRecord, Moves

_MEASURED = ("rotator_engine_awake_bytes", "rotator_engine_residue_bytes", "rotator_engine_held_bytes")
_ENGINES = (
    "rotator_engine_state",
    "rotator_engine_launches_total",
    "rotator_engine_wakes_total",
    "rotator_engine_sleeps_total",
    "rotator_engine_moved_bytes_total",
    "rotator_engine_moving_seconds_total",
    "rotator_engine_last_move_bytes_per_second",
    *_MEASURED,
    "rotator_engine_host_bytes",
    "rotator_engine_canaries_total",
    "rotator_engine_failures",
    "rotator_engine_recent_faults",
)
_GPUS = (
    "rotator_gpu_info",
    "rotator_gpu_health",
    "rotator_gpu_total_bytes",
    "rotator_gpu_used_bytes",
    "rotator_gpu_foreign_bytes",
    "rotator_gpu_reserve_bytes",
    "rotator_gpu_ledger_bytes",
    "rotator_gpu_drift_bytes",
    "rotator_gpu_read_age_seconds",
)
_REST = (
    "rotator_swaps_active",
    "rotator_breaker_faults",
    "rotator_host_masters_bytes",
    "rotator_host_budget_bytes",
    "rotator_ledger_differences",
    "rotator_ledger_checked_timestamp_seconds",
    "rotator_ledger_healthy",
    "rotator_journal_owed",
    "rotator_journal_lag_seconds",
    "rotator_incidents_open",
    "rotator_build_info",
    "rotator_ready",
    "rotator_decision_errors_total",
)


class FleetGauges(Collector):
    """``checked`` is the last comparison of ledger and devices and when it was made, None before the first."""

    def __init__(self, loop: Loop, wall: Callable[[], float] = time.time) -> None:
        self.checked: tuple[LedgerCheck, float] | None = None
        self._loop = loop
        self._wall = wall

    def collect(self) -> Iterable[Metric]:
        families = Families((*_ENGINES, *_GPUS, *_REST))
        names = {id: gpu_name(gpu) for id, gpu in self._loop.fleet.gpus.items()}
        for engine in self._loop.all_runtimes():
            self._engine(families, engine, names)
        for gpu in self._loop.fleet.gpus.values():
            self._gpu(families, gpu)
        self._rest(families)
        return families.all()

    def _engine(self, families: Families, engine: EngineRuntime, names: dict[str, str]) -> None:
        name, counters = engine.name, engine.counters
        for state in State:
            families.add("rotator_engine_state", state is engine.state, name, state.value)
        families.add("rotator_engine_launches_total", counters.starts, name)
        families.add("rotator_engine_wakes_total", counters.wakes, name)
        families.add("rotator_engine_sleeps_total", counters.sleeps, name)
        _moves(families, name, "in", counters.into)
        _moves(families, name, "out", counters.out)
        for gpu in engine.gpus:
            sizes = (engine.awake_on(gpu), engine.residue_on(gpu), engine.charge_on(gpu))
            for metric, size in zip(_MEASURED, sizes, strict=True):
                families.add(metric, size, name, names.get(gpu, gpu))
        families.add("rotator_engine_host_bytes", engine.masters_bytes, name)
        for result, count in counters.canaries.items():
            families.add("rotator_engine_canaries_total", count, name, result)
        families.add("rotator_engine_failures", engine.failures, name)
        since_wall_s = self._loop.wall_s() - self._loop.world.config.recovery.breaker_window_s
        families.add("rotator_engine_recent_faults", sum(at > since_wall_s for at in engine.faults), name)

    def _gpu(self, families: Families, gpu: GpuRecord) -> None:
        info, name, loop = gpu.info, gpu_name(gpu), self._loop
        families.add("rotator_gpu_info", 1, name, info.id, info.name, info.node)
        for health in Health:
            families.add("rotator_gpu_health", health is gpu.health, name, health.value)
        families.add("rotator_gpu_total_bytes", info.total_bytes, name)
        families.add("rotator_gpu_foreign_bytes", gpu.foreign_bytes, name)
        families.add("rotator_gpu_reserve_bytes", gpu.reserve_bytes, name)
        ledger = gpu.foreign_bytes + sum(e.charge_on(info.id) for e in loop.all_runtimes() if info.id in e.gpus)
        families.add("rotator_gpu_ledger_bytes", ledger, name)
        if gpu.reading is None:
            return
        families.add("rotator_gpu_used_bytes", gpu.reading.used_bytes, name)
        moving = info.id in loop.claimed()  # an engine that comes is charged before its bytes are there
        families.add("rotator_gpu_drift_bytes", 0 if moving else gpu.reading.used_bytes - ledger, name)
        families.add("rotator_gpu_read_age_seconds", max(0.0, self._wall() - (gpu.read_at_wall_s or 0.0)), name)

    def _rest(self, families: Families) -> None:
        loop, world = self._loop, self._loop.world
        families.add("rotator_swaps_active", len(loop.active))
        families.add("rotator_breaker_faults", world.config.recovery.breaker_failures)
        used = loop.fleet.host_used_bytes()
        for node, budget in {HERE: loop.fleet.host_budget_bytes, **loop.fleet.node_budgets}.items():
            families.add("rotator_host_budget_bytes", budget, node)
            families.add("rotator_host_masters_bytes", used.get(node, 0), node)
        if self.checked is not None:
            check, at_wall_s = self.checked
            families.add("rotator_ledger_differences", len(check.differences))
            families.add("rotator_ledger_checked_timestamp_seconds", at_wall_s)
        families.add("rotator_ledger_healthy", world.ledger.healthy)
        families.add("rotator_journal_owed", world.journal.owed)
        families.add("rotator_journal_lag_seconds", world.journal.lag_s)
        for kind, count in Counter(i.kind for i in loop.incidents.open_ones()).items():
            families.add("rotator_incidents_open", count, kind)
        families.add("rotator_build_info", 1, __version__)
        families.add("rotator_ready", not loop.adopting and not loop.draining)
        families.add("rotator_decision_errors_total", loop.bugs)


def gpu_name(gpu: GpuRecord) -> str:
    """As the fleet file names it: its index, on another node after the node's name."""
    return f"{gpu.info.node}/{gpu.info.index}" if gpu.info.node else str(gpu.info.index)


def _moves(families: Families, engine: str, direction: str, moves: Moves) -> None:
    families.add("rotator_engine_moved_bytes_total", moves.bytes, engine, direction)
    families.add("rotator_engine_moving_seconds_total", moves.seconds, engine, direction)
    if moves.last_bytes_per_s is not None:
        families.add("rotator_engine_last_move_bytes_per_second", moves.last_bytes_per_s, engine, direction)
