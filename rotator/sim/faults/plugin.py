"""What our allocator's plugin adds to an engine's workers: freeing by bytes, and masters that move or go."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rotator.core.values import GpuId
from rotator.sim.faults.script import Arm
from rotator.sim.faults.sleeping import Sleeper
from rotator.sim.faults.wires import HTML, Lost, Reply
from rotator.sim.faults.world import GIB, OutOfMemory

if TYPE_CHECKING:
    from rotator.sim.faults.process import Process

DISK_SLOWER = 1.5  # than a sleep: masters on their way to disk
_OK = b'{"results": [null]}'


class Plugin:
    def __init__(self, process: "Process", sleeper: Sleeper) -> None:
        self._process = process
        self._sleeper = sleeper

    async def call(self, method: str, args: Sequence[Any]) -> Reply:
        match method:
            case "rotator_sleep_bytes":
                return await self._process.operate("sleep", lambda: self._free(int(args[0])))
            case "rotator_wake":
                return await self._process.operate("wake", self._restore)
            case "rotator_masters":
                return await self._place(str(args[0]))
        await asyncio.sleep(self._process.shape.wake_s)
        self._process.loaded = True
        return 200, _OK

    # -- by bytes ----------------------------------------------------------------------------------------------------

    async def _free(self, size: int) -> Reply:
        """Every rank frees so much, its KV cache first; what goes of the weights has masters in host RAM."""
        process = self._process
        if not process.sleeping:
            return 500, b'{"error": {"message": "memory is only freed while the scheduler is paused"}}'
        fault = process.engine.take("free")
        how, seconds = (fault.how, fault.seconds) if fault else ("", 0.0)
        await self._sleeper.takes_its_time("free", process.shape.sleep_s / 2, how, seconds, "killed by signal 6")
        left = self._left(size // 2 if how == "less" else size, fault)
        if how == "frees_late":
            process.do(self._free_late(left, min(seconds, 2.0)))
        else:
            self._let_go(left)
        if how == "rank_fails":
            return 500, b'{"error": {"message": "Call to rotator_sleep_bytes failed on a rank"}}'
        return await self._done(how, seconds)

    def _left(self, size: int, fault: Arm | None) -> dict[GpuId, int]:
        process, least = self._process, int(self._process.shape.residue_gib * GIB)
        how, bad = (fault.how, process.engine.rank(fault)) if fault else ("", None)
        frees = [
            g for g in process.engine.gpus if how != "lie" and (how not in ("lie_one_rank", "rank_fails") or g != bad)
        ]
        return {gpu: max(least, process.held_on(gpu) - size) for gpu in frees}

    async def _free_late(self, left: Mapping[GpuId, int], seconds: float) -> None:
        await asyncio.sleep(seconds)
        if self._process.sleeping:
            self._let_go(left)

    def _let_go(self, left: Mapping[GpuId, int]) -> None:
        process, shape = self._process, self._process.shape
        process.hold({gpu: size for gpu, size in left.items() if size < process.held_on(gpu)})
        kept = int((shape.awake_gib - shape.kv_gib) * GIB)
        if process.level == 0:
            process.keep_masters(sum(max(0, kept - process.held_on(gpu)) for gpu in process.engine.gpus))

    async def _restore(self) -> Reply:
        """Rank by rank, without a way back. Its scheduler stays paused. Raises OutOfMemory."""
        process = self._process
        fault = process.engine.take("restore")
        how, seconds = (fault.how, fault.seconds) if fault else ("", 0.0)
        await self._sleeper.takes_its_time("restore", process.shape.wake_s / 2, how, seconds, "killed by signal 11")
        if how != "noop":
            for gpu in process.engine.gpus:
                if fault and how in ("rank_fails", "oom") and gpu == process.engine.rank(fault):
                    raise OutOfMemory(f"allocator: out of memory on {gpu}")
                process.hold({gpu: int(process.shape.awake_gib * GIB)})
            process.forget_masters()
        if how in ("garbage", "nan"):
            process.spoilt = how
        return await self._done(how, seconds)

    # -- masters -----------------------------------------------------------------------------------------------------

    async def _place(self, where: str) -> Reply:
        """``none`` drops those that an awake engine keeps. No GPU is concerned."""
        process = self._process
        fault = process.engine.take("masters")
        how, seconds = (fault.how, fault.seconds) if fault else ("", 0.0)
        if how == "error":
            return 500, b'{"error": {"message": "no space left on device"}}'
        usual_s = process.shape.sleep_s * DISK_SLOWER if where == "disk" and process.sleeping else 0.01
        await self._sleeper.takes_its_time("masters", usual_s, how, seconds, "killed by signal 7")
        if how == "rank_fails":
            return 500, b'{"error": {"message": "Call to rotator_masters failed on a rank"}}'
        process.on_disk = where == "disk"
        if where == "none" or (where == "disk" and process.sleeping):
            process.keep_masters(0)
        return await self._after(how, seconds)

    async def _done(self, how: str, seconds: float) -> Reply:
        """Nothing moves on a GPU any more."""
        self._process.operation = ""
        return await self._after(how, seconds)

    async def _after(self, how: str, seconds: float) -> Reply:
        """It is done; whether the answer gets there is another matter."""
        process = self._process
        if how == "lost":
            raise Lost
        if how == "late":
            await asyncio.sleep(seconds)
        if how == "wedge":
            process.do(process.wedge(seconds))
        return 200, HTML if how == "html" else _OK
