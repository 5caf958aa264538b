"""The values that the planner reads and writes.

All byte counts are plain bytes, all times are seconds on one clock whose zero does not matter (the caller's
monotonic clock, or a simulator's). Per-GPU tuples of an engine run parallel to its ``gpus`` tuple.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from math import inf

GpuId = str
EngineName = str


class State(StrEnum):
    """Where an engine is in its life. The arrows between these are the table in ``lifecycle.py``."""

    STOPPED = "stopped"
    STARTING = "starting"
    AWAKE = "awake"
    DRAINING = "draining"
    FALLING_ASLEEP = "falling_asleep"
    ASLEEP = "asleep"
    WAKING = "waking"
    STOPPING = "stopping"
    FAILED = "failed"
    QUARANTINED = "quarantined"


class Depth(StrEnum):
    """How deep a sleeping engine sleeps: what a wake has to bring back."""

    KV = "kv"  # only the KV cache was released; weights are still in VRAM
    HOST = "host"  # level 1: weights in host RAM
    DISK = "disk"  # masters on disk
    DISCARDED = "discarded"  # level 2: weights are nowhere; a wake reloads them from the model files


class Health(StrEnum):
    """Whether decisions about a GPU can be trusted to its readings."""

    OK = "ok"
    UNKNOWN = "unknown"  # its query hangs or fails: engines there go on serving, no transition starts
    CORDONED = "cordoned"  # an operator keeps new work off it: engines there may sleep and stop, none wakes or starts


class Action(StrEnum):
    SLEEP = "sleep"
    WAKE = "wake"
    START = "start"
    STOP = "stop"
    SINK = "sink"  # a sleeping engine sleeps deeper, or an awake one gives its masters in host RAM up


class Level(IntEnum):
    """vLLM's own sleep levels."""

    PAUSE = 0
    HOST = 1
    DISCARD = 2


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU as last read: ``foreign_bytes`` are held by processes that are none of our engines."""

    id: GpuId
    total_bytes: int
    foreign_bytes: int = 0
    reserve_bytes: int = 0
    health: Health = Health.OK
    swapping: float = 0.0  # share of its recent time that swaps cost which interrupted somebody
    cordoned: str = ""  # why nothing new may come, also while it cannot be read


@dataclass(frozen=True, slots=True)
class Demand:
    """Who wants a model now, as totals: the planner never sees single requests."""

    waiting: int = 0
    oldest_wait_s: float = 0.0
    in_flight: int = 0
    frozen: int = 0  # in-flight streams that stand still in a sleeping engine; their wait counts as demand
    likely_wanted: float = 0.0  # chance in [0, 1] that a client asks for it within the horizon
    likely_why: str = ""  # what says so, in words
    soon: float = 0.0  # the same chance within the horizon of pre-waking
    weight: float | None = None  # those who wait, each client counted up to its share; None: all of them
    flying: float | None = None  # those in flight, each client counted up to its share; None: all of them
    service_s: float | None = None  # seconds that a request keeps it busy; None: none was seen to its end
    last_used_s: float = 0.0  # when a request last came or left; probes, scrapes and canaries do not count
    stall_left_s: float = inf  # how much longer its worst-off stream in flight may stand still


@dataclass(frozen=True, slots=True)
class Engine:
    """One engine as the loop knows it.

    ``awake_bytes`` and ``residue_bytes`` run parallel to ``gpus`` and are measured where a measurement exists, else
    planned from the configuration. ``held_bytes`` is what its processes hold right now where that was read.
    """

    name: EngineName
    gpus: tuple[GpuId, ...]
    state: State
    awake_bytes: tuple[int, ...]
    residue_bytes: tuple[int, ...]
    host_bytes: int = 0
    held_bytes: tuple[int, ...] | None = None
    depth: Depth | None = None
    levels: tuple[Level, ...] = (Level.HOST,)  # sleep levels it may use, the preferred one first
    can_stop: bool = True  # false for an attached engine: we did not start it, we do not stop it
    pinned: bool = False
    priority: int = 0
    demand: Demand = field(default_factory=Demand)
    can_freeze: bool = True  # streams survive a sleep, and none of them has used up its freezes
    awake_since_s: float = 0.0
    wake_cost_s: float = 1.0
    sleep_cost_s: float = 1.0
    start_cost_s: float = 90.0
    retry_at_s: float = 0.0  # a failed engine is not started before this
    preload: bool = False  # wanted once after the service's start, by nobody but the configuration
    held_by: str = ""  # the entry of the calendar that keeps it awake, in words; it is pinned meanwhile
    held_until_s: float | None = None
    slots: int = 256  # requests that it serves at once
    wake_costs: Mapping[Depth, float] = field(default_factory=dict)  # as measured, by what it had to bring back
    slept_at_s: float = 0.0  # when it last fell asleep
    has_disk: bool = False  # its allocator can keep masters on disk
    unified: bool = False  # device and host memory are the same: masters in host RAM free nothing
    elastic: bool = False  # its allocator can free by bytes, KV cache first
    kv_bytes: tuple[int, ...] = ()  # of its KV cache on each GPU, which it frees without moving weights
    masters_bytes: int = 0  # host RAM that its masters take now, also while it is awake
    nodes: tuple[str, ...] = ()  # the machine of each of its GPUs; empty where there is only one machine
    restart_why: str = ""  # what only a new launch mends, so that it is to be restarted at a quiet moment


class CommandKind(StrEnum):
    WAKE = "wake"
    SLEEP = "sleep"
    STOP = "stop"
    START = "start"


@dataclass(frozen=True, slots=True)
class Command:
    """An operator's explicit wish. ``force`` aborts what is in flight instead of draining and freezing it."""

    kind: CommandKind
    engine: EngineName
    level: Level | None = None
    force: bool = False
    issued_at_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Policy:
    """The numbers that bend decisions. Every one can be switched off by its neutral value."""

    min_stay_s: float = 2.0  # a busy engine keeps its turn this long after a wake; 0 = no minimum stay
    priority_worth_s: float = 30.0  # one step of priority weighs like this much waiting
    drain_bound_s: float = 5.0  # in-flight work may finish this long before it is frozen, where nothing is priced
    longest_wait_s: float | None = None  # no wish waits longer, as far as stays and swaps allow; None: no bound
    urgency: bool = False  # wishes go by how many they would serve and their wait, not by the oldest wait alone
    ageing_s: float = 50.0  # so much waiting weighs like one more request
    turn_margin: float = 3.0  # a swap must serve so many times as many as it interrupts
    pair_margin: float | None = None  # the same where nobody else wants these GPUs; None: no other than turn_margin
    swap_share: float | None = None  # of a contended GPU's time that swaps may cost; None: turns are not priced
    preempt: bool = False  # finishing work in flight is priced against freezing it; else drain_bound_s for all
    drain_max_s: float = 60.0  # no priced drain is longer; nor one before the calendar freezes for a whole window
    recompute_share: float = 0.02  # of the time that a stream has run: what its next wake spends on computing it again
    ladder: bool = False  # engines sink from awake to asleep to disk by price, where memory is wanted by others
    idle_sleep_s: float | None = None  # idle this long: asleep, wanted or not
    idle_sink_s: float | None = None  # asleep this long: to disk where it can
    idle_stop_s: float | None = None  # asleep this long: stopped
    host_high: float = 0.9  # masters may take this share of the host budget before the least wanted are dropped
    wanted_horizon_s: float = 60.0  # what ``likely_wanted`` looks ahead
    prewake_chance: float | None = None  # so likely wanted, an engine is woken into free room; None: never
    elastic: bool = False  # engines that can free by bytes are asked for no more than is needed
    restart_quiet_s: float = 300.0  # a planned restart waits until nobody has used its GPUs for so long


@dataclass(frozen=True, slots=True)
class Window:
    """A span of time for which engines are kept awake. ``until`` is its end in words, for people in its own zone."""

    name: str
    engines: tuple[EngineName, ...]
    begins_s: float
    ends_s: float
    priority: int = 0
    until: str = ""


@dataclass(frozen=True, slots=True)
class Calendar:
    """What the calendar knows: windows that last or come soon, and which engines it returns to when nothing is wanted.

    ``released_s`` is when a window last let go of an engine.
    """

    windows: tuple[Window, ...] = ()
    defaults: tuple[EngineName, ...] = ()
    default_after_s: float | None = None  # an engine idle this long makes room for a default; None: only after a window
    released_s: Mapping[EngineName, float] = field(default_factory=dict)


class Serves(StrEnum):
    """Whose wishes a plan serves."""

    ALL = "all"
    UNDER_WAY = "under_way"  # the service ends: commands, and streams that stand still, so that they can end
    COMMANDS = "commands"  # its engines are put away: nothing that a plan would do by itself


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything a plan depends on. ``claimed`` are GPUs on which a transition is under way."""

    now_s: float
    gpus: Mapping[GpuId, Gpu]
    engines: Mapping[EngineName, Engine]
    host_budget_bytes: int
    host_used_bytes: int = 0  # host RAM held by masters now, of sleeping and (where kept) awake engines
    node_budgets: Mapping[str, int] = field(default_factory=dict)  # the same of every other machine
    node_used: Mapping[str, int] = field(default_factory=dict)
    claimed: frozenset[GpuId] = frozenset()
    commands: tuple[Command, ...] = ()
    policy: Policy = field(default_factory=Policy)
    calendar: Calendar = field(default_factory=Calendar)
    serves: Serves = Serves.ALL


@dataclass(frozen=True, slots=True)
class Step:
    """One engine's part in a swap. ``bytes_per_gpu`` is what it frees (negative) or takes (positive)."""

    action: Action
    engine: EngineName
    reason: str
    level: Level | None = None
    force: bool = False
    drain_bound_s: float = 0.0
    expected_s: float = 0.0
    bytes_per_gpu: tuple[tuple[GpuId, int], ...] = ()
    depth: Depth | None = None  # how deep it sleeps then, where its level does not say


@dataclass(frozen=True, slots=True)
class Swap:
    """One eviction set and at most one engine that takes its place. Swaps of one plan touch disjoint GPUs."""

    evict: tuple[Step, ...]
    admit: Step | None
    reason: str
    gpus: frozenset[GpuId]
    expected_s: float = 0.0
    command: Command | None = None
    ahead: bool = False  # nobody asks yet: it goes on all the same


class BlockKind(StrEnum):
    """Why nothing happens for an engine that is wanted. Only ``passing`` ones hold their GPUs for it meanwhile."""

    BUSY = "busy"  # a transition is under way on one of its GPUs
    STAY = "stay"  # the engines in its way have not had their minimum stay
    BACKOFF = "backoff"  # it failed and its retry time has not come
    UNFREEZABLE = "unfreezable"  # an engine in its way has streams that may not be frozen (again)
    PINNED = "pinned"  # what is in its way is pinned
    HELD = "held"  # what is in its way is kept awake by the calendar, until ``until_s``
    NEVER_FITS = "never_fits"  # larger than its GPUs, less what is foreign and reserved
    CORDONED = "cordoned"
    GPU_UNKNOWN = "gpu_unknown"
    QUARANTINED = "quarantined"
    HOST_RAM = "host_ram"  # nobody in its way can sleep: no room for masters and no other level or stop allowed
    REFUSED = "refused"  # a command that makes no sense in the engine's state


@dataclass(frozen=True, slots=True)
class Blocked:
    """A wish that this plan does not serve. ``until_s`` is when to look again, if time alone can change it."""

    engine: EngineName
    kind: BlockKind
    reason: str
    until_s: float | None = None
    command: Command | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do now, and why everything else waits. ``look_again_at_s`` is the earliest ``until_s``."""

    swaps: tuple[Swap, ...] = ()
    blocked: tuple[Blocked, ...] = ()
    look_again_at_s: float | None = None
