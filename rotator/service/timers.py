"""What happens by the clock: reading GPUs, asking engines whether they live, looking again."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from apscheduler.schedulers.asyncio import AsyncIOScheduler
from apscheduler.triggers.interval import IntervalTrigger

from rotator.core.values import State
from rotator.service.loop import Loop
from rotator.service.mailbox import PidsRead, Unhealthy

_log = logging.getLogger(__name__)
_PIDS_EVERY_S = 10.0
_ATTACHED_EVERY_S = 5.0
_LOCAL_TIME_EVERY_S = 60.0
_HISTORIES_EVERY_S = 600.0
_SUSPECT_S = 2.0
_CALENDAR_EVERY_S = 1.0


class Timers:
    """Each job runs alone: one that is late is skipped, never doubled. ``scheduler`` is APScheduler's, or what runs
    jobs under another clock."""

    def __init__(self, loop: Loop, scheduler: Any = None, utc_offset_s: Callable[[float], float] | None = None) -> None:
        self._loop = loop
        self._utc_offset_s = utc_offset_s or local_utc_offset_s
        self._suspicion: asyncio.Task[None] | None = None
        self._scheduler = scheduler or AsyncIOScheduler(
            job_defaults={"coalesce": True, "max_instances": 1, "misfire_grace_time": None}
        )

    def start(self) -> None:
        config = self._loop.world.config
        self._every(config.devices.sample_every_s, self.read_gpus)
        self._every(config.recovery.health_every_s, self._ask_health)
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
        awake = [e for e in self._loop.all_runtimes() if e.state is State.AWAKE]
        deadline_s = self._loop.world.config.recovery.health_every_s
        answers = await asyncio.gather(
            *(self._loop.world.control.is_healthy(e.url, deadline_s=deadline_s) for e in awake)
        )
        for engine, ok in zip(awake, answers, strict=True):
            self._loop.tell(Unhealthy(engine.name, ok))

    async def _ask_suspects(self) -> None:
        """The gateway could not reach an engine that was believed awake: ask it now, not at the next round."""
        async for event in self._loop.world.bus.follow():
            if event.kind == "engine.unreachable" and event.engine in self._loop.fleet.engines:
                engine = self._loop.runtime(event.engine)
                ok = await self._loop.world.control.is_healthy(engine.url, deadline_s=_SUSPECT_S)
                self._loop.tell(Unhealthy(engine.name, ok))

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
