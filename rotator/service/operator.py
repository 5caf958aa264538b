"""Operations, as the loop carries them out."""

import asyncio
import difflib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

from rotator import __version__
from rotator.core.values import Action, Command, CommandKind, Plan, State
from rotator.ports import Incident, LedgerError, Page
from rotator.service.ledger_check import check_ledger
from rotator.service.loop import Loop
from rotator.service.mailbox import Asked
from rotator.service.operations import (
    CalendarView,
    CommandRefused,
    CommandResult,
    CommandTimeout,
    EngineView,
    EntryView,
    GpuView,
    LedgerCheck,
    QueueEntry,
    Readiness,
    UnknownEngine,
    UnknownGpu,
)
from rotator.service.records import EngineRuntime, GpuRecord
from rotator.service.reservations import Reservations
from rotator.service.views import engine_view, gpu_view


class Operator:
    """Implements the Operations protocol. ``reload`` is given by the composition root, which can build launch specs."""

    def __init__(self, loop: Loop, reload: Callable[[], Awaitable[tuple[str, ...]]], config_path: str) -> None:
        self._loop = loop
        self._reservations = Reservations(loop)
        self._reload = reload
        self._config_path = config_path
        self._started_wall_s = time.time()

    # -- looking -----------------------------------------------------------------------------------------------------

    def engines(self) -> tuple[EngineView, ...]:
        return tuple(engine_view(self._loop, e) for e in self._loop.all_runtimes())

    def engine(self, name: str) -> EngineView:
        return engine_view(self._loop, self._find(name))

    def gpus(self) -> tuple[GpuView, ...]:
        return tuple(gpu_view(self._loop, g) for g in self._loop.fleet.gpus.values())

    def queue(self) -> tuple[QueueEntry, ...]:
        return self._loop.world.traffic.entries()

    def plan_for(self, *commands: Command) -> Plan:
        return self._loop.plan_for(self._named(commands))

    async def ledger_rows(self, table: str, filters: Mapping[str, str], limit: int, cursor: str | None) -> Page:
        return await self._loop.world.ledger.query(table, filters=filters, limit=limit, cursor=cursor)

    def incidents(self) -> tuple[Incident, ...]:
        return self._loop.incidents.all()

    async def incident(self, id: str) -> tuple[Incident, Mapping[str, Any]]:
        return self._loop.incidents.get(id), await self._loop.world.senses.evidence.manifest(id)

    def bundle(self, id: str) -> AsyncIterator[bytes]:
        return self._loop.world.senses.evidence.bundle(self._loop.incidents.get(id).id)

    async def check_ledger(self) -> LedgerCheck:
        return await check_ledger(self._loop)

    def readiness(self) -> Readiness:
        loop = self._loop
        reasons = [f"GPU {gpu} is unknown: {loop.fleet.gpus[gpu].unreadable}" for gpu in loop.unhealthy_gpus()]
        blockers = []
        if loop.adopting:
            blockers.append("still looking which engines run")
        if loop.draining:
            blockers.append("shutting down")
        if not loop.world.ledger.healthy:
            reasons.append("the ledger cannot be written: engines that are awake serve on, no transition starts")
        reasons += loop.launcher_notes.values()
        if loop.bugs:
            reasons.append(f"{loop.bugs} decisions failed by an internal error: see the service's log, and report it")
        return Readiness(not blockers, (*blockers, *reasons))

    def info(self) -> Mapping[str, Any]:
        return {
            "version": __version__,
            "started_at": self._started_wall_s,
            "config": self._config_path,
            "engines": len(self._loop.fleet.engines),
            "swaps_under_way": len(self._loop.active),
            "host_memory": {
                "budget_bytes": self._loop.fleet.host_budget_bytes + sum(self._loop.fleet.node_budgets.values()),
                "masters_bytes": sum(self._loop.fleet.host_used_bytes().values()),
            },
        }

    def calendar(self) -> CalendarView:
        return self._reservations.calendar()

    def reservations(self) -> tuple[EntryView, ...]:
        return self._reservations.reservations()

    # -- doing -------------------------------------------------------------------------------------------------------

    async def command(self, *commands: Command, wait: bool, deadline_s: float) -> tuple[CommandResult, ...]:
        named = self._named(commands)
        loop = asyncio.get_running_loop()
        answers = tuple(loop.create_future() for _ in named)
        for answer in answers:
            answer.add_done_callback(_look_at)
        plan = self._loop.plan_for(named)
        self._loop.tell(Asked(named, answers, loop.time() + deadline_s))
        if not wait:
            return tuple(self._not_waited(c, plan) for c in named)
        _done, left = await asyncio.wait(answers, timeout=deadline_s)
        if left:
            raise CommandTimeout(f"not done within {deadline_s:.0f} s: it goes on, see GET /engines and GET /events")
        return tuple(answer.result() for answer in answers)

    def _not_waited(self, command: Command, plan: Plan) -> CommandResult:
        state = self._find(command.engine).state.value
        return CommandResult(command.engine, Action(command.kind.value), state, plan, False, 0.0, {})

    async def restart(self, engine: str, *, wait: bool, deadline_s: float) -> CommandResult:
        runtime = self._find(engine)
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + deadline_s
        if runtime.state is not State.STOPPED:
            await self.command(Command(CommandKind.STOP, runtime.name), wait=True, deadline_s=deadline_s)
        left_s = max(0.0, give_up_at - loop.time())
        (result,) = await self.command(Command(CommandKind.START, runtime.name), wait=wait, deadline_s=left_s)
        return result

    async def release(self, engine: str) -> EngineView:
        runtime = self._find(engine)

        def release() -> None:
            if runtime.state not in (State.QUARANTINED, State.FAILED):
                raise CommandRefused(f"{runtime.name} is {runtime.state.value}: only quarantined or failed is released")
            runtime.failures, runtime.retry_at_s = 0, 0.0
            self._loop.release(runtime.name)

        await self._loop.do(release)
        return self.engine(engine)

    async def set_pin(self, engine: str, pinned: bool) -> EngineView:
        runtime = self._find(engine)

        def pin() -> None:
            runtime.pinned = pinned
            word = "pinned" if pinned else "unpinned"
            self._loop.world.bus.publish(f"engine.{word}", runtime.name)

        await self._loop.do(pin)
        return self.engine(engine)

    async def set_cordon(self, gpu: str, cordoned: bool, reason: str) -> GpuView:
        record = self._find_gpu(gpu)
        await self._loop.do(lambda: self._loop.cordon(record.info.id, reason if cordoned else None))
        try:
            await self._loop.world.ledger.put_cordon(record.info.id, cordoned, reason)
        except LedgerError as e:
            self._loop.world.bus.publish("ledger.unwritten", reason=f"the cordon will not survive a restart: {e}")
        return gpu_view(self._loop, record)

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
        named = tuple(dict.fromkeys(self._find(name).name for name in engines))
        return await self._reservations.reserve(named, start, end, duration_s, priority, note)

    async def unreserve(self, id: int) -> EntryView:
        return await self._reservations.unreserve(id)

    async def reload(self) -> tuple[str, ...]:
        return await self._reload()

    # -- names -------------------------------------------------------------------------------------------------------

    def _find(self, name: str) -> EngineRuntime:
        names = self._loop.fleet.names
        if name not in names:
            close = difflib.get_close_matches(name, names, 3)
            raise UnknownEngine(
                f"there is no engine '{name}'" + (f": did you mean {', '.join(close)}?" if close else "")
            )
        return self._loop.fleet.engines[names[name]]

    def _find_gpu(self, name: str) -> GpuRecord:
        id = self._loop.fleet.gpu_id(name)
        if id is None:
            have = ", ".join(f"{g.info.index} ({g.info.id})" for g in self._loop.fleet.gpus.values())
            raise UnknownGpu(f"there is no GPU '{name}': this service has {have}")
        return self._loop.fleet.gpus[id]

    def _named(self, commands: Iterable[Command]) -> tuple[Command, ...]:
        """The same commands with engines' own names for aliases. What is given together gets one time: the planner
        takes a sleep and a wake of the same time for one swap."""
        now = self._loop.now_s()
        return tuple(replace(c, engine=self._find(c.engine).name, issued_at_s=now) for c in commands)


def _look_at(answer: "asyncio.Future[CommandResult]") -> None:
    """A command that nobody waits for may fail without a warning about an unread exception."""
    if not answer.cancelled():
        answer.exception()
