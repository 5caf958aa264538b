"""The one task that owns all decisions and all mutable state.

It reads its mailbox, applies what it is told, plans, and starts swaps. Everything slow runs in other tasks and comes
back as a message: nothing here awaits an engine, a GPU or the ledger.
"""

import asyncio
import itertools
import logging
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from math import inf
from typing import Any, TypeVar

from rotator.core import policy
from rotator.core.lifecycle import Event, LifecycleError, is_moving
from rotator.core.placement import lacking
from rotator.core.planner import plan as make_plan
from rotator.core.values import (
    Action,
    Command,
    Depth,
    EngineName,
    GpuId,
    Health,
    Level,
    Plan,
    Serves,
    Snapshot,
    State,
    Step,
    Swap,
)
from rotator.ports import DeviceError, GpuReading, Recovered
from rotator.ports_nodes import HERE
from rotator.service.adoption import Adopter
from rotator.service.burial import Undertaker
from rotator.service.calendar import Keeper
from rotator.service.commands import Desk
from rotator.service.fleet import Fleet
from rotator.service.hopeless import Refuser
from rotator.service.incidents import Incidents
from rotator.service.journal import plan_json
from rotator.service.mailbox import (
    Asked,
    Do,
    Exited,
    GpuRead,
    LauncherTold,
    Learned,
    Message,
    Moved,
    PidsRead,
    SwapEnded,
    Tick,
    Unhealthy,
)
from rotator.service.news import News
from rotator.service.owner import Facts
from rotator.service.progress import Progress
from rotator.service.recorder import Recorder
from rotator.service.records import ActiveSwap, EngineRuntime
from rotator.service.recovery import Recovery
from rotator.service.sentinel import Sentinel
from rotator.service.swap_run import SwapRunner
from rotator.service.world import World

_log = logging.getLogger(__name__)
T = TypeVar("T")

YIELD_AGAIN_S = 10.0  # an engine that could not yield (streams that cannot freeze) is not asked again before
_COMES_IN = {Event.LAUNCH, Event.WAKE}
_OPENS = {Event.STARTED, Event.WOKE, Event.ADOPTED_AWAKE, Event.DRAIN_ABANDONED}
_ENDS = {Event.GONE: "stopped", Event.GONE_FAULTY: "failed", Event.GONE_LIAR: "quarantined"}


class Loop:
    def __init__(self, world: World, fleet: Fleet, wall: Callable[[], float] = time.time) -> None:
        self.world = world
        self.fleet = fleet
        self.undertaker = Undertaker(world, self)
        self.desk = Desk(self)
        self.recorder = Recorder(world.ledger, wall)
        self.adopter = Adopter(world, self)
        self.calendar = Keeper(world)
        self.progress = Progress(world.bus)
        self.incidents = Incidents(world.ledger, world.bus, wall)
        self.recovery = Recovery(world, self, self.undertaker)
        self.sentinel = Sentinel(self)
        self._refuser = Refuser(self)
        self._news = News(self)
        self.active: dict[str, ActiveSwap] = {}
        self.last_plan = Plan()
        self.adopting = True
        self.serves = Serves.ALL
        self.launcher_notes: dict[str, str] = {}  # by topic: what concerns all engines of a launcher
        self.bugs = 0  # decisions that raised; shown by readiness
        self.rebuild: Callable[[EngineName], None] | None = None  # takes a changed configuration over, once it is down
        self._runner = SwapRunner(world, self, self.undertaker)
        self._wall = wall
        self._mailbox: asyncio.Queue[Message] = asyncio.Queue()
        self._ticking = False
        self._alarm: asyncio.TimerHandle | None = None
        self._numbers = itertools.count(1)
        self._life = secrets.token_hex(3)

    # -- what other tasks may call -----------------------------------------------------------------------------------

    def tell(self, message: Message) -> None:
        self._mailbox.put_nowait(message)

    def tick(self, *_: object) -> None:
        """Look again soon. Any number of calls before that cost one look."""
        if not self._ticking:
            self._ticking = True
            self.tell(Tick())

    async def do(self, action: Callable[[], T]) -> T:
        """Run ``action`` in the loop's task and return what it returns."""
        done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.tell(Do(action, done))
        result: T = await done
        return result

    @property
    def draining(self) -> bool:
        """Whether the service ends."""
        return self.serves is not Serves.ALL

    def wind_down(self) -> None:
        """The service ends: what is under way may end, nothing else begins. Only within the loop's task."""
        self.serves = Serves.UNDER_WAY
        self.desk.close()

    def serve_commands_alone(self) -> None:
        """The engines are put away: what came in now would outlive the service. Only within the loop's task."""
        self.serves = Serves.COMMANDS

    def runtime(self, engine: EngineName) -> EngineRuntime:
        return self.fleet.engines[engine]

    def all_runtimes(self) -> Iterable[EngineRuntime]:
        return tuple(self.fleet.engines.values())

    def foreign_bytes(self, gpu: GpuId) -> int:
        return self.fleet.gpus[gpu].foreign_bytes

    async def moved(
        self, engine: EngineName, event: Event, facts: Facts, readings: Mapping[GpuId, GpuReading] | None = None
    ) -> bool:
        applied: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self.tell(Moved(engine, event, facts, applied))
        for gpu, reading in (readings or {}).items():
            self.tell(GpuRead(gpu, reading, None, inf))  # handled before the next decision
        return await applied

    async def look_at(self, gpu: GpuId) -> None:
        """Read a GPU and report what came of it."""
        begun_at_s = self.now_s()
        try:
            reading = await self.world.devices.read(gpu, deadline_s=self.world.config.devices.read_deadline_s)
        except DeviceError as e:
            self.tell(GpuRead(gpu, None, str(e), begun_at_s))
        else:
            self.tell(GpuRead(gpu, reading, None, begun_at_s))

    async def learned(self, engine: EngineName, facts: Facts) -> None:
        applied: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self.tell(Learned(engine, facts, applied))
        await applied

    async def wanted(self, active: ActiveSwap) -> bool:
        return await self.do(lambda: self._is_wanted(active))

    async def lacking(self, engine: EngineName) -> str | None:
        return await self.do(lambda: lacking(self.snapshot(), engine))

    def claimed(self) -> frozenset[GpuId]:
        """GPUs on which something moves: swaps under way, and engines that start, stop, are being buried, or of which
        nobody could tell yet whether they run."""
        return self.moving().union(*(a.swap.gpus for a in self.active.values()))

    def moving(self) -> frozenset[GpuId]:
        """GPUs on which an engine is on its way, or of which nobody could tell yet whether it runs."""
        on_the_way = (e for e in self.fleet.engines.values() if is_moving(e.state) or e.unseen)
        return frozenset(gpu for e in on_the_way for gpu in e.gpus)

    def snapshot(self, commands: tuple[Command, ...] = ()) -> Snapshot:
        calendar = self.calendar.snapshot(self.now_s(), self._wall())
        seen = self.fleet.snapshot(self.now_s(), self.claimed(), commands, calendar)
        snapshot = replace(seen, serves=self.serves) if self.draining else seen
        promised = self._promised_host_bytes()
        if not promised:
            return snapshot
        here = snapshot.host_used_bytes + promised.pop(HERE, 0)
        there = {n: snapshot.node_used.get(n, 0) + promised.get(n, 0) for n in snapshot.node_budgets}
        return replace(snapshot, host_used_bytes=here, node_used=there)

    def _promised_host_bytes(self) -> dict[str, int]:
        """Host RAM for the masters of engines that still drain: another swap must not be given it, too."""
        yielding = (self.fleet.engines.get(s.engine) for a in self.active.values() for s in a.swap.evict if _keeps(s))
        promised: dict[str, int] = {}
        for engine in yielding:
            if engine and engine.state in (State.AWAKE, State.DRAINING):
                for node, size in self.fleet.masters_by_node(engine, engine.host_bytes).items():
                    promised[node] = promised.get(node, 0) + size
        return promised

    def calendar_is_due(self) -> bool:
        """Whether a window or reservation begins or ends now."""
        return not self.adopting and self.calendar.is_due(self._wall())

    def plan_for(self, commands: tuple[Command, ...]) -> Plan:
        """A plan that nobody carries out."""
        return self._plan((*self.desk.pending_commands(), *commands))

    def _plan(self, commands: tuple[Command, ...]) -> Plan:
        return self._plan_from(self.snapshot(commands))

    def _plan_from(self, snapshot: Snapshot) -> Plan:
        return self.fleet.wording().plan(make_plan(snapshot))

    async def settled(self) -> None:
        """Return when nothing is in flight and no swap is under way."""
        for engine in self.all_runtimes():
            await self.world.traffic.drained(engine.name)
        await self.swaps_ended()

    async def swaps_ended(self) -> None:
        while tasks := [a.task for a in self.active.values() if a.task]:
            await asyncio.wait(tasks)
            await asyncio.sleep(0)

    def now_s(self) -> float:
        return asyncio.get_running_loop().time()

    def wall_s(self) -> float:
        """Unix seconds: for people, zones and what outlives the service."""
        return self._wall()

    # -- the task ----------------------------------------------------------------------------------------------------

    async def run(self, recovered: Recovered) -> None:
        """Adopt what runs, then decide until cancelled."""
        self.calendar.restore(recovered.reservations)
        adoption = asyncio.create_task(self._adopt(recovered))
        self.incidents.restore(recovered.incidents)
        recording = [asyncio.create_task(work) for work in (self.recorder.run(), self.incidents.run())]
        try:
            while True:
                self._safely(self._handle, await self._mailbox.get())
                while not self._mailbox.empty():
                    self._safely(self._handle, self._mailbox.get_nowait())
                self._safely(self._decide)
        finally:
            adoption.cancel()
            for task in recording:
                task.cancel()
            self.sentinel.stop()
            for engine in self.fleet.engines.values():
                if engine.watch:
                    engine.watch.cancel()

    def _safely(self, work: Callable[..., None], *args: Any) -> None:
        """A bug in one decision must not end all decisions: it is logged and shown, and the next message is read."""
        try:
            work(*args)
        except Exception as e:
            self.bugs += 1
            _log.exception("%s%s", work.__name__, args)
            self.world.bus.publish("service.bug", error=repr(e))

    async def _adopt(self, recovered: Recovered) -> None:
        try:
            await self.adopter.adopt_all(recovered)
        except Exception:
            _log.exception("adoption")
        await asyncio.gather(*(self.look_at(gpu) for gpu in self.fleet.gpus))  # nothing is planned on bytes never seen
        await self.do(self._adopted)

    def _adopted(self) -> None:
        self.adopting = False
        self.world.bus.publish("service.ready", engines={e.name: e.state.value for e in self.fleet.engines.values()})

    def _handle(self, message: Message) -> None:
        match message:
            case Moved(name, event, facts, applied):
                _answer(applied, self._apply(name, event, facts))
            case Learned(name, facts, applied):
                self._learn(name, facts)
                _answer(applied, True)
            case SwapEnded(id):
                self._swap_ended(self.active.pop(id))
            case Exited(name, how, ref):
                self._news.exited(name, how, ref)
            case GpuRead(gpu, reading, error, begun_at_s):
                self._news.gpu_read(gpu, reading, error, begun_at_s)
            case PidsRead(name, ref, pids):
                self._news.pids_read(name, ref, pids)
            case Unhealthy(name, ok):
                self._news.health(name, ok)
            case LauncherTold(news):
                self._news.launcher_told(news)
            case Asked():
                self.desk.take(message)
            case Do(action, done):
                _run(action, done)
            case Tick():
                self._ticking = False

    # -- engines -----------------------------------------------------------------------------------------------------

    def apply(self, name: EngineName, event: Event, facts: Facts) -> bool:
        """Move an engine, if the table allows it now. Only within the loop's task."""
        return self._apply(name, event, facts)

    def _apply(self, name: EngineName, event: Event, facts: Facts) -> bool:
        if event in _COMES_IN and self.serves is Serves.COMMANDS:
            _log.info("%s does not come in: the service ends", name)
            return False
        try:
            engine = self.fleet.apply(name, event, facts, self.now_s())
        except (LifecycleError, KeyError) as e:
            _log.info("stale report for %s: %s", name, e)
            return False
        engine.reason = self.fleet.wording().text(engine.reason)
        for gpu in engine.gpus:
            self.fleet.gpus[gpu].moved_at_s = self.now_s()
        if engine.state is State.AWAKE:
            self.calendar.woke(name)
        self._gates(engine, event, engine.reason)
        self.recovery.applied(engine, event, facts)
        self.recorder.note(engine)
        self.progress.moved(engine, self.now_s())
        data: dict[str, Any] = {"state": engine.state.value, "event": event.value, "reason": engine.reason}
        if facts.evidence:
            data["evidence"] = dict(facts.evidence)
        self.world.bus.publish(f"engine.{engine.state.value}", name, **data)
        return True

    def _gates(self, engine: EngineRuntime, event: Event, reason: str) -> None:
        """Admission follows the state, here and nowhere else."""
        traffic, name = self.world.traffic, engine.name
        if event in _OPENS:
            traffic.release_hold(name)
            traffic.open(name)
        elif event in (Event.LAUNCH, Event.RELEASE):
            traffic.clear_failure(name)
        elif event in _ENDS:
            traffic.release_hold(name)
            if event is Event.GONE:
                traffic.clear_failure(name)  # stopped by wish: the next request may have it started anew
            self._after_the_end(engine, event)
        else:
            traffic.close(name)
        if event is Event.SLEEP:
            traffic.hold(name)
        if event is Event.FAULT and engine.failures > 1:
            traffic.fail(name, f"{name} is failing: {reason}", self._backoff_s(engine))
        if event is Event.LIED:
            traffic.fail(name, f"{name} is quarantined: {reason}")

    def _after_the_end(self, engine: EngineRuntime, event: Event) -> None:
        if event is Event.GONE_FAULTY:
            engine.retry_at_s = self.now_s() + self._backoff_s(engine)
            engine.preload = True  # it was wanted running: it comes back after its backoff, also when nobody waits
        if engine.recycling and event is Event.GONE:
            engine.preload = True  # a planned restart: it comes back
        engine.after_stop, engine.recycling, engine.restart_why = Event.GONE, False, ""
        if engine.drifted and self.rebuild is not None:
            self.rebuild(engine.name)

    def _backoff_s(self, engine: EngineRuntime) -> float:
        recovery = self.world.config.recovery
        return policy.backoff_s(engine.failures, recovery.backoff_first_s, recovery.backoff_max_s)

    def _learn(self, name: EngineName, facts: Facts) -> None:
        engine = self.fleet.engines[name]
        self.fleet.learn(engine, facts)
        if facts.reason:
            engine.reason = facts.reason
        if facts.held_bytes is not None:
            engine.held_bytes = dict(facts.held_bytes)
        if facts.handle is not None:
            self._news.watch(engine, facts.handle)
        self.recorder.note(engine)

    def release(self, name: EngineName) -> None:
        """Let a quarantined or failed engine be wanted again. Only within the loop's task."""
        self._apply(name, Event.RELEASE, Facts("released by an operator"))

    def cordon(self, gpu: GpuId, reason: str | None) -> None:
        """Keep new work off a GPU, or let it on again (None). Only within the loop's task."""
        self.fleet.gpus[gpu].cordoned = reason
        for incident in self.incidents.open_ones(gpu=gpu) if reason is None else ():
            self.incidents.close(incident.id, "uncordoned")
        self.world.bus.publish(
            "gpu.cordoned" if reason is not None else "gpu.ok", gpu=gpu, reason=reason or "uncordoned"
        )

    # -- decisions ---------------------------------------------------------------------------------------------------

    def _decide(self) -> None:
        for active in self.active.values():
            _set(active.unwanted, not self._is_wanted(active))
        if self.adopting or (self.serves is Serves.UNDER_WAY and not self._stands_still()):
            return
        if not self.world.ledger.healthy:
            return  # no room in the journal: nothing starts; the ledger tries again by itself
        self.desk.drop_expired(self.now_s())
        self.calendar.advance(self.now_s(), self._wall())
        snapshot = self.snapshot(self.desk.pending_commands())
        self.last_plan = self._plan_from(snapshot)
        for swap in self.last_plan.swaps:
            self._begin(swap, snapshot)
        for blocked in self.last_plan.blocked:
            self._refuser.answer(blocked)
        self._arm(self.last_plan.look_again_at_s)

    def _stands_still(self) -> bool:
        """Whether streams are frozen: also while the service winds down they get their turn, so that they can end."""
        return any(self.world.traffic.frozen(e.name) for e in self.fleet.engines.values() if e.state is State.ASLEEP)

    def _begin(self, swap: Swap, seen: Snapshot) -> None:
        id = f"s{self._life}-{next(self._numbers)}"
        active = ActiveSwap(id, swap, self.now_s(), self._wall(), self.desk.begun(id, swap), seen)
        for step in swap.evict:
            engine = self.fleet.engines[step.engine]
            engine.recycling = (
                step.action is Action.STOP and bool(engine.restart_why) and engine.restart_why in step.reason
            )
        active.interrupts = any(seen.engines[step.engine].demand.in_flight for step in swap.evict)
        self.active[id] = active
        self.world.bus.publish("swap.begun", swap.admit.engine if swap.admit else None, id=id, plan=plan_json(swap))
        active.task = asyncio.create_task(self._runner.run(active))
        active.task.add_done_callback(lambda _: self.tell(SwapEnded(id)))

    def _swap_ended(self, active: ActiveSwap) -> None:
        for name in active.refused:
            self.fleet.engines[name].yields_after_s = self.now_s() + YIELD_AGAIN_S
        self._count_swap_time(active)
        phases = {name: round(seconds, 4) for name, seconds in active.phases_s.items()}
        admit = active.swap.admit.engine if active.swap.admit else None
        timeline = [
            {"phase": phase, "engine": engine, "at_s": round(a - active.begun_at_s, 4), "seconds": round(b - a, 4)}
            for phase, engine, a, b in active.timeline
        ]
        self.world.bus.publish(
            "swap.ended", admit, id=active.id, error=active.error, phases_s=phases, timeline=timeline
        )
        self.desk.ended(active)

    def _count_swap_time(self, active: ActiveSwap) -> None:
        """What a swap cost that interrupted somebody: its time without the drain, in which there was still service."""
        if not active.interrupts:
            return
        seconds = self.now_s() - active.begun_at_s - active.phases_s.get("drain", 0.0)
        for gpu in active.swap.gpus & self.fleet.gpus.keys():
            self.fleet.gpus[gpu].swaps.spent(seconds, self.now_s())

    def _is_wanted(self, active: ActiveSwap) -> bool:
        """A swap is wanted while somebody waits for its engine; commands and preloads are wanted to their end."""
        admit = active.swap.admit
        swap = active.swap
        if admit is not None and self.serves is Serves.COMMANDS:
            return False
        if admit is None or active.commands or swap.command or swap.ahead or admit.engine not in self.fleet.engines:
            return True
        engine, traffic = self.fleet.engines[admit.engine], self.world.traffic
        asked = traffic.waiting(engine.name) > 0 or traffic.in_flight(engine.name) > 0
        return asked or engine.preload or self.calendar.wants(engine.name)

    def _arm(self, at_s: float | None) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        expiry = self.desk.next_expiry_s()
        times = [t for t in (at_s, expiry) if t is not None]
        if times:
            self._alarm = asyncio.get_running_loop().call_at(min(times), self.tick)

    # -- what the gateway asks ---------------------------------------------------------------------------------------

    def eta_s(self, name: EngineName) -> float | None:
        """Seconds until the engine could serve a request that comes now; None where nobody can say."""
        engine = self.fleet.engines.get(name)
        if engine is None:
            return None
        if engine.state is State.AWAKE:
            return 0.0
        now = self.now_s()
        for active in self.active.values():
            if active.swap.admit and active.swap.admit.engine == name:
                return max(0.5, active.swap.expected_s - (now - active.begun_at_s))
        estimate = policy.eta_s(self.snapshot(), name)
        held_s = (b.until_s - now for b in self.last_plan.blocked if b.engine == name and b.until_s is not None)
        return None if estimate is None else max(estimate, *held_s, 0.0)

    def request_ended(self, model: str, waited_s: float, outcome: str) -> None:
        self.world.ledger.count_request(model, waited_s=waited_s, outcome=outcome)
        engine = self.fleet.names.get(model)
        if self.last_plan.blocked and engine and not self.world.traffic.in_flight(engine):
            self.tick()  # it is idle now: somebody who was blocked by its work may go on

    def unhealthy_gpus(self) -> list[GpuId]:
        return [g.info.id for g in self.fleet.gpus.values() if g.health is Health.UNKNOWN]


def _keeps(step: Step) -> bool:
    return step.action is Action.SLEEP and step.level is Level.HOST and step.depth in (None, Depth.HOST)


def _answer(future: asyncio.Future[bool], value: bool) -> None:
    if not future.done():  # the runner may have been cancelled meanwhile
        future.set_result(value)


def _run(action: Callable[[], Any], done: asyncio.Future[Any]) -> None:
    try:
        result = action()
    except Exception as e:
        if not done.done():
            done.set_exception(e)
        return
    if not done.done():
        done.set_result(result)


def _set(event: asyncio.Event, value: bool) -> None:
    event.set() if value else event.clear()
