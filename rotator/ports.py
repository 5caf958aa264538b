"""The Protocols through which decisions reach the world. Adapters implement them; tests write fakes by hand.

Every method that can block takes a deadline in seconds or is bounded by its implementer, and raises one of the errors
below: no adapter leaks another library's exception.

    RotatorError
    ├── EngineError          an engine did not do what it was asked
    │   ├── EngineUnreachable    no connection, or it closed
    │   ├── EngineTimeout        the deadline passed: its state is unknown
    │   └── EngineRefused        it answered with an error
    ├── LaunchError          a process or job could not be started (or was not found)
    │   ├── LauncherAway         what starts engines does not answer us: that says nothing about any engine
    │   ├── LaunchRefused        it answered with an error
    │   └── LaunchConflict       somebody else changed the job meanwhile
    ├── DeviceError          a GPU's reading failed
    │   └── DeviceTimeout        it hangs
    ├── NodeError            another machine's agent did not answer, or refused
    ├── ArchiveError         a Python environment could not be archived or restored
    └── LedgerError          the ledger could not be read or written
"""

from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from rotator.core.values import Depth, EngineName, GpuId, Level, State


class RotatorError(Exception):
    """The head of the tree."""


class EngineError(RotatorError):
    pass


class EngineUnreachable(EngineError):
    pass


class EngineTimeout(EngineError):
    pass


class EngineRefused(EngineError):
    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class LaunchError(RotatorError):
    pass


class LauncherAway(LaunchError):
    """``kind`` is ``unreachable``, ``leader`` (there is none now) or ``token`` (ours is refused)."""

    def __init__(self, message: str, kind: str = "unreachable") -> None:
        super().__init__(message)
        self.kind = kind


class LaunchRefused(LaunchError):
    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class LaunchConflict(LaunchError):
    pass


class DeviceError(RotatorError):
    pass


class DeviceTimeout(DeviceError):
    pass


class NodeError(RotatorError):
    pass


class ArchiveError(RotatorError):
    pass


class LedgerError(RotatorError):
    pass


# -- engines ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Probe:
    """One canary prompt. ``temperature`` 0 is greedy; a sampled probe carries a seed."""

    prompt: str
    max_tokens: int = 8
    temperature: float = 0.0
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Generation:
    """What a probe answered: token ids, the log-probability of each, and the runner-up's where given."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    runner_up_logprobs: tuple[float | None, ...]
    text: str


class EngineControl(Protocol):
    """An engine's operators' side (``adapters/vllm.py``): never reachable for clients."""

    async def version(self, url: str, *, deadline_s: float) -> str:
        """The engine's vLLM version, e.g. ``0.26.0``."""
        ...

    async def is_healthy(self, url: str, *, deadline_s: float) -> bool:
        """Whether it answers /health. False, never an error: this only says that the process is not dead."""
        ...

    async def is_sleeping(self, url: str, *, deadline_s: float) -> bool: ...

    async def served_models(self, url: str, *, deadline_s: float) -> tuple[str, ...]: ...

    async def can_freeze(self, url: str, levels: Collection[Level], *, deadline_s: float) -> bool:
        """Whether its release keeps streams through a sleep at each of these levels."""
        ...

    async def sleep(self, url: str, *, level: Level, abort: bool, deadline_s: float) -> None:
        """Put it to sleep, keeping requests in flight frozen; ``abort`` (an operator's force) ends them instead."""
        ...

    async def wake(self, url: str, *, level: Level, deadline_s: float) -> None:
        """Wake it whole; after level 2 also reload the weights and reset the prefix cache."""
        ...

    async def resume(self, url: str, *, deadline_s: float) -> None:
        """Let a paused scheduler (level 0) go on."""
        ...

    async def sleep_bytes(self, url: str, *, bytes_per_gpu: int, deadline_s: float) -> None:
        """Pause it, keeping requests in flight frozen, and free so many bytes on each of its GPUs: KV cache first, then
        weights. Asked again of one that sleeps so, it frees so many more. Only for elastic engines."""
        ...

    async def wake_bytes(self, url: str, *, deadline_s: float) -> None:
        """Bring back what ``sleep_bytes`` freed, and let it go on."""
        ...

    async def place_masters(self, url: str, *, where: str, deadline_s: float) -> None:
        """Where the masters of its weights are kept from now on: ``host``, ``disk``, or ``none`` while it is awake.
        Those that exist are moved or dropped before this returns. Only for engines whose allocator can."""
        ...

    async def generate(self, url: str, model: str, probe: Probe, *, deadline_s: float) -> Generation: ...

    async def metrics(self, url: str, *, deadline_s: float) -> str:
        """Its own metrics as Prometheus text. Wakes nothing and counts as no use."""
        ...

    async def counters(self, url: str, *, deadline_s: float) -> "EngineCounters":
        """What of its metrics tells whether it gets on."""
        ...

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class EngineCounters:
    """What an engine tells on /metrics, summed over its data-parallel ranks; 0 where it does not tell."""

    running: int = 0
    waiting: int = 0
    generated: float = 0.0
    prompted: float = 0.0
    steps: float = 0.0
    kv_share: float = 0.0
    drafts: float = 0.0
    accepted: tuple[float, ...] = ()


# -- processes and jobs ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class JobSpec:
    """A job to be: a file with its variables, or ``name`` in a site file. ``task`` is the engine's own; where empty it
    is the only one without a lifecycle."""

    file: str = ""
    variables: Mapping[str, Any] = field(default_factory=dict)
    site: str = ""
    name: str = ""
    task: str = ""


@dataclass(frozen=True, slots=True)
class LaunchSpec:
    """What a launcher needs to start one engine. ``command``, ``env`` and ``job`` are already expanded (port, GPUs)."""

    engine: EngineName
    launcher: str
    command: tuple[str, ...]
    env: Mapping[str, str]
    url: str
    log_path: str
    gpu_indices: tuple[int, ...] = ()
    workdir: str | None = None
    stop_grace_s: float = 20.0
    nodes: tuple[str, ...] = ("",)  # of its GPUs, the first one's first; the service's own machine is ""
    port: int = 0  # on which it listens there
    job: JobSpec | None = None


@dataclass(frozen=True, slots=True)
class Handle:
    """A started (or found) engine. ``ref`` is the launcher's own name for it and survives a service restart."""

    engine: EngineName
    launcher: str
    url: str
    ref: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class LauncherNews:
    """What a launcher learned by itself and no engine's state follows from. ``topic`` is what it is about (``away``,
    ``drift``, ``node``, ``log``): a later word on it replaces the former, one that is ``over`` takes it back.
    ``engine`` is None for what concerns all of its engines. ``kind`` is the event's, e.g. ``nomad.away``."""

    launcher: str
    engine: EngineName | None
    topic: str
    kind: str
    text: str
    over: bool = False


class Launcher(Protocol):
    async def start(self, spec: LaunchSpec) -> Handle:
        """Start it and return at once; readiness is the caller's business. Raises LaunchError with what to do."""
        ...

    async def find(self, spec: LaunchSpec, ref: Mapping[str, Any] | None) -> Handle | None:
        """Find an engine that an earlier life of the service started: by ``ref``, else by the mark it was started with.
        Must find one whose start was journalled but whose ref never was. None if it is not running."""
        ...

    async def is_alive(self, handle: Handle) -> bool: ...

    async def wait_exit(self, handle: Handle) -> str:
        """Return when the engine is gone, with how it ended in words (exit code, signal, last log line)."""
        ...

    async def stop(self, handle: Handle, *, grace_s: float) -> None:
        """End it with everything it started (SIGTERM, then SIGKILL to the group). Returns when nothing is left.
        A ``grace_s`` of 0 kills at once. Raises LaunchError naming the processes that would not go."""
        ...

    async def pids(self, handle: Handle) -> frozenset[int]:
        """Every process id that belongs to it now (empty where the launcher cannot know)."""
        ...

    async def evidence(self, handle: Handle) -> str:
        """What its log says of its trouble, on one line: errors of CUDA first, then its last lines. Never raises;
        empty where there is nothing."""
        ...


class EngineLogs(Protocol):
    def read(self, path: str, *, lines: int, follow: bool) -> AsyncGenerator[tuple[str, ...]]:
        """Batches of an engine's log lines, secrets taken out: first the last ``lines`` (one batch, maybe empty), then
        with ``follow`` what is added, until closed. Raises LaunchError for a file that does not answer."""
        ...


# -- devices ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class GpuInfo:
    """What does not change while the machine runs."""

    id: GpuId
    index: int
    name: str
    total_bytes: int
    compute_capability: tuple[int, int] = (0, 0)
    pci_bus_id: str = ""
    unified_memory: bool = False
    node: str = ""  # the machine it is in; empty for the service's own


@dataclass(frozen=True, slots=True)
class GpuReading:
    """One reading. ``by_pid`` is None where the driver does not tell bytes by process (some containers, GB10)."""

    id: GpuId
    used_bytes: int
    total_bytes: int
    by_pid: Mapping[int, int] | None = None
    utilization: float | None = None


class Devices(Protocol):
    async def inventory(self, *, deadline_s: float) -> tuple[GpuInfo, ...]: ...

    async def read(self, gpu: GpuId, *, deadline_s: float) -> GpuReading:
        """Raises DeviceTimeout when the query hangs (the caller is never blocked past the deadline, and a hung query
        is not piled upon by further ones), DeviceError when it fails."""
        ...


@dataclass(frozen=True, slots=True)
class HostMemory:
    total_bytes: int
    available_bytes: int


# -- the ledger ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Intent:
    """A transition about to happen: written before it starts."""

    swap_id: str
    engine: EngineName
    action: str  # Action, or "adopt"
    from_state: State
    to_state: State
    reason: str
    plan: Mapping[str, Any] = field(default_factory=dict)  # the Swap it belongs to, as JSON
    at_wall_s: float = 0.0
    decision: str | None = None  # what the swap was decided from, packed; comes with one intent of each swap


@dataclass(frozen=True, slots=True)
class Outcome:
    """How it ended: ``result`` is ok, failed, abandoned or resolved (by a restart that asked engine and GPUs)."""

    result: str
    state: State
    error: str | None = None
    phases_s: Mapping[str, float] = field(default_factory=dict)
    bytes_before: Mapping[GpuId, int] = field(default_factory=dict)
    bytes_after: Mapping[GpuId, int] = field(default_factory=dict)
    at_wall_s: float = 0.0


@dataclass(frozen=True, slots=True)
class EngineRecord:
    """What a restart needs to find and judge an engine again."""

    engine: EngineName
    state: State
    depth: Depth | None = None
    level: Level | None = None
    launcher: str = ""
    url: str = ""
    ref: Mapping[str, Any] = field(default_factory=dict)
    spec_hash: str = ""  # of command, environment, GPUs: a changed one must not be adopted silently
    version: str = ""
    canary: Mapping[str, Any] | None = None  # the golden generation of this launch, as canary.py wrote it
    failures: int = 0
    reason: str = ""
    wake_s: float | None = None  # measured, smoothed: from its preferred level
    sleep_s: float | None = None
    start_s: float | None = None
    wake_costs: Mapping[str, float] | None = None  # the same by Depth
    history: Mapping[str, Any] | None = None  # of its clients' requests, as core.history wrote it
    faults: tuple[float, ...] = ()  # Unix seconds of its latest ones, for the breaker


@dataclass(frozen=True, slots=True)
class Residency:
    """Bytes of one engine on one GPU: planned by the configuration, measured when seen."""

    engine: EngineName
    gpu: GpuId
    planned_awake_bytes: int | None = None
    awake_bytes: int | None = None
    residue_bytes: int | None = None
    held_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Lease:
    """A claim on a GPU's bytes. ``holder`` is an engine's name, or what an operator called it."""

    gpu: GpuId
    holder: str
    bytes: int
    expires_wall_s: float | None = None


@dataclass(frozen=True, slots=True)
class Reservation:
    """Engines that are kept awake once, from its begin until its end. ``id`` is the ledger's; 0 before it has one."""

    engines: tuple[EngineName, ...]
    begins_wall_s: float
    ends_wall_s: float
    priority: int = 0
    note: str = ""
    id: int = 0


@dataclass(frozen=True, slots=True)
class NodeRecord:
    """One machine as its agent last told of it."""

    name: str
    agent: str = ""
    boot_id: str = ""
    host_bytes: int = 0
    reachable: bool = False
    reason: str = ""  # why it is not
    seen_at_wall_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Incident:
    """Something that a person may want to know of. ``id`` is also its bundle's name. Open while ``closed_wall_s`` is
    None."""

    id: str
    opened_wall_s: float
    kind: str  # wedged, garbage, crashed, silent, failed, lied, crash_loop, acceptance, slow, residue, gpu_*
    severity: str  # serious: requests were hurt or a GPU is out; warning: nothing was, yet
    reason: str
    engine: EngineName | None = None
    gpu: GpuId | None = None
    action: str = ""  # what the service does about it
    advice: str = ""  # what a person must do; '' where nothing
    outcome: str = ""  # how it ended
    closed_wall_s: float | None = None
    count: int = 1  # how often it happened while it was open
    bundle_bytes: int = 0  # 0: there is none


@dataclass(frozen=True, slots=True)
class OpenTransition:
    """An intent without an outcome: what was under way when the service died."""

    id: int
    intent: Intent


@dataclass(frozen=True, slots=True)
class Recovered:
    """Everything that an earlier life of the service left behind."""

    engines: Mapping[EngineName, EngineRecord]
    residencies: tuple[Residency, ...]
    leases: tuple[Lease, ...]
    open_transitions: tuple[OpenTransition, ...]
    cordons: frozenset[GpuId] = frozenset()
    cordon_reasons: Mapping[GpuId, str] = field(default_factory=dict)
    incidents: tuple["Incident", ...] = ()  # the latest, newest first
    reservations: tuple[Reservation, ...] = ()  # that have not ended
    gpus: tuple[GpuInfo, ...] = ()  # as they were last seen, of every node
    nodes: tuple["NodeRecord", ...] = ()


@dataclass(frozen=True, slots=True)
class Page:
    """One page of ledger rows, newest first. ``next_cursor`` is None at the end."""

    rows: tuple[Mapping[str, Any], ...]
    next_cursor: str | None


class Ledger(Protocol):
    """Truth that survives. Writes that a decision waits for are coroutines; the data plane only counts."""

    async def recover(self) -> Recovered: ...

    async def open_transition(self, intent: Intent) -> int:
        """Write the intent durably and return its id. Raises LedgerError: then the transition must not start."""
        ...

    async def close_transition(self, transition: int, outcome: Outcome) -> None: ...

    async def put_engine(self, record: EngineRecord) -> None: ...

    async def put_residencies(self, rows: Sequence[Residency]) -> None: ...

    async def put_lease(self, lease: Lease) -> None: ...

    async def drop_lease(self, gpu: GpuId, holder: str) -> None: ...

    async def put_gpus(self, gpus: Sequence[GpuInfo]) -> None: ...

    async def put_node(self, node: NodeRecord) -> None: ...

    async def put_cordon(self, gpu: GpuId, cordoned: bool, reason: str) -> None: ...

    async def put_incident(self, incident: Incident) -> None:
        """Write it as it is now."""
        ...

    async def add_reservation(self, made: Reservation) -> int:
        """Keep it and return its id."""
        ...

    async def drop_reservation(self, id: int) -> bool:
        """Whether it was there."""
        ...

    def count_request(self, model: str, *, waited_s: float, outcome: str) -> None:
        """Add to the model's totals in memory, written in batches; never blocks, never raises."""
        ...

    def sample_vram(self, at_wall_s: float, gpu: GpuId, used_bytes: int, by_holder: Mapping[str, int]) -> None:
        """Queue one VRAM sample (bounded; the oldest is dropped when full); never blocks, never raises."""
        ...

    async def query(
        self,
        table: str,
        *,
        filters: Mapping[str, str],
        limit: int = 100,
        cursor: str | None = None,
    ) -> Page:
        """Rows of gpus, engines, residencies, leases, transitions, decisions, reservations, requests, nodes and
        vram_samples."""
        ...

    @property
    def healthy(self) -> bool:
        """False after a failed write until one succeeds: no transition starts meanwhile. An unhealthy ledger tries
        small writes by itself, so that it becomes healthy again once there is room."""
        ...

    async def close(self) -> None: ...
