"""What happens by the clock: reading GPUs, asking engines whether they live, looking again."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from apscheduler.schedulers.asyncio import AsyncIOScheduler
from apscheduler.triggers.interval import IntervalTrigger

from rotator.core.values import State
from rotator.ports import LedgerError
from rotator.ports_nodes import HERE, node_of
from rotator.service.loop import Loop
from rotator.service.mailbox import PidsRead, Unhealthy
from rotator.service.records import EngineRuntime

_log = logging.getLogger(__name__)
_PIDS_EVERY_S = 10.0
_ATTACHED_EVERY_S = 5.0
_LOCAL_TIME_EVERY_S = 60.0
_HISTORIES_EVERY_S = 600.0
_SUSPECT_S = 2.0
_CALENDAR_EVERY_S = 1.0


class Timers:
    """Each job runs alone: one that is late is skipped, never doubled. ``scheduler`` is APScheduler's, or what runs
    jobs under another clock. ``on_nodes`` is called in the loop's task when nodes came, went or were restarted."""

    def __init__(
        self,
        loop: Loop,
        scheduler: Any = None,
        utc_offset_s: Callable[[float], float] | None = None,
        on_nodes: Callable[[], None] = lambda: None,
    ) -> None:
        self._loop = loop
        self._on_nodes = on_nodes
        self._utc_offset_s = utc_offset_s or local_utc_offset_s
        self._suspicion: asyncio.Task[None] | None = None
        self._scheduler = scheduler or AsyncIOScheduler(
            job_defaults={"coalesce": True, "max_instances": 1, "misfire_grace_time": None}
        )

    def start(self) -> None:
        config = self._loop.world.config
        self._every(config.devices.sample_every_s, self.read_gpus)
        self._every(config.recovery.health_every_s, self._ask_health)
        if self._loop.world.nodes is not None:
            self._every(config.devices.sample_every_s, self.look_at_nodes)
        self._every(config.watchdog.every_s, self._watch)
        self._every(_PIDS_EVERY_S, self._read_pids)
        self._every(_ATTACHED_EVERY_S, self._look_for_attached)
        self._every(_LOCAL_TIME_EVERY_S, self._tell_local_time)
        self._every(_HISTORIES_EVERY_S, self._keep_histories)
        self._every(_CALENDAR_EVERY_S, self._look_at_calendar)
        self._set_local_time()
        self._scheduler.start()
        self._suspicion = asyncio.create_task(self._ask_suspects())

    def stop(self) -> None:
        if self._suspicion:
            self._suspicion.cancel()
        if self._scheduler.running:
            self._scheduler.shutdown(wait=False)

    def _every(self, seconds: float, job: Callable[[], Awaitable[None]]) -> None:
        self._scheduler.add_job(job, IntervalTrigger(seconds=seconds), id=job.__name__)

    async def read_gpus(self) -> None:
        await asyncio.gather(*(self._loop.look_at(gpu) for gpu in self._loop.fleet.gpus))
        self._loop.tick()

    async def _ask_health(self) -> None:
        awake = [e for e in self._loop.all_runtimes() if e.state is State.AWAKE and not self._is_away(e)]
        deadline_s = self._loop.world.config.recovery.health_every_s
        answers = await asyncio.gather(
            *(self._loop.world.control.is_healthy(e.url, deadline_s=deadline_s) for e in awake)
        )
        for engine, ok in zip(awake, answers, strict=True):
            self._loop.tell(Unhealthy(engine.name, ok))

    async def _watch(self) -> None:
        await self._loop.sentinel.look()

    async def _ask_suspects(self) -> None:
        """The gateway could not reach an engine that was believed awake: ask it now, not at the next round."""
        async for event in self._loop.world.bus.follow():
            if event.kind == "engine.unreachable" and event.engine in self._loop.fleet.engines:
                engine = self._loop.runtime(event.engine)
                if self._is_away(engine):
                    continue
                ok = await self._loop.world.control.is_healthy(engine.url, deadline_s=_SUSPECT_S)
                self._loop.tell(Unhealthy(engine.name, ok))

    def _is_away(self, engine: EngineRuntime) -> bool:
        """Whether its node's agent does not answer: then nobody can ask it, and that says nothing about it."""
        nodes, node = self._loop.world.nodes, node_of(engine.gpus[0])
        return nodes is not None and node != HERE and not nodes.known(node).reachable

    async def look_at_nodes(self) -> None:
        """Agents are asked how their machines are; what changed is told and kept."""
        world = self._loop.world
        if world.nodes is None:
            return
        changed = await world.nodes.look(deadline_s=world.config.devices.read_deadline_s)
        for record in changed:
            word = "node.back" if record.reachable else "node.lost"
            world.bus.publish(word, node=record.name, reason=record.reason, boot_id=record.boot_id)
            try:
                await world.ledger.put_node(record)
            except LedgerError as e:
                _log.warning("node %s: %s", record.name, e)
        if changed:
            await self._loop.do(self._on_nodes)

    async def _read_pids(self) -> None:
        for engine in self._loop.all_runtimes():
            if engine.live and engine.handle is not None:
                handle = engine.handle
                pids = await self._loop.world.launchers[handle.launcher].pids(handle)
                self._loop.tell(PidsRead(engine.name, handle.ref, pids))

    async def _look_for_attached(self) -> None:
        if self._loop.adopting:
            return
        now = self._loop.now_s()
        for engine in self._loop.all_runtimes():
            away = engine.config.launcher == "attach" and engine.state in (State.STOPPED, State.FAILED)
            if away and engine.retry_at_s <= now:
                await self._loop.adopter.adopt_attached(engine)

    async def _look_at_calendar(self) -> None:
        """By the wall clock, which may be set: the planner's own alarm is on the loop's."""
        if self._loop.calendar_is_due():
            self._loop.tick()

    async def _tell_local_time(self) -> None:
        self._set_local_time()

    def _set_local_time(self) -> None:
        """Hours of the day are learned in local time, which a clock set or a summer's end moves."""
        wall_s = self._loop.wall_s()
        self._loop.world.traffic.local_offset_s = wall_s + self._utc_offset_s(wall_s) - self._loop.now_s()

    async def _keep_histories(self) -> None:
        """What requests have taught outlives the service: rows are also written when an engine changes its state."""
        for engine in self._loop.all_runtimes():
            self._loop.recorder.note(engine)


def local_utc_offset_s(wall_s: float) -> float:
    """Seconds that local time is ahead of UTC then, where this service runs."""
    return float(time.localtime(wall_s).tm_gmtoff)
