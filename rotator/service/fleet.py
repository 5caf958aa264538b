"""The fleet's state: records of GPUs and engines, how events change them, and the snapshot that the planner reads.

Only the loop's task calls what changes anything here.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Literal

from rotator.config import GIB, EngineConfig, FleetConfig
from rotator.config_nodes import split_gpu
from rotator.core import lifecycle, policy
from rotator.core.costs import preferred
from rotator.core.history import History
from rotator.core.lifecycle import Event, is_live
from rotator.core.values import Calendar, Command, Depth, Engine, Gpu, GpuId, Snapshot, State
from rotator.ports import EngineRecord, GpuInfo, GpuReading, Handle, LaunchSpec, Recovered, Residency
from rotator.ports_nodes import HERE, node_of
from rotator.service.owner import Facts
from rotator.service.records import EngineRuntime, GpuRecord
from rotator.service.sight import engine_seen
from rotator.service.traffic import Traffic
from rotator.service.wording import Wording

_VLLM_SHARE = 0.92  # vLLM's own default for --gpu-memory-utilization (0.9 until 0.14; 0.92 is the safer plan)
NO_CALENDAR = Calendar()


class Fleet:
    def __init__(self, config: FleetConfig, traffic: Traffic, wall: Callable[[], float] = time.time) -> None:
        self.config = config
        self._traffic = traffic
        self._wall = wall
        self.gpus: dict[GpuId, GpuRecord] = {}
        self.engines: dict[str, EngineRuntime] = {}
        self.names: dict[str, str] = {}  # every name and alias to its engine
        self.host_budget_bytes = 0
        self.node_budgets: dict[str, int] = {}  # other nodes' RAM for masters

    # -- events ------------------------------------------------------------------------------------------------------

    def apply(self, name: str, event: Event, facts: Facts, now_s: float) -> EngineRuntime:
        """Move an engine by the lifecycle table and note what was learned. Raises LifecycleError."""
        engine = self.engines[name]
        engine.state = lifecycle.next_state(engine.state, event)
        engine.since_wall_s = self._wall()
        engine.reason = facts.reason or engine.reason
        self.learn(engine, facts)
        engine.held_bytes = dict(facts.held_bytes) if facts.held_bytes is not None else None
        self._count(engine, event, now_s)
        return engine

    def learn(self, engine: EngineRuntime, facts: Facts) -> None:
        for name in ("handle", "version", "freezes", "golden", "canary", "level", "depth", "pids", "masters"):
            value = getattr(facts, name)
            if value is not None:
                setattr(engine, name, value)
        if facts.awake_bytes:
            engine.awake_bytes.update(facts.awake_bytes)
        if facts.residue_bytes:
            engine.residue_bytes.update(facts.residue_bytes)
        if facts.host_bytes is not None:
            engine.measured_host_bytes = facts.host_bytes
        if facts.wake_s is not None:
            self._learn_wake(engine, facts.wake_s)
        for name in ("sleep_s", "start_s"):
            if (measured := getattr(facts, name)) is not None:
                setattr(engine.costs, name, policy.smooth(getattr(engine.costs, name), measured))
        if facts.unseen is not None:
            engine.unseen = facts.unseen
        _count_moves(engine, facts)

    def _learn_wake(self, engine: EngineRuntime, seconds: float) -> None:
        """A wake is measured by what it had to bring back: the depth is still the sleep's."""
        costs, usual = engine.costs, preferred(engine.config.levels)
        depth = engine.depth or usual
        costs.wakes[depth] = policy.smooth(costs.wakes.get(depth), seconds)
        if depth is usual:
            costs.wake_s = costs.wakes[depth]

    def _count(self, engine: EngineRuntime, event: Event, now_s: float) -> None:
        counters = engine.counters
        match event:
            case Event.WOKE:
                counters.wakes += 1
                engine.failures = 0  # it slept, woke and answered: whatever was wrong is over
            case Event.STARTED:
                counters.starts += 1
            case Event.SLEEP:
                engine.frozen_since_s = now_s
            case Event.SLEPT:
                counters.sleeps += 1
                engine.slept_at_s = now_s
            case Event.ADOPTED_ASLEEP:
                engine.slept_at_s = now_s
            case Event.FAULT:
                engine.failures += 1
                engine.after_stop = Event.GONE_FAULTY
            case Event.LIED:
                engine.after_stop = Event.GONE_LIAR
            case Event.GONE | Event.GONE_FAULTY | Event.GONE_LIAR:
                engine.handle, engine.depth, engine.pids, engine.masters = None, None, frozenset(), False
        if engine.state in (State.AWAKE, State.ASLEEP) or event is Event.GONE:
            engine.preload = False  # it runs, or an operator's stop is the later word
        if engine.state is State.AWAKE and event is not Event.DRAIN_ABANDONED:
            engine.depth = None
            engine.awake_since_s = now_s

    # -- readings ----------------------------------------------------------------------------------------------------

    def read(self, gpu: GpuId, reading: GpuReading | None, error: str | None, *, claimed: bool, current: bool) -> None:
        """Note a reading. What is foreign is judged by process where the driver tells; else by difference, and then
        only while nothing moves on the GPU (``claimed``). A reading from before the last change there (not
        ``current``) shows bytes of engines that have gone or changed: it says nothing about who holds what."""
        record = self.gpus[gpu]
        record.unreadable = error
        if reading is None:
            return
        record.reading, record.read_at_wall_s = reading, self._wall()
        if not current:
            return
        engines = [e for e in self.engines.values() if gpu in e.gpus]
        if reading.by_pid is not None:
            self._attribute(gpu, reading.by_pid, engines)
        told = reading.by_pid is not None and all(e.pids or not e.live for e in engines)
        if told or not claimed:  # one that still starts is charged with what it will hold, not with what it does
            record.foreign_bytes = max(0, reading.used_bytes - sum(e.charge_on(gpu) for e in engines))

    def _attribute(self, gpu: GpuId, by_pid: Mapping[int, int], engines: Iterable[EngineRuntime]) -> None:
        for engine in engines:
            if engine.pids:
                held = sum(size for pid, size in by_pid.items() if pid in engine.pids)
                engine.held_bytes = {**(engine.held_bytes or {}), gpu: held}

    # -- what the planner sees ---------------------------------------------------------------------------------------

    def snapshot(
        self,
        now_s: float,
        claimed: frozenset[GpuId],
        commands: tuple[Command, ...],
        calendar: Calendar = NO_CALENDAR,
    ) -> Snapshot:
        used = self.host_used_bytes()
        return Snapshot(
            now_s=now_s,
            gpus={
                g.info.id: Gpu(
                    g.info.id,
                    g.info.total_bytes,
                    g.foreign_bytes,
                    g.reserve_bytes,
                    g.health,
                    g.swaps.share(now_s),
                    g.cordoned or "",
                )
                for g in self.gpus.values()
            },
            engines={e.name: self._seen(e, now_s) for e in self.engines.values()},
            host_budget_bytes=self.host_budget_bytes,
            host_used_bytes=used.pop(HERE, 0),
            node_budgets=dict(self.node_budgets),
            node_used=used,
            claimed=claimed,
            commands=commands,
            policy=replace(self.config.policies.core(), restart_quiet_s=self.config.watchdog.quiet_s),
            calendar=calendar,
        )

    def host_used_bytes(self) -> dict[str, int]:
        """Host RAM that masters take, by machine."""
        used: dict[str, int] = {}
        for engine in self.engines.values():
            for node, size in self.masters_by_node(engine, engine.masters_bytes).items():
                used[node] = used.get(node, 0) + size
        return used

    def masters_by_node(self, engine: EngineRuntime, size: int) -> dict[str, int]:
        """So many bytes of an engine's masters, each rank's in the RAM of its GPU's machine."""
        if not self.node_budgets:
            return {HERE: size}
        by: dict[str, int] = {}
        for gpu in engine.gpus:
            by[node_of(gpu)] = by.get(node_of(gpu), 0) + size // len(engine.gpus)
        return by

    def _seen(self, engine: EngineRuntime, now_s: float) -> Engine:
        engine.history = self._traffic.history(engine.name)
        unified = any(self.gpus[gpu].info.unified_memory for gpu in engine.gpus)
        nodes = tuple(map(node_of, engine.gpus)) if self.node_budgets else ()
        return engine_seen(engine, self._traffic, self.config.policies, now_s, unified=unified, nodes=nodes)

    # -- configuration and memory of earlier lives -------------------------------------------------------------------

    def configure_gpus(self, config: FleetConfig, inventory: Iterable[GpuInfo]) -> list[str]:
        """Take the GPUs that the configuration names. Returns problems in words."""
        infos = tuple(inventory)
        wanted, problems = _chosen(config.devices.gpus, infos, HERE, "devices")
        for node in config.nodes:
            more, wrong = _chosen(node.gpus, infos, node.name, f"nodes '{node.name}'")
            wanted, problems = wanted + more, problems + wrong
        reserve = int(config.devices.reserve_gib * GIB)
        for info in wanted:
            record = self.gpus.get(info.id)
            if record is None:
                self.gpus[info.id] = GpuRecord(info, reserve)
            else:
                record.reserve_bytes = reserve
        return problems

    def wording(self) -> Wording:
        places = {id: f" of {g.info.node}" if g.info.node else "" for id, g in self.gpus.items()}
        return Wording({id: f"GPU {g.info.index}{places[id]}" for id, g in self.gpus.items()})

    def gpu_id(self, name: int | str) -> GpuId | None:
        """A GPU by index or UUID (of another node: after its name and a slash), if the service may use it."""
        node, gpu = split_gpu(name)
        mine = (g.info for g in self.gpus.values() if g.info.node == node)
        return next((info.id for info in mine if gpu in (str(info.index), split_gpu(info.id)[1])), None)

    def add_engine(self, config: EngineConfig, url: str, spec: LaunchSpec, gpus: tuple[GpuId, ...]) -> EngineRuntime:
        planned = tuple(planned_awake_bytes(config, self.gpus[g]) for g in gpus)
        engine = EngineRuntime(config, gpus, planned, url, spec, since_wall_s=self._wall())
        engine.preload, engine.pinned = config.preload, config.pin
        self.engines[config.name] = engine
        self.index_names()
        return engine

    def remove_engine(self, name: str) -> None:
        engine = self.engines.pop(name)
        if engine.watch:
            engine.watch.cancel()
        self.index_names()

    def index_names(self) -> None:
        self.names = {n: e.name for e in self.engines.values() for n in (e.name, *e.config.aliases)}

    def remember(self, recovered: Recovered) -> None:
        """Take over what an earlier life measured; states come from asking, never from memory."""
        for engine in self.engines.values():
            if record := recovered.engines.get(engine.name):
                _remember_engine(engine, record)
                if record.history:
                    self._traffic.remember(engine.name, History.of_json(record.history))
        for row in recovered.residencies:
            if (owner := self.engines.get(row.engine)) and row.gpu in owner.gpus:
                _remember_residency(owner, row)
        for gpu in recovered.cordons:
            if gpu in self.gpus:
                reason = recovered.cordon_reasons.get(gpu)
                self.gpus[gpu].cordoned = reason or "cordoned before the service was restarted"


def _count_moves(engine: EngineRuntime, facts: Facts) -> None:
    counters = engine.counters
    if facts.moved_bytes:
        moves, seconds = (counters.into, facts.wake_s) if facts.wake_s is not None else (counters.out, facts.sleep_s)
        moves.add(facts.moved_bytes, seconds or 0.0)
    if facts.canary in counters.canaries:
        counters.canaries[facts.canary] += 1


def planned_awake_bytes(config: EngineConfig, gpu: GpuRecord) -> int:
    """What to plan with before the first measurement: the configured footprint, else vLLM's share of the GPU."""
    if config.footprint:
        return int(config.footprint.awake_gib * GIB)
    return int(_share(config.command) * gpu.info.total_bytes)


def _share(command: tuple[str, ...]) -> float:
    flag = "--gpu-memory-utilization"
    for i, word in enumerate(command):
        value = word.partition("=")[2] if word.startswith(f"{flag}=") else None
        if word == flag and i + 1 < len(command):
            value = command[i + 1]
        if value:
            try:
                return float(value)
            except ValueError:
                return _VLLM_SHARE
    return _VLLM_SHARE


def _remember_engine(engine: EngineRuntime, record: EngineRecord) -> None:
    engine.costs.wake_s, engine.costs.sleep_s, engine.costs.start_s = record.wake_s, record.sleep_s, record.start_s
    engine.costs.wakes = {Depth(name): seconds for name, seconds in (record.wake_costs or {}).items()}
    if engine.costs.wake_s is not None:
        engine.costs.wakes.setdefault(preferred(engine.config.levels), engine.costs.wake_s)
    engine.golden, engine.version, engine.level = record.canary, record.version, record.level
    engine.failures, engine.faults = record.failures, tuple(record.faults)
    engine.was_ending = record.state is State.STOPPING
    engine.drifted = bool(record.spec_hash) and record.spec_hash != engine.config.spec_hash()
    if record.ref:
        engine.started_as = record.spec_hash if engine.drifted and is_live(record.state) else ""
        engine.handle = Handle(engine.name, record.launcher, record.url, record.ref)


def _remember_residency(engine: EngineRuntime, row: Residency) -> None:
    engine.held_before[row.gpu] = row.held_bytes
    if row.awake_bytes is not None:
        engine.awake_bytes[row.gpu] = row.awake_bytes
    if row.residue_bytes is not None:
        engine.residue_bytes[row.gpu] = row.residue_bytes


def _chosen(
    wanted: Literal["all"] | tuple[int | str, ...], inventory: tuple[GpuInfo, ...], node: str, place: str
) -> tuple[list[GpuInfo], list[str]]:
    """Of one node's GPUs those that the service may use, and what is wrong with the choice."""
    infos = [info for info in inventory if info.node == node]
    if wanted == "all":
        return infos, []
    chosen, problems = [], []
    for name in wanted:
        match = next((i for i in infos if str(name) in (str(i.index), split_gpu(i.id)[1])), None)
        if match:
            chosen.append(match)
        else:
            have = ", ".join(f"{i.index} ({i.id})" for i in infos) or "none"
            problems.append(f"{place}.gpus: there is no GPU '{name}': {'it' if node else 'this machine'} has {have}")
    return chosen, problems
