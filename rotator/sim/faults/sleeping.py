"""How a process sleeps and wakes, and everything that can go wrong with it."""

import asyncio
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rotator.core.values import GpuId
from rotator.sim.faults.script import Arm
from rotator.sim.faults.wires import HTML, Lost, Reply
from rotator.sim.faults.world import GIB, OutOfMemory

if TYPE_CHECKING:
    from rotator.sim.faults.process import Process

WEIGHTS_SHARE = 0.7  # of what a sleep gives back; the rest is the KV cache
STAGED_SINCE = (0, 24)
BODIES_SINCE = (0, 32)
DISK_SLOWER = 3.0  # a wake from masters on disk


class Sleeper:
    """Carries out sleeps and wakes of one process."""

    def __init__(self, process: "Process") -> None:
        self._process = process

    # -- sleep -------------------------------------------------------------------------------------------------------

    async def sleep(self, level: int, mode: str) -> Reply:
        process, shape = self._process, self._process.shape
        fault = process.engine.take("sleep")
        how, seconds = (fault.how, fault.seconds) if fault else ("", 0.0)
        await self._let_go_of_requests(mode)
        await self.takes_its_time("sleep", shape.sleep_s, how, seconds, "killed by signal 6")
        if level == 0:
            return await self._pause(how, seconds)
        bad = process.engine.rank(fault) if fault else None
        asleep = {gpu: int(shape.residue_gib * GIB) for gpu in process.engine.gpus}
        if how == "rank_fails":
            process.hold({gpu: size for gpu, size in asleep.items() if gpu != bad})
            return 500, b'{"error": {"message": "Memory usage increased after sleeping."}}'
        process.sleeping, process.level = True, level
        process.loaded = process.loaded and level == 1
        process.keep_masters(int(shape.host_gib * GIB) if level == 1 and not process.on_disk else 0)
        if how == "frees_late":
            process.do(self._free_late(asleep, min(seconds, 2.0)))
        elif how != "lie":
            process.hold({gpu: size for gpu, size in asleep.items() if how != "lie_one_rank" or gpu != bad})
        return await self.after(how, seconds, {"status": "sleeping", "level": level})

    async def _pause(self, how: str, seconds: float) -> Reply:
        """Level 0: its scheduler stands, and nothing is freed yet."""
        if how == "rank_fails":
            return 500, b'{"error": {"message": "the scheduler was not paused"}}'
        self._process.sleeping, self._process.level = True, 0
        return await self.after(how, seconds, {"status": "sleeping", "level": 0})

    async def _let_go_of_requests(self, mode: str) -> None:
        process = self._process
        if mode == "abort":
            for wire in tuple(process.wires):
                wire.finish_early()
        while mode == "wait" and any(wire.busy for wire in process.wires):  # noqa: ASYNC110 — virtual time
            await asyncio.sleep(0.1)
        process.runs.clear()

    async def _free_late(self, sizes: Mapping[GpuId, int], seconds: float) -> None:
        await asyncio.sleep(seconds)
        if self._process.sleeping:
            self._process.hold(sizes)

    # -- wake --------------------------------------------------------------------------------------------------------

    async def wake(self, tags: tuple[str, ...]) -> Reply:
        process = self._process
        if tags == ("scheduling",) or not process.sleeping:
            self._resume()
            return self._body({"status": "awake", "tags": list(tags)})
        fault = process.engine.take("wake") if "kv_cache" not in tags else None
        how, seconds = (fault.how, fault.seconds) if fault else ("", 0.0)
        usual_s = process.shape.wake_s * (DISK_SLOWER if process.on_disk and process.level == 1 else 1.0)
        await self.takes_its_time("wake", usual_s, how, seconds, "killed by signal 11")
        if how != "noop" and how != "stays_asleep":
            self._map(tags, fault)
        if how == "noop":
            return self._body({"status": "awake", "tags": list(tags)})
        if not tags or "kv_cache" in tags or process.release < STAGED_SINCE:
            process.sleeping = False
            if how != "stays_asleep":
                process.flow()
        if how in ("garbage", "nan"):
            process.spoilt = how
        return await self.after(how, seconds, {"status": "awake", "tags": list(tags)})

    def _resume(self) -> None:
        """After a pause. Whatever runs on memory that is not there is a segmentation fault."""
        process = self._process
        if process.sleeping and process.level == 0:
            if any(process.held_on(gpu) < int(process.shape.awake_gib * GIB) for gpu in process.engine.gpus):
                process.die("killed by signal 11: its scheduler ran over memory that sleeps")
                raise Lost
            process.sleeping = False
        process.flow()

    def _map(self, tags: tuple[str, ...], fault: Arm | None) -> None:
        """Rank by rank, without a way back: what was mapped before a failure stays. Raises OutOfMemory."""
        process, shape = self._process, self._process.shape
        awake, residue = int(shape.awake_gib * GIB), int(shape.residue_gib * GIB)
        partly = residue + int((awake - residue) * WEIGHTS_SHARE)
        size = partly if tags == ("weights",) else awake
        for gpu in process.engine.gpus:
            if fault and fault.how in ("rank_fails", "oom") and gpu == process.engine.rank(fault):
                raise OutOfMemory(f"cumem: out of memory on {gpu}")
            process.hold({gpu: size})
        process.forget_masters()

    # -- both --------------------------------------------------------------------------------------------------------

    async def takes_its_time(self, op: str, usual_s: float, how: str, more_s: float, end: str) -> None:
        """Raises Lost where the process dies of it."""
        process = self._process
        if how == "hang":
            await asyncio.Event().wait()
        await asyncio.sleep(usual_s * process.world.draw(f"{op} {process.shape.name}", 0.7, 1.3))
        if how == "slow":
            await asyncio.sleep(more_s)
        if how == "crash":
            process.die(end)
            raise Lost

    async def after(self, how: str, seconds: float, body: Mapping[str, Any]) -> Reply:
        """It is done; whether the answer gets there is another matter."""
        self._process.operation = ""
        if how == "lost":
            raise Lost
        if how == "late":
            await asyncio.sleep(seconds)
        if how == "html":
            return 200, HTML
        if how == "wedge":
            self._process.do(self._process.wedge(seconds))
        return self._body(body)

    def _body(self, body: Mapping[str, Any]) -> Reply:
        return 200, json.dumps(body).encode() if self._process.release >= BODIES_SINCE else b""
