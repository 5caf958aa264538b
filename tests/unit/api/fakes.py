"""A hand-written Operations: two engines, two GPUs, and a record of what was asked for."""

import dataclasses
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from rotator.core.values import Action, Blocked, BlockKind, Command, CommandKind, Level, Plan, Step, Swap
from rotator.ports import Incident, Page, RotatorError
from rotator.ports_watchdog import BundleGone
from rotator.service.incidents import UnknownIncident
from rotator.service.operations import (
    CalendarView,
    CommandResult,
    EngineView,
    EntryView,
    GpuView,
    LedgerCheck,
    QueueEntry,
    Readiness,
    UnknownEngine,
    UnknownGpu,
    UnknownReservation,
)

GIB = 1 << 30


def engine_view(name: str, *aliases: str, state: str = "asleep") -> EngineView:
    return EngineView(
        name=name,
        aliases=aliases,
        state=state,
        depth="host" if state == "asleep" else None,
        reason="for a test",
        since_wall_s=1000.0,
        gpus=("GPU-a",),
        gpu_indices=(0,),
        launcher="process",
        url="http://127.0.0.1:8411",
        version="0.26.0",
        pids=(4711,),
        pinned=False,
        priority=0,
        waiting=2,
        in_flight=1,
        frozen=0,
        eta_s=2.5,
        awake_bytes=(80 * GIB,),
        residue_bytes=(2 * GIB,),
        held_bytes=(2 * GIB,),
        host_bytes=70 * GIB,
        footprint_measured=True,
        wake_s=1.9,
        sleep_s=1.1,
        start_s=88.0,
        failures=0,
        retry_at_wall_s=None,
        canary="passed",
        wakes=3,
        sleeps=3,
        bytes_moved=5 * GIB,
        log_path="/tmp/x.log",
    )


def gpu_view(id: str, index: int) -> GpuView:
    return GpuView(
        id=id,
        index=index,
        name="RTX PRO 6000",
        health="ok",
        reason="",
        total_bytes=96 * GIB,
        used_bytes=4 * GIB,
        foreign_bytes=0,
        reserve_bytes=GIB,
        by_engine={"glm-5.1": 2 * GIB},
        ledger_bytes=4 * GIB,
        claimed_by=None,
        read_at_wall_s=1000.0,
    )


def plan(now_s: float = 0.0) -> Plan:
    """One swap and one wish that waits until ``now_s`` + 4."""
    evict = Step(Action.SLEEP, "dsv4-flash", "cheapest to bring back", Level.HOST, False, 5.0, 1.1, (("GPU-a", -78),))
    admit = Step(Action.WAKE, "glm-5.1", "asked for", expected_s=1.9, bytes_per_gpu=(("GPU-a", 78),))
    swap = Swap((evict,), admit, "glm-5.1 does not fit beside it", frozenset({"GPU-a"}), 3.0)
    blocked = Blocked("mimo", BlockKind.STAY, "glm-5.1 stays a little", until_s=now_s + 4.0)
    return Plan((swap,), (blocked,), look_again_at_s=now_s + 4.0)


ENTRY = EntryView(
    id=3,
    name=None,
    engines=("glm-5.1",),
    begins_wall_s=1000.0,
    ends_wall_s=4600.0,
    begins="Thu 1970-01-01 01:16 CET",
    ends="Thu 1970-01-01 02:16 CET",
    priority=0,
    note="evaluation",
    in_force=True,
    waived=(),
)

_ACTIONS = {k: Action(k.value) for k in CommandKind}


class FakeOperations:
    """Behaves like a service in which every command succeeds at once, unless ``error`` is set."""

    def __init__(self) -> None:
        self.views = {
            "dsv4-flash": engine_view("dsv4-flash", state="awake"),
            "glm-5.1": engine_view("glm-5.1", "glm"),
            "org/small": engine_view("org/small"),
        }
        self.gpu_views = {"GPU-a": gpu_view("GPU-a", 0), "GPU-b": gpu_view("GPU-b", 1)}
        self.error: Exception | None = None
        self.commands: list[tuple[tuple[Command, ...], bool, float]] = []
        self.planned: list[tuple[Command, ...]] = []
        self.calls: list[tuple[Any, ...]] = []
        self.ready = Readiness(True, ())
        self.plan = plan()

    def engines(self) -> tuple[EngineView, ...]:
        return tuple(self.views.values())

    def engine(self, name: str) -> EngineView:
        for view in self.views.values():
            if name == view.name or name in view.aliases:
                return view
        raise UnknownEngine(name)

    def gpus(self) -> tuple[GpuView, ...]:
        return tuple(self.gpu_views.values())

    def queue(self) -> tuple[QueueEntry, ...]:
        return (QueueEntry("r-1", "glm", "glm-5.1", 1.5, 598.5, 2.5),)

    def plan_for(self, *commands: Command) -> Plan:
        self.planned.append(commands)
        self._fail()
        return self.plan

    async def command(self, *commands: Command, wait: bool, deadline_s: float) -> tuple[CommandResult, ...]:
        self.commands.append((commands, wait, deadline_s))
        self._fail()
        return tuple(self._result(c.engine, _ACTIONS[c.kind], wait) for c in commands)

    async def restart(self, engine: str, *, wait: bool, deadline_s: float) -> CommandResult:
        self.calls.append(("restart", engine, wait, deadline_s))
        self._fail()
        return self._result(engine, Action.START, wait)

    async def release(self, engine: str) -> EngineView:
        self.calls.append(("release", engine))
        self._fail()
        return self.engine(engine)

    async def set_pin(self, engine: str, pinned: bool) -> EngineView:
        self.views[engine] = dataclasses.replace(self.views[engine], pinned=pinned)
        return self.views[engine]

    async def set_cordon(self, gpu: str, cordoned: bool, reason: str) -> GpuView:
        for view in self.gpu_views.values():
            if gpu in (view.id, str(view.index)):
                return dataclasses.replace(view, health="cordoned" if cordoned else "ok", reason=reason)
        raise UnknownGpu(f"there is no GPU '{gpu}'")

    def calendar(self) -> CalendarView:
        window = dataclasses.replace(ENTRY, id=None, name="office", engines=("dsv4-flash",), in_force=False)
        return CalendarView("Europe/Berlin", (window,), self.reservations(), ("dsv4-flash",), 900.0)

    def reservations(self) -> tuple[EntryView, ...]:
        return (ENTRY,)

    async def reserve(self, engines: Sequence[str], **fields: Any) -> EntryView:
        self.calls.append(("reserve", tuple(engines), fields))
        self._fail()
        return dataclasses.replace(ENTRY, engines=tuple(engines))

    async def unreserve(self, id: int) -> EntryView:
        self._fail()
        if id != ENTRY.id:
            raise UnknownReservation(f"there is no reservation {id}: there are 3")
        return ENTRY

    async def reload(self) -> tuple[str, ...]:
        self._fail()
        return ("policies.min_stay_s: 2.0 -> 5.0 (applied)",)

    async def ledger_rows(self, table: str, filters: Mapping[str, str], limit: int, cursor: str | None) -> Page:
        self.calls.append(("ledger", table, dict(filters), limit, cursor))
        self._fail()
        return Page(({"id": 7, "engine": "glm-5.1"},), "next" if cursor is None else None)

    def incidents(self) -> tuple[Incident, ...]:
        return (
            Incident("two-glm", 200.0, "wedged", "serious", "it stands", "glm-5.1", advice="look at it"),
            Incident("one-glm", 100.0, "crashed", "serious", "signal 9", "glm-5.1", closed_wall_s=150.0,
                     outcome="back in service", bundle_bytes=3),
        )  # fmt: skip

    async def incident(self, id: str) -> tuple[Incident, Mapping[str, Any]]:
        found = self._incident(id)
        lacks = [{"what": "nccl", "why": "no rank listens"}]
        return found, {"items": [{"name": "log.txt", "bytes": 3}], "missing": lacks} if found.bundle_bytes else {}

    async def bundle(self, id: str) -> AsyncIterator[bytes]:
        if not self._incident(id).bundle_bytes:
            raise BundleGone(f"the bundle of {id} is not there: none was collected, or it was too old to be kept")
        yield b"packed "
        yield b"evidence"

    def _incident(self, id: str) -> Incident:
        for known in self.incidents():
            if known.id == id:
                return known
        raise UnknownIncident(f"there is no incident '{id}'")

    async def check_ledger(self) -> LedgerCheck:
        self._fail()
        return LedgerCheck(False, ("GPU-a: the ledger says 4 GiB, the device 9 GiB",))

    def readiness(self) -> Readiness:
        return self.ready

    def info(self) -> Mapping[str, Any]:
        return {"version": "0.1.0", "started_wall_s": 1000.0}

    def _fail(self) -> None:
        if self.error is not None:
            raise self.error

    def _result(self, engine: str, action: Action, wait: bool) -> CommandResult:
        return CommandResult(engine, action, "awake", self.plan, wait, 2.1 if wait else 0.0, {"wake": 1.9})


class Unheard(RotatorError):
    """An error of the tree that the API does not know."""
