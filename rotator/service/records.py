"""The loop's own mutable records. Only the loop's task writes them; everyone else gets frozen copies."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rotator.config import GIB, EngineConfig
from rotator.core import values
from rotator.core.gpu_faults import GpuHealth
from rotator.core.history import History, SwapTime
from rotator.core.lifecycle import Event, is_live
from rotator.core.placement import gib
from rotator.core.values import Command, Depth, GpuId, Health, Level, State
from rotator.ports import EngineRecord, GpuInfo, GpuReading, Handle, LaunchSpec, Residency

# Stock vLLM pins one buffer an allocation and rounds sizes up: 1.08 to 1.1 times the weights of dense bf16 models on
# H200 (docs/measurements.md has ours); reports of up to 1.8 exist. Only used until a sleep was measured.
_PINNING = 1.25
_RESIDUE_GROWS = GIB // 2  # by so much before it is no residue any more
_WAKE_TELLS = 2 * GIB  # a wake that brings less is not judged by its bytes


@dataclass(slots=True)
class GpuRecord:
    info: GpuInfo
    reserve_bytes: int
    reading: GpuReading | None = None
    read_at_wall_s: float | None = None
    foreign_bytes: int = 0
    moved_at_s: float = 0.0  # when an engine here last changed its state
    unreadable: str | None = None  # why the last reading failed; None when it succeeded
    cordoned: str | None = None  # the reason, an operator's or the watchdog's
    reported: GpuHealth | None = None  # what it last told of itself
    swaps: SwapTime = field(default_factory=SwapTime)  # those that interrupted somebody

    @property
    def health(self) -> Health:
        if self.unreadable is not None:
            return Health.UNKNOWN
        return Health.CORDONED if self.cordoned is not None else Health.OK


@dataclass(slots=True)
class Costs:
    """Measured seconds of this engine's own transitions, smoothed; None until first seen."""

    wake_s: float | None = None  # from its preferred level
    sleep_s: float | None = None
    start_s: float | None = None
    wakes: dict[Depth, float] = field(default_factory=dict)  # by what they had to bring back


@dataclass(slots=True)
class Moves:
    """VRAM that wakes filled, or sleeps freed, and what that took."""

    bytes: int = 0
    seconds: float = 0.0
    last_bytes_per_s: float | None = None

    def add(self, size: int, seconds: float) -> None:
        self.bytes += size
        self.seconds += seconds
        if seconds > 0:
            self.last_bytes_per_s = size / seconds


@dataclass(slots=True)
class Counters:
    wakes: int = 0
    sleeps: int = 0
    starts: int = 0
    into: Moves = field(default_factory=Moves)
    out: Moves = field(default_factory=Moves)
    canaries: dict[str, int] = field(default_factory=lambda: {"passed": 0, "failed": 0, "recorded": 0})

    @property
    def bytes_moved(self) -> int:
        return self.into.bytes + self.out.bytes


@dataclass(slots=True)
class EngineRuntime:
    """One engine as the loop knows it."""

    config: EngineConfig
    gpus: tuple[GpuId, ...]
    planned_awake_bytes: tuple[int, ...]
    url: str
    spec: LaunchSpec
    state: State = State.STOPPED
    depth: Depth | None = None
    level: Level | None = None
    reason: str = "never started"
    since_wall_s: float = 0.0
    awake_since_s: float = 0.0
    frozen_since_s: float = 0.0
    slept_at_s: float = 0.0
    handle: Handle | None = None
    version: str = ""
    freezes: bool = True  # its release knows mode=keep
    golden: Mapping[str, Any] | None = None
    canary: str = "never"
    pids: frozenset[int] = frozenset()
    weight_bytes: int | None = None  # of its model files, all ranks together
    measured_host_bytes: int | None = None  # host RAM that a sleep at level 1 took
    awake_bytes: dict[GpuId, int] = field(default_factory=dict)  # measured
    residue_bytes: dict[GpuId, int] = field(default_factory=dict)  # measured
    masters: bool = False  # masters of its weights are in host RAM
    history: History | None = None  # of its clients' requests; its gate's own
    held_bytes: dict[GpuId, int] | None = None  # by process, where the driver tells
    costs: Costs = field(default_factory=Costs)
    counters: Counters = field(default_factory=Counters)
    failures: int = 0
    faults: tuple[float, ...] = ()  # Unix seconds of the latest ones, for the breaker
    restart_why: str = ""  # what only a new launch mends
    recycling: bool = False  # it is being stopped in order to start again
    retry_at_s: float = 0.0
    preload: bool = False
    pinned: bool = False
    drifted: bool = False  # runs with another command than the configuration now says
    started_as: str = ""  # the spec hash of what runs, where it is not the configuration's
    yields_after_s: float = 0.0  # it refused to yield (streams that cannot freeze): do not ask again before
    sinks_after_s: float = 0.0  # it would not go deeper: do not ask again before
    after_stop: Event = Event.GONE
    watch: asyncio.Task[None] | None = None
    unhealthy_probes: int = 0
    notes: dict[str, str] = field(default_factory=dict)  # by topic: what its launcher has to say of it
    held_before: dict[GpuId, int] = field(default_factory=dict)  # as an earlier life wrote it down
    was_ending: bool = False  # an earlier life was about to end it
    unseen: bool = False  # nobody could tell whether it runs: its launcher did not answer

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def live(self) -> bool:
        return is_live(self.state)

    def awake_on(self, gpu: GpuId) -> int:
        """Bytes it needs awake on one of its GPUs: measured, else planned."""
        return self.awake_bytes.get(gpu, self.planned_awake_bytes[self.gpus.index(gpu)])

    def residue_on(self, gpu: GpuId) -> int:
        """Bytes that stay when it sleeps: measured, else planned."""
        if gpu in self.residue_bytes:
            return self.residue_bytes[gpu]
        footprint = self.config.footprint
        planned = int(footprint.residue_gib * GIB) if footprint else 2 * GIB
        return min(planned, self.awake_on(gpu))

    def holds_too_much(self, held: Mapping[GpuId, int], frees_min: float) -> str | None:
        """Of one that sleeps, and not by bytes alone: what it holds all the same, in words. ``frees_min`` is the share
        that a sleep frees at least."""
        for gpu, size in held.items():
            if size > max((1.0 - frees_min) * self.awake_on(gpu), self.residue_on(gpu) + _RESIDUE_GROWS):
                return f"it says it sleeps, but holds {gib(size)} on {gpu}"
        return None

    def woke_without_bytes(self, held: Mapping[GpuId, int], asleep: Mapping[GpuId, int]) -> str | None:
        """Of one that says it has woken: where it holds no more than it was charged asleep, in words."""
        for gpu, size in held.items():
            if self.awake_on(gpu) - asleep[gpu] > _WAKE_TELLS and size <= asleep[gpu] + _RESIDUE_GROWS:
                return f"it says it is awake, but holds {gib(size)} on {gpu}, as asleep"
        return None

    @property
    def kv_bytes(self) -> int:
        """Bytes of its KV cache on each GPU, as configured; 0 where that is not told."""
        footprint = self.config.footprint
        return int(footprint.kv_gib * GIB) if footprint else 0

    @property
    def masters_bytes(self) -> int:
        """Host RAM that its masters take now, or will when the sleep that was asked of it is done."""
        if self.depth is Depth.KV and self.state is State.ASLEEP:
            outs = (self.awake_on(gpu) - self.charge_on(gpu) - self.kv_bytes for gpu in self.gpus)
            return sum(max(0, out) for out in outs)
        if self.live and self.depth is Depth.HOST:  # also while it wakes or stops: they go when that is over
            return self.host_bytes
        if self.state is State.ASLEEP:
            return 0
        return self.host_bytes if self.live and self.masters and self.config.keeps_masters else 0

    @property
    def host_bytes(self) -> int:
        """Host RAM that its masters take at level 1: measured, configured, from the size of its model files, or at
        the worst all that a sleep frees."""
        if self.measured_host_bytes is not None:
            return self.measured_host_bytes
        footprint = self.config.footprint
        if footprint and footprint.host_gib is not None:
            return int(footprint.host_gib * GIB)
        frees = sum(self.awake_on(g) - self.residue_on(g) for g in self.gpus)
        return frees if self.weight_bytes is None else min(frees, int(_PINNING * self.weight_bytes))

    def charge_on(self, gpu: GpuId) -> int:
        """What the ledger says it holds on a GPU now."""
        if self.held_bytes is not None and gpu in self.held_bytes:
            return self.held_bytes[gpu]
        if not self.live:
            return 0  # what it left behind all the same is foreign
        deep = self.state is State.ASLEEP and self.depth is not Depth.KV
        return self.residue_on(gpu) if deep else self.awake_on(gpu)

    def residencies(self) -> tuple[Residency, ...]:
        return tuple(
            Residency(
                engine=self.name,
                gpu=gpu,
                planned_awake_bytes=self.planned_awake_bytes[i],
                awake_bytes=self.awake_bytes.get(gpu),
                residue_bytes=self.residue_bytes.get(gpu),
                held_bytes=self.charge_on(gpu),
            )
            for i, gpu in enumerate(self.gpus)
        )

    def record(self) -> EngineRecord:
        return EngineRecord(
            engine=self.name,
            state=self.state,
            depth=self.depth,
            level=self.level,
            launcher=self.config.launcher,
            url=self.url,
            ref=dict(self.handle.ref) if self.handle else {},
            spec_hash=self.started_as or self.config.spec_hash(),
            version=self.version,
            canary=dict(self.golden) if self.golden else None,
            failures=self.failures,
            faults=self.faults,
            reason=self.reason,
            wake_s=self.costs.wake_s,
            sleep_s=self.costs.sleep_s,
            start_s=self.costs.start_s,
            wake_costs={depth.value: seconds for depth, seconds in self.costs.wakes.items()},
            history=self.history.as_json() if self.history else None,
        )


@dataclass(slots=True)
class ActiveSwap:
    """A swap under way. ``unwanted`` is set while nobody waits for the engine it would wake."""

    id: str
    swap: values.Swap
    begun_at_s: float
    begun_wall_s: float
    commands: tuple[Command, ...] = ()
    seen: values.Snapshot | None = None  # what it was decided from
    interrupts: bool = False  # somebody was served by those who yield
    unwanted: asyncio.Event = field(default_factory=asyncio.Event)
    phases_s: dict[str, float] = field(default_factory=dict)
    timeline: list[tuple[str, str, float, float]] = field(default_factory=list)  # phase, engine, from, to: loop's clock
    error: str | None = None
    refused: set[str] = field(default_factory=set)  # victims that could not yield: asked again only after a while
    task: asyncio.Task[None] | None = None

    def concerns(self, engine: str) -> bool:
        admit = self.swap.admit
        return (admit is not None and admit.engine == engine) or any(s.engine == engine for s in self.swap.evict)

    def log_fields(self) -> dict[str, str]:
        """What a line of the log that is written for this swap says of it."""
        admit = self.swap.admit
        return {"swap": self.id} if admit is None else {"swap": self.id, "engine": admit.engine}
