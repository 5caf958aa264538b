"""GPUs' queries, processes and the disk under the ledger: the ports' far side."""

import asyncio
import sqlite3
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from sqlalchemy import event

from rotator.adapters.ledger import SqlLedger
from rotator.adapters.ledger_database import Database, parse
from rotator.adapters.ledger_worker import Worker
from rotator.core.gpu_faults import GpuHealth
from rotator.core.values import GpuId
from rotator.ports import DeviceError, DeviceTimeout, GpuInfo, GpuReading, Handle, LaunchError, LaunchSpec
from rotator.ports_watchdog import Case
from rotator.sim.faults.engine import SimEngine
from rotator.sim.faults.process import Process
from rotator.sim.faults.world import LIFE, World, alive

FOREIGN_PID = 9
KILL_DEADLINE_S = 15.0  # as the process launcher has it
ANSWER_S = 10.0  # how long a launcher that hangs keeps its caller
SLOW_S = 0.3


class SimDevices:
    """Implements the Devices port. A reading shows one instant between question and answer."""

    def __init__(self, world: World) -> None:
        self._world = world

    async def inventory(self, *, deadline_s: float) -> tuple[GpuInfo, ...]:
        await self._world.pause(0.01)
        return tuple(GpuInfo(g.id, g.index, "simulated", g.total) for g in self._world.gpus.values())

    async def read(self, gpu: GpuId, *, deadline_s: float) -> GpuReading:
        there = self._world.gpus[gpu]
        if there.query == "hang":
            await self._world.pause(deadline_s)
            raise DeviceTimeout(f"{gpu}: the driver did not answer within {deadline_s:g} s")
        await self._world.pause(self._world.draw(f"ask {gpu}", 0.001, 0.01))
        if there.query == "lost":
            raise DeviceError(f"{gpu}: NVML says: GPU is lost")
        if there.query == "fail":
            raise DeviceError(f"{gpu}: NVML says: Unknown Error")
        by_pid = dict(there.held)
        if there.foreign:
            by_pid[FOREIGN_PID] = there.foreign
        reading = GpuReading(gpu, there.used, there.total, None if there.query == "blind" else by_pid)
        await self._world.pause(self._world.draw(f"tell {gpu}", 0.001, 0.01))
        return reading


class SimSenses:
    """Implements GpuReports, LogWatch and Evidence: collecting takes its time, and shows nobody's secrets."""

    def __init__(self, world: World, engines: Mapping[str, SimEngine]) -> None:
        self._world = world
        self._engines = engines

    async def health(self, gpu: GpuId, *, deadline_s: float) -> GpuHealth:
        query = self._world.gpus[gpu].query
        if query == "hang":
            await self._world.pause(deadline_s)
            raise DeviceTimeout(f"{gpu}: the driver did not answer within {deadline_s:g} s")
        await self._world.pause(0.001)
        if query == "fail":
            raise DeviceError(f"{gpu}: NVML says: Unknown Error")
        return GpuHealth(gpu, lost="GPU is lost" if query == "lost" else "")

    async def warnings(self, log_path: str) -> int:
        alive()
        name = Path(log_path).stem
        process = self._engines[name].process if name in self._engines else None
        return process.warnings if process else 0

    async def collect(self, case: Case, *, deadline_s: float) -> int:
        await self._world.pause(self._world.draw(f"evidence {case.engine}", 0.1, min(deadline_s, 3.0)))
        self._world.injected["evidence collected"] += 1
        return 1024

    async def manifest(self, id: str) -> Mapping[str, Any]:
        return {}

    async def bundle(self, id: str) -> AsyncIterator[bytes]:
        yield b""

    async def names(self, pids: frozenset[int]) -> Mapping[int, str]:
        return dict.fromkeys(sorted(pids), "simulated")


class SimLauncher:
    """Implements the Launcher port. ``away`` is how it cannot be had now: refuse, hang, lost, or "" where it can."""

    def __init__(self, world: World, engines: Mapping[str, SimEngine]) -> None:
        self.away = ""
        self._world = world
        self._engines = engines

    async def start(self, spec: LaunchSpec) -> Handle:
        self._world.on_effect("start")
        await self._reach()
        engine = self._engines[spec.engine]
        fault = engine.take("launch")
        if fault and fault.how == "refuse":
            raise LaunchError(f"engine '{spec.engine}': program not found")
        process = engine.launch(int(spec.url.rsplit(":", 1)[1]))
        self._world.trace.note(f"launch {spec.engine} pid {process.pid}")
        await self._world.pause(0.02)
        if self.away == "lost" or (fault and fault.how == "lost"):
            engine.trouble()
            raise LaunchError(f"engine '{spec.engine}': the launcher's answer was lost")
        return _handle(spec, process)

    async def find(self, spec: LaunchSpec, ref: Mapping[str, Any] | None) -> Handle | None:
        await self._reach()
        engine = self._engines.get(spec.engine)
        process = engine.process if engine else None
        return _handle(spec, process) if process else None

    async def is_alive(self, handle: Handle) -> bool:
        await self._reach()
        return self._process(handle) is not None

    async def wait_exit(self, handle: Handle) -> str:
        alive()
        process = self._process(handle)
        if process is None:
            return "it is gone"
        await self._world.over(process.ended)
        return process.ended.result()

    async def stop(self, handle: Handle, *, grace_s: float) -> None:
        self._world.on_effect("stop")
        await self._reach()
        process = self._process(handle)
        if process is None:
            return
        engine = process.engine
        if engine.is_undying:
            engine.trouble()
            await self._world.pause(KILL_DEADLINE_S)
            if process.alive:
                raise LaunchError(f"engine '{handle.engine}': still there {KILL_DEADLINE_S:g} s after SIGKILL")
            return
        await self._world.pause(min(grace_s, self._world.draw(f"stop {handle.engine}", 0.05, 1.0)))
        process.die("stopped", asked=True)
        if self.away == "lost":
            raise LaunchError(f"engine '{handle.engine}': the launcher's answer was lost")

    async def pids(self, handle: Handle) -> frozenset[int]:
        await self._reach()
        process = self._process(handle)
        return frozenset((process.pid,)) if process else frozenset()

    async def evidence(self, handle: Handle) -> str:
        return ""

    async def _reach(self) -> None:
        await self._world.pause(0.005)
        if self.away in ("refuse", "hang"):
            if self.away == "hang":
                await self._world.pause(ANSWER_S)
            raise LaunchError("the launcher cannot be reached")

    def _process(self, handle: Handle) -> Process | None:
        engine = self._engines.get(handle.engine)
        running = engine.processes if engine else []
        return next((p for p in running if p.pid == handle.ref.get("pid")), None)


def _handle(spec: LaunchSpec, process: Process) -> Handle:
    return Handle(spec.engine, "process", spec.url, {"pid": process.pid})


# -- the ledger's disk -----------------------------------------------------------------------------------------------


class SimDisk:
    """``trouble`` is how the disk misbehaves now: full, hang, slow, or ""."""

    def __init__(self, world: World) -> None:
        self.trouble = ""
        self.database: Database | None = None  # of the life that holds it
        self._world = world
        self._mended = asyncio.Event()

    def mend(self) -> None:
        self.trouble = ""
        self._mended.set()
        self._mended = asyncio.Event()

    async def seek(self) -> None:
        if self.trouble == "slow":
            await asyncio.sleep(SLOW_S)
        while self.trouble == "hang":
            await self._mended.wait()
        await asyncio.sleep(self._world.draw("disk", 0.0002, 0.002))

    def take(self, database: Database) -> None:
        """From now on commits fail while the disk is full."""
        self.database = database
        event.listen(database._writer, "commit", self._commit)

    def _commit(self, _: Any) -> None:
        if self.trouble == "full":
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorname = "SQLITE_FULL"
            raise error

    def let_go(self) -> None:
        """What the kernel does when the service dies: its lock and its connections end."""
        if self.database is not None:
            self.database.close()
            self.database = None


@cache
def new_ledger() -> bytes:
    """An empty ledger as a file's bytes. Making one costs as much as a tenth of a run: it is made once a process."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.db"
        database = Database(parse(f"sqlite:///{path}"), busy_s=1.0)
        database.open()
        database.close()
        return path.read_bytes()


class SimLedger(SqlLedger):
    """The ledger as it is, on a disk that may be full; the disk hears which database a killed service leaves behind."""

    @classmethod
    def on(cls, disk: SimDisk) -> "type[SimLedger]":
        class OnDisk(cls):  # type: ignore[valid-type,misc]  # ``open`` makes it by its class alone
            def __init__(self, database: Database, **settings: Any) -> None:
                disk.take(database)
                super().__init__(database, **settings)

        return OnDisk


class DiskWorker(Worker):
    """The ledger's thread as a task of the world: same queue, same deadlines, same late answers, virtual time."""

    def __init__(self, name: str, world: World, disk: SimDisk) -> None:
        self._world = world
        self._disk = disk
        self._life = LIFE.get()
        self._line = _Line()
        super().__init__(name)
        self._jobs = self._line  # type: ignore[assignment]  # as a queue between threads, without any

    def _begin_work(self) -> None:
        self._world.spawn(self._work_virtually())

    def _is_dead(self) -> bool:
        return self._life is not None and self._life.dead

    async def _work_virtually(self) -> None:
        while (job := await self._line.next()) is not None and not self._is_dead():
            if not self._begin(job):
                continue
            await self._disk.seek()
            if not self._is_dead() and "writer" in self._name:
                self._world.on_effect("commit")
            if self._is_dead():
                return
            job.run()
            await self._disk.seek()
            self._end(job)


class _Line:
    """A queue without threads."""

    def __init__(self) -> None:
        self._jobs: deque[Any] = deque()
        self._filled = asyncio.Event()

    def put(self, job: Any) -> None:
        self._jobs.append(job)
        self._filled.set()

    def qsize(self) -> int:
        return len(self._jobs)

    async def next(self) -> Any:
        while not self._jobs:
            self._filled.clear()
            await self._filled.wait()
        return self._jobs.popleft()


def handles(engines: Sequence[SimEngine]) -> dict[str, SimEngine]:
    return {engine.shape.name: engine for engine in engines}
