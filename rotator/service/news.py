"""What is heard of engines, launchers and GPUs between transitions, and what follows from it at once."""

import asyncio
import logging
from math import inf
from typing import TYPE_CHECKING

from rotator.core.lifecycle import Event, is_moving
from rotator.core.values import Depth, EngineName, GpuId, State
from rotator.ports import GpuReading, Handle, LauncherNews
from rotator.service.accounting import held_by
from rotator.service.mailbox import Exited
from rotator.service.owner import Facts
from rotator.service.records import EngineRuntime

if TYPE_CHECKING:
    from rotator.service.loop import Loop

_log = logging.getLogger(__name__)
WATCH_AGAIN_S = 5.0
NEWS_BYTES = 64 << 20  # an engine's charge that changes by more is written down
LIE_S = 5.0  # a sleeper that is seen to hold too much for so long is none


class News:
    """Part of the loop's task: only the loop calls it."""

    def __init__(self, loop: "Loop") -> None:
        self._loop = loop
        self._overfull_since_s: dict[tuple[EngineName, GpuId], float] = {}

    def watch(self, engine: EngineRuntime, handle: Handle) -> None:
        """Hear when this launch ends."""
        if engine.watch:
            engine.watch.cancel()

        async def watch() -> None:
            while True:
                try:
                    how = await self._loop.world.launchers[handle.launcher].wait_exit(handle)
                except Exception:  # whatever it is: an engine that nobody watches would count as awake for ever
                    _log.exception("watching %s failed, trying again", engine.name)
                    await asyncio.sleep(WATCH_AGAIN_S)
                else:
                    self._loop.tell(Exited(engine.name, how, handle.ref))
                    return

        engine.watch = asyncio.create_task(watch())

    def exited(self, name: EngineName, how: str, ref: object) -> None:
        engine = self._loop.fleet.engines.get(name)
        if engine is None or engine.handle is None or engine.handle.ref != ref:
            return
        if engine.live and engine.state is not State.STOPPING:
            self._loop.apply(name, Event.FAULT, Facts(f"its process ended: {how}", kind="crashed"))

    def health(self, name: EngineName, ok: bool) -> None:
        engine = self._loop.fleet.engines.get(name)
        if engine is None:
            return
        engine.unhealthy_probes = 0 if ok or engine.state is not State.AWAKE else engine.unhealthy_probes + 1
        if engine.unhealthy_probes >= self._loop.world.config.recovery.health_failures_max:
            engine.unhealthy_probes = 0
            self._loop.apply(
                name, Event.FAULT, Facts("it did not answer /health several times in a row", kind="silent")
            )

    def launcher_told(self, news: LauncherNews) -> None:
        """Shown and published; no engine's state follows from it."""
        engine = self._loop.fleet.engines.get(news.engine) if news.engine is not None else None
        if news.engine is not None and engine is None:
            return
        notes = self._loop.launcher_notes if engine is None else engine.notes
        if news.over:
            notes.pop(news.topic, None)
        else:
            notes[news.topic] = news.text
        self._loop.world.bus.publish(news.kind, news.engine, launcher=news.launcher, topic=news.topic, reason=news.text)

    def pids_read(self, name: EngineName, ref: object, pids: frozenset[int]) -> None:
        engine = self._loop.fleet.engines.get(name)
        if engine and engine.handle and engine.handle.ref == ref:
            engine.pids = pids

    def gpu_read(self, gpu: GpuId, reading: GpuReading | None, error: str | None, begun_at_s: float) -> None:
        record = self._loop.fleet.gpus.get(gpu)
        if record is None:
            return
        before, here = record.health, [e for e in self._loop.fleet.engines.values() if gpu in e.gpus]
        charged = [engine.charge_on(gpu) for engine in here]
        # One that came with a transition's end counts, though its swap has still to be told that it is over.
        claimed = self._loop.moving() if begun_at_s == inf else self._loop.claimed()
        current = begun_at_s >= record.moved_at_s
        self._loop.fleet.read(gpu, reading, error, claimed=gpu in claimed, current=current)
        if record.health is not before:
            self._loop.world.bus.publish(f"gpu.{record.health.value}", gpu=gpu, reason=error or "it answers again")
        for engine, known in zip(here, charged, strict=True):
            if abs(engine.charge_on(gpu) - known) > NEWS_BYTES and not is_moving(engine.state):
                self._loop.recorder.note(engine)  # it was not measured when it came here, or it has grown since
        if reading is not None:
            for engine in here:
                self._look_at_sleeper(engine, gpu, None if gpu in claimed else reading)
                self._loop.progress.read(engine, gpu, reading.used_bytes, self._loop.now_s())
            holders = {e.name: e.charge_on(gpu) for e in here}
            holders["(foreign)"] = record.foreign_bytes
            self._loop.world.ledger.sample_vram(self._loop.wall_s(), gpu, reading.used_bytes, holders)

    def _look_at_sleeper(self, engine: EngineRuntime, gpu: GpuId, reading: GpuReading | None) -> None:
        """Its sleep was verified by bytes where those could be told, or taken on its word; now they tell otherwise. An
        attached engine may have been woken by its owner, and is charged what it holds."""
        held = held_by({gpu: reading}, engine.pids) if reading is not None and _sleeps_whole(engine) else None
        wrong = engine.holds_too_much(held or {}, self._loop.world.config.recovery.first_sleep_frees_min)
        if wrong is None:
            self._overfull_since_s.pop((engine.name, gpu), None)
        elif self._loop.now_s() - self._overfull_since_s.setdefault((engine.name, gpu), self._loop.now_s()) >= LIE_S:
            self._loop.apply(engine.name, Event.LIED, Facts(wrong))


def _sleeps_whole(engine: EngineRuntime) -> bool:
    """Whether it is ours, asleep, and not by bytes alone: such a one may hold any number of them."""
    return engine.state is State.ASLEEP and engine.depth is not Depth.KV and engine.config.launcher != "attach"
