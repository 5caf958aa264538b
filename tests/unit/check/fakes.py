"""A machine and its GPUs, written by hand: all is well unless a test says otherwise."""

from collections.abc import Mapping
from pathlib import Path

from rotator.ports import DeviceError, GpuInfo, GpuReading, HostMemory, Recovered

GIB = 1 << 30


class FakeMachine:
    def __init__(self) -> None:
        self.env: Mapping[str, str] = {"PATH": "/usr/bin"}
        self.held: dict[int, str] = {}
        self.service: int | None = None
        self.engines: dict[int, str] = {}  # of this fleet's own service, by port and by process
        self.broken_programs: dict[str, str] = {}
        self.missing: set[Path] = set()
        self.readonly: dict[Path, str] = {}
        self.memory_gib = 512
        self.memlock: int | None = None
        self.ledger: str | None = None
        self.known: Recovered | None = None
        self.wall_s = 1_795_248_000.0  # a Saturday in November 2026

    def port_holder(self, host: str, port: int) -> str | None:
        return self.held.get(port)

    def service_pid(self, ledger_url: str, port: int) -> int | None:
        return self.service

    def engine_on(self, port: int, state_dir: Path) -> str | None:
        return self.engines.get(port)

    def engine_of(self, pid: int, state_dir: Path) -> str | None:
        return self.engines.get(pid)

    def program_problem(self, program: str, workdir: str | None, path: str | None) -> str | None:
        return self.broken_programs.get(program)

    def exists(self, path: Path) -> bool:
        return path not in self.missing

    def unwritable(self, folder: Path) -> str | None:
        return self.readonly.get(folder)

    def host_memory(self) -> HostMemory:
        return HostMemory(self.memory_gib * GIB, self.memory_gib * GIB)

    def memlock_bytes(self) -> int | None:
        return self.memlock

    def now_wall_s(self) -> float:
        return self.wall_s

    def remembered(self, url: str) -> Recovered | None:
        return self.known

    def ledger_problem(self, url: str) -> str | None:
        return self.ledger


class FakeDevices:
    """``count`` GPUs of 96 GiB."""

    def __init__(self, count: int = 4) -> None:
        self.infos = tuple(GpuInfo(f"GPU-{i}", i, "RTX PRO 6000", 96 * GIB) for i in range(count))
        self.used_gib: dict[str, int] = {}
        self.inventory_error: DeviceError | None = None
        self.read_error: DeviceError | None = None

    async def inventory(self, *, deadline_s: float) -> tuple[GpuInfo, ...]:
        if self.inventory_error:
            raise self.inventory_error
        return self.infos

    async def read(self, gpu: str, *, deadline_s: float) -> GpuReading:
        if self.read_error:
            raise self.read_error
        used = self.used_gib.get(gpu, 0) * GIB
        return GpuReading(gpu, used, 96 * GIB, {99: used} if used else {})
