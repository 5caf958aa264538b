"""Ends an engine and does not look away until its processes are gone and its bytes are back."""

import asyncio
import logging
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from rotator.core.lifecycle import Event
from rotator.core.values import Action, GpuId, State
from rotator.ports import DeviceError, GpuReading, LaunchError, LedgerError
from rotator.service.accounting import gib, read_gpus, wait_drained
from rotator.service.journal import Entry
from rotator.service.owner import Facts, Owner
from rotator.service.records import EngineRuntime
from rotator.service.world import World

_log = logging.getLogger(__name__)
_LOG_TAIL_BYTES = 16384
_EVIDENCE_S = 3.0
AGAIN_S = 5.0
CUDA_FIRST = "CUDA:"  # how a launcher's evidence begins where an engine's log names an error of the driver


class Undertaker:
    def __init__(self, world: World, owner: Owner) -> None:
        self._world = world
        self._owner = owner
        self._tasks: set[asyncio.Task[None]] = set()

    def background(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something that nobody waits for, keeping a reference until it is done."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def settle(self) -> None:
        """Wait for everything in the background."""
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def bury(self, name: str, end: Event, reason: str, *, grace_s: float) -> None:
        """End the engine (STOPPING already) and report ``end`` once its bytes are back, or once they stay away too
        long: then they count as foreign, and the reason names who holds what."""
        engine = self._owner.runtime(name)
        self._world.traffic.abort(name, reason)
        told = await self.evidence(engine) if end is not Event.GONE else ""
        if told.startswith(CUDA_FIRST) and told not in reason:
            reason = f"{reason}; {told}"
        entry = await self._intent(engine, end, reason)
        pids = engine.pids
        await self._kill(engine, grace_s, reason)
        left = await self._bytes_left(engine, pids)
        words = reason
        if left:
            holders = await self._holders(engine)
            words = f"{reason}; its processes are gone but {left} did not come back: {holders}"
        facts = Facts(words, pids=frozenset(), held_bytes={})
        # What is there all the same (bytes without a process, others' that came meanwhile) the next plan must know.
        await self._owner.moved(name, end, facts, await self._readings(engine))
        if entry is not None:
            await entry.close(
                "ok" if words == reason else "failed", engine.state, error=None if words == reason else words
            )

    async def evidence(self, engine: EngineRuntime) -> str:
        """What its log says of its trouble, where its launcher can tell soon."""
        if engine.handle is None:
            return ""
        try:
            async with asyncio.timeout(_EVIDENCE_S):
                return await self._world.launchers[engine.handle.launcher].evidence(engine.handle)
        except TimeoutError:
            return ""

    async def _intent(self, engine: EngineRuntime, end: Event, reason: str) -> Entry | None:
        """A kill that cannot be journalled still has to happen: an engine of unknown state must not stay."""
        to_state = {Event.GONE: State.STOPPED, Event.GONE_FAULTY: State.FAILED, Event.GONE_LIAR: State.QUARANTINED}[end]
        try:
            return await self._world.journal.open("", engine.name, Action.STOP, engine.state, to_state, reason)
        except LedgerError as e:
            _log.error("journal: the end of %s is not written: %s", engine.name, e)
            return None

    async def _kill(self, engine: EngineRuntime, grace_s: float, reason: str) -> None:
        """Return when none of its processes is left. One that will not go, or a launcher that does not answer, keeps it
        stopping: were it looked away from, its bytes would be foreign and its next start would double it."""
        if engine.config.launcher == "attach":
            return  # not ours to end
        while trouble := await self._end(engine, grace_s):
            await self._owner.learned(engine.name, Facts(f"{reason}; {trouble}; tried again every {AGAIN_S:g} s"))
            await asyncio.sleep(AGAIN_S)
            grace_s = 0.0

    async def _end(self, engine: EngineRuntime, grace_s: float) -> str | None:
        """None when nothing of it is left, else what stands in the way. A start whose answer was lost may have left a
        process that nobody has a handle of (or only that of an earlier launch): it is looked for."""
        launcher = self._world.launchers[engine.config.launcher]
        try:
            if engine.handle is not None:
                await launcher.stop(engine.handle, grace_s=grace_s)
            if (left := await launcher.find(engine.spec, None)) is not None:
                await launcher.stop(left, grace_s=grace_s)
        except LaunchError as e:
            return str(e)
        return None

    async def _bytes_left(self, engine: EngineRuntime, pids: frozenset[int]) -> str | None:
        if engine.config.launcher == "attach":
            return None
        others = {
            gpu: sum(e.charge_on(gpu) for e in self._others_on(engine, gpu)) + self._foreign(gpu) for gpu in engine.gpus
        }
        return await wait_drained(
            self._world.devices,
            engine.gpus,
            pids,
            most_used=others,
            read_deadline_s=self._world.config.devices.read_deadline_s,
            patience_s=self._world.config.recovery.vram_drain_deadline_s,
        )

    async def _holders(self, engine: EngineRuntime) -> str:
        """Who else holds bytes on its GPUs, by name, where the driver tells."""
        own = frozenset(pid for other in self._owner.all_runtimes() if other is not engine for pid in other.pids)
        found: dict[int, int] = {}
        for reading in (await self._readings(engine)).values():
            for pid, size in (reading.by_pid or {}).items():
                if pid not in own and size:
                    found[pid] = found.get(pid, 0) + size
        if not found:
            return "the driver names no process that holds them: look with `nvidia-smi` and `fuser -v /dev/nvidia*`"
        names = await self._world.senses.evidence.names(frozenset(found))
        told = ", ".join(f"{pid} ({names.get(pid, 'unknown here')}) {gib(size)}" for pid, size in found.items())
        return f"held by {told}"

    async def _readings(self, engine: EngineRuntime) -> dict[GpuId, GpuReading]:
        try:
            return await read_gpus(self._world.devices, engine.gpus, self._world.config.devices.read_deadline_s)
        except DeviceError:
            return {}  # nothing is planned on a GPU that cannot be read

    def _others_on(self, engine: EngineRuntime, gpu: str) -> list[EngineRuntime]:
        return [e for e in self._owner.all_runtimes() if e is not engine and gpu in e.gpus]

    def _foreign(self, gpu: str) -> int:
        return self._owner.foreign_bytes(gpu)


def log_tail(path: str, lines: int = 5) -> str:
    """The last lines of an engine's log on one line, or an empty text."""
    try:
        with Path(path).open("rb") as f:
            f.seek(0, 2)
            f.seek(max(0, f.tell() - _LOG_TAIL_BYTES))
            text = f.read().decode(errors="replace")
    except OSError:
        return ""
    return " | ".join(line.strip() for line in text.splitlines()[-lines:] if line.strip())
