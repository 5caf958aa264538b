"""What operators can see and do, as one Protocol: REST, the CLI and the page speak to this, the loop is behind it.

Views are frozen copies made on request: reading them never touches the loop's own state.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

from rotator.core.values import Action, Command, EngineName, GpuId, Plan
from rotator.ports import Incident, Page, RotatorError


class UnknownEngine(RotatorError):
    """No engine, alias or model of that name."""


class UnknownGpu(RotatorError):
    pass


class UnknownReservation(RotatorError):
    pass


class ReservationWrong(RotatorError):
    """Its times make no sense: ``field: problem``."""


class ReservationConflict(RotatorError):
    """What it asks for does not fit beside what is promised already, in bytes."""


class CommandRefused(RotatorError):
    """The command makes no sense now (why, and what would), or the plan cannot serve it."""


class ShuttingDown(CommandRefused):
    """The service ends and takes no new wishes."""

    def __init__(self) -> None:
        super().__init__("the service is shutting down: ask again once it is back")


class CommandFailed(RotatorError):
    """It was begun and failed: the reason is in the text, the evidence in the journal."""


class CommandTimeout(RotatorError):
    """``wait=true`` and the deadline passed: the command goes on."""


@dataclass(frozen=True, slots=True)
class EngineView:
    name: EngineName
    aliases: tuple[str, ...]
    state: str
    depth: str | None
    reason: str  # why it is in this state, in words
    since_wall_s: float
    gpus: tuple[GpuId, ...]
    gpu_indices: tuple[int, ...]
    launcher: str
    url: str
    version: str
    pids: tuple[int, ...]
    pinned: bool
    priority: int
    waiting: int
    in_flight: int
    frozen: int
    eta_s: float | None  # until it could serve a request that arrives now; 0 when awake
    awake_bytes: tuple[int, ...]  # a GPU, planned or measured
    residue_bytes: tuple[int, ...]
    held_bytes: tuple[int, ...]  # what it holds now
    host_bytes: int
    footprint_measured: bool
    wake_s: float | None
    sleep_s: float | None
    start_s: float | None
    failures: int
    retry_at_wall_s: float | None
    canary: str  # passed, failed, never, disabled
    wakes: int
    sleeps: int
    bytes_moved: int
    log_path: str
    notes: tuple[str, ...] = ()  # what its launcher has to say of it: a job that drifted, a node that is drained
    held_by: str = ""  # the entry of the calendar that keeps it awake now, in words
    held_until_wall_s: float | None = None
    masters_bytes: int = 0  # host RAM that its masters take now


@dataclass(frozen=True, slots=True)
class GpuView:
    id: GpuId
    index: int
    name: str
    health: str
    reason: str
    total_bytes: int
    used_bytes: int | None
    foreign_bytes: int
    reserve_bytes: int
    by_engine: Mapping[EngineName, int]  # measured where the driver tells, else what the ledger charges
    ledger_bytes: int  # what the ledger says is held here
    claimed_by: str | None  # the swap under way
    read_at_wall_s: float | None


@dataclass(frozen=True, slots=True)
class QueueEntry:
    """One waiting request. Never holds anything the client sent but the model's name."""

    id: str
    model: str
    engine: EngineName
    waited_s: float
    deadline_in_s: float
    eta_s: float | None


@dataclass(frozen=True, slots=True)
class EntryView:
    """A reservation (with its ``id``), or one time of a window (with its ``name``)."""

    id: int | None
    name: str | None
    engines: tuple[EngineName, ...]
    begins_wall_s: float
    ends_wall_s: float
    begins: str  # as clocks in its zone show it
    ends: str
    priority: int
    note: str
    in_force: bool
    waived: tuple[EngineName, ...]  # that an operator put away while it lasts


@dataclass(frozen=True, slots=True)
class CalendarView:
    """``windows`` are those in force and the next time of each, in order of their begins."""

    timezone: str
    windows: tuple[EntryView, ...]
    reservations: tuple[EntryView, ...]
    default_engines: tuple[EngineName, ...]
    default_after_s: float | None


@dataclass(frozen=True, slots=True)
class LedgerCheck:
    """Ledger beside devices: ``differences`` are in words, empty when they agree."""

    matches: bool
    differences: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CommandResult:
    engine: EngineName
    action: Action
    state: str
    plan: Plan
    done: bool  # False where the caller did not wait
    seconds: float
    phases_s: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Readiness:
    ready: bool
    reasons: tuple[str, ...]  # why not, or what is degraded


class Operations(Protocol):
    def engines(self) -> tuple[EngineView, ...]: ...

    def engine(self, name: str) -> EngineView:
        """By name or alias. Raises UnknownEngine."""
        ...

    def gpus(self) -> tuple[GpuView, ...]: ...

    def queue(self) -> tuple[QueueEntry, ...]: ...

    def plan_for(self, *commands: Command) -> Plan:
        """The plan that these commands would lead to now, carried out by nobody."""
        ...

    async def command(self, *commands: Command, wait: bool, deadline_s: float) -> tuple[CommandResult, ...]:
        """Carry out wake, sleep, start or stop (a swap is a sleep and a wake given together).
        Raises UnknownEngine, CommandRefused, CommandFailed, CommandTimeout."""
        ...

    async def restart(self, engine: str, *, wait: bool, deadline_s: float) -> CommandResult: ...

    async def release(self, engine: str) -> EngineView:
        """Let a quarantined or failed engine try again at once."""
        ...

    async def set_pin(self, engine: str, pinned: bool) -> EngineView: ...

    async def set_cordon(self, gpu: str, cordoned: bool, reason: str) -> GpuView:
        """``gpu`` is an index or a UUID. Raises UnknownGpu."""
        ...

    def calendar(self) -> CalendarView: ...

    def reservations(self) -> tuple[EntryView, ...]:
        """Those that have not ended."""
        ...

    async def reserve(
        self,
        engines: Sequence[str],
        *,
        start: datetime | None,
        end: datetime | None,
        duration_s: float | None,
        priority: int,
        note: str,
    ) -> EntryView:
        """Keep engines awake once. ``start`` None is now; a time without a zone is in the calendar's.
        Raises UnknownEngine, ReservationWrong, ReservationConflict, LedgerError."""
        ...

    async def unreserve(self, id: int) -> EntryView:
        """Raises UnknownReservation, LedgerError."""
        ...

    async def reload(self) -> tuple[str, ...]:
        """Read the configuration file again and apply it; returns what changed, one line each. Raises ConfigError."""
        ...

    def incidents(self) -> tuple[Incident, ...]:
        """Those that are remembered, newest first."""
        ...

    async def incident(self, id: str) -> tuple[Incident, Mapping[str, Any]]:
        """One, and its bundle's manifest (empty where there is none). Raises UnknownIncident."""
        ...

    def bundle(self, id: str) -> AsyncIterator[bytes]:
        """Its evidence as tar.gz. Raises UnknownIncident at once, BundleGone with the first piece."""
        ...

    async def ledger_rows(self, table: str, filters: Mapping[str, str], limit: int, cursor: str | None) -> Page: ...

    async def check_ledger(self) -> LedgerCheck:
        """Read every GPU now and compare with the ledger."""
        ...

    def readiness(self) -> Readiness: ...

    def info(self) -> Mapping[str, Any]:
        """Version, start time, configuration path, counters."""
        ...
