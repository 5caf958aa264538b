"""The simulated machine: GPUs, engines with their footprints, and what a transition of each costs.

Costs are stock vLLM 0.26's, measured on H200 with dummy bf16 weights (docs/measurements.md says how ours compare):

    =============================  =======================  =======================
    .                              1 GPU, 33.5 GiB weights   4 GPUs, 28 GiB on each
    =============================  =======================  =======================
    later sleeps                   0.71 s                    0.97-1.17 s
    wake                           1.07-1.11 s               1.16-1.37 s
    8 tokens after the wake        0.2 s                     0.6 s
    cold start                     36-69 s                   64-77 s
    pinned copy, to the GPU        51 GiB/s                  41 GiB/s each
    pinned copy, to the host       51 GiB/s                  31 GiB/s each
    =============================  =======================  =======================

A transition is a fixed part, which grows with the ranks, and the weights over the link. Links share the host: with n
GPUs copying at once each gets the smaller of a lone link's speed and an n-th of what four reached together. The number
of copying GPUs is taken when a transition begins and not corrected when others begin or end.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from rotator.config import GIB, EngineConfig, FleetConfig
from rotator.core.values import Level

GPU_GIB_DEFAULT = 141.0  # an H200; the fleet file does not say, the service asks the driver


class MachineError(Exception):
    """The fleet cannot be simulated. The text says what to change."""


@dataclass(frozen=True, slots=True)
class Costs:
    """What transitions cost. Speeds in GiB/s a GPU, times in seconds; ``_rank_s`` is added for each rank but the first.

    ``copy_out`` is whether a sleep copies the weights to the host (stock), or finds its masters kept there.
    """

    alone_gib_s: float = 51.0
    to_gpu_all_gib_s: float = 164.0
    to_host_all_gib_s: float = 124.0
    sleep_s: float = 0.05
    sleep_rank_s: float = 0.04
    wake_s: float = 0.42
    wake_rank_s: float = 0.057
    canary_s: float = 0.2
    canary_rank_s: float = 0.13
    start_s: float = 50.0
    start_rank_s: float = 7.0
    stop_s: float = 5.0  # an assumption: kill by process group, and the driver gives the bytes back
    copy_out: bool = True


STOCK = Costs()
MASTERS = Costs(copy_out=False)
"""An allocator that keeps its masters: a sleep only unmaps (0.05 s on one GPU, 0.45 s at TP=4 in a prototype)."""


@dataclass(frozen=True, slots=True)
class Spec:
    """One engine, as far as a replay needs it. Byte tuples run parallel to ``gpus`` (indices).

    ``slots`` is how many requests it serves at once (vLLM's max_num_seqs); each takes its own service seconds whoever
    serves beside it, and one that comes when all slots are taken waits inside the engine.
    """

    name: str
    gpus: tuple[int, ...]
    awake_bytes: tuple[int, ...]
    residue_bytes: tuple[int, ...]
    host_bytes: int
    slots: int
    levels: tuple[Level, ...] = (Level.HOST,)
    pinned: bool = False
    preload: bool = False
    priority: int = 0
    drain_bound_s: float | None = None
    wait_deadline_s: float = 600.0
    queue_max: int = 256
    freezes_max: int = 8

    @property
    def is_heavy(self) -> bool:
        return len(self.gpus) > 1

    @property
    def weight_gib(self) -> float:
        """Weights on each GPU, in GiB: what a sleep at level 1 puts into host RAM."""
        return self.host_bytes / len(self.gpus) / GIB


@dataclass(frozen=True, slots=True)
class Machine:
    gpu_bytes: tuple[int, ...]  # usable by plans: the reserve is taken off
    host_bytes: int
    specs: tuple[Spec, ...]
    costs: Costs = STOCK

    def sleep_s(self, spec: Spec, copying: int) -> float:
        """How long a sleep at level 1 takes, with ``copying`` GPUs on the links, its own counted."""
        costs, ranks = self.costs, len(spec.gpus)
        fixed = costs.sleep_s + costs.sleep_rank_s * (ranks - 1)
        if not costs.copy_out:
            return fixed + (costs.sleep_rank_s * 7 if ranks > 1 else 0.0)
        return fixed + spec.weight_gib / min(costs.alone_gib_s, costs.to_host_all_gib_s / copying)

    def wake_s(self, spec: Spec, copying: int) -> float:
        """How long a wake from host RAM takes, without its canary."""
        costs = self.costs
        fixed = costs.wake_s + costs.wake_rank_s * (len(spec.gpus) - 1)
        return fixed + spec.weight_gib / min(costs.alone_gib_s, costs.to_gpu_all_gib_s / copying)

    def canary_s(self, spec: Spec) -> float:
        return self.costs.canary_s + self.costs.canary_rank_s * (len(spec.gpus) - 1)

    def start_s(self, spec: Spec) -> float:
        return self.costs.start_s + self.costs.start_rank_s * (len(spec.gpus) - 1)

    def reload_s(self, spec: Spec) -> float:
        """A wake from level 2 reads the weights from files again: half a start, the planner's own guess."""
        return self.start_s(spec) / 2

    def swap_s(self, spec: Spec) -> float:
        """A wake and a later sleep of the engine, alone on the links: what its turn costs."""
        ranks = len(spec.gpus)
        return self.sleep_s(spec, ranks) + self.wake_s(spec, ranks) + self.canary_s(spec)

    def index(self) -> Mapping[str, int]:
        return {spec.name: i for i, spec in enumerate(self.specs)}


def machine_of(fleet: FleetConfig, *, gpu_gib: float = GPU_GIB_DEFAULT, costs: Costs = STOCK) -> Machine:
    """The machine that a fleet file describes, on GPUs of ``gpu_gib``. Raises MachineError."""
    names = {name: i for i, name in enumerate(sorted({g for e in fleet.engines for g in e.gpus}, key=str))}
    usable = int((gpu_gib - fleet.devices.reserve_gib) * GIB)
    specs = tuple(_spec(fleet, engine, tuple(names[g] for g in engine.gpus)) for engine in fleet.engines)
    for spec in specs:
        if max(spec.awake_bytes) > usable:
            need = max(spec.awake_bytes) / GIB
            raise MachineError(
                f"engine '{spec.name}' needs {need:.1f} GiB on a GPU and {usable / GIB:.1f} are usable: "
                "lower its footprint, or give --gpu-gib"
            )
    host_gib = fleet.host_memory_gib
    host = sum(spec.host_bytes for spec in specs) if host_gib is None else int(host_gib * GIB)
    return Machine((usable,) * len(names), host, specs, costs)


def _spec(fleet: FleetConfig, engine: EngineConfig, gpus: tuple[int, ...]) -> Spec:
    if engine.footprint is None:
        raise MachineError(f"engine '{engine.name}' has no footprint: give awake_gib, residue_gib and host_gib")
    foot, gateway, n = engine.footprint, fleet.gateway, len(gpus)
    freed_gib = (foot.awake_gib - foot.residue_gib) * n
    return Spec(
        name=engine.name,
        gpus=gpus,
        awake_bytes=(int(foot.awake_gib * GIB),) * n,
        residue_bytes=(int(foot.residue_gib * GIB),) * n,
        host_bytes=int((freed_gib if foot.host_gib is None else foot.host_gib) * GIB),
        slots=engine.slots,
        levels=engine.levels,
        pinned=engine.pin,
        preload=engine.preload,
        priority=engine.priority,
        drain_bound_s=engine.drain_bound_s,
        wait_deadline_s=engine.wait_deadline_s or gateway.wait_deadline_s,
        queue_max=engine.queue_max or gateway.queue_max,
        freezes_max=gateway.freezes_max,
    )
