"""GPUs through NVML (``pynvml`` of nvidia-ml-py; also over a library that only looks like NVML).

What the numbers mean:
  * ``used_bytes`` is what processes hold (version 2 of the query). What the driver keeps for itself is in neither
    used nor total: ``total_bytes`` is what processes can ever hold, so sums of a ledger and of a device can agree.
    Drivers that only know version 1 count their own part as used.
  * ``utilization`` is a share in [0, 1].
  * On unified memory (GB10), where NVML has no answer, both are the host's: MemTotal, and MemTotal - MemAvailable.
  * ``by_pid`` is None where the driver does not tell: no sizes, or pids of another namespace (most containers). Those
    are recognized by not being in our /proc, twice in a row; a list that is empty while bytes are held is no answer
    there either. In the machine's own pid namespace every pid is believed.
"""

import asyncio
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pynvml

from rotator.adapters.device_thread import DeviceThread
from rotator.adapters.host import parse_meminfo
from rotator.core.values import GpuId
from rotator.ports import DeviceError, DeviceTimeout, GpuInfo, GpuReading, HostMemory

T = TypeVar("T")
# Inode of the machine's first pid namespace: fixed in Linux (PROC_PID_INIT_INO).
FIRST_PID_NAMESPACE = "pid:[4026531836]"
UNLISTED_BYTES_MAX = 256 << 20  # a device with more than this in use has users, so an empty list of them is no answer

_log = logging.getLogger(__name__)


class NvmlDevices:
    """Devices for one event loop. NVML is opened on the first call, again in a forked child. Everything that is not a
    GPU's reading can be replaced: ``nvml`` (a module like pynvml), the host's memory, and what is known of pids."""

    def __init__(
        self,
        nvml: Any = pynvml,
        *,
        host_memory: Callable[[], HostMemory] = lambda: parse_meminfo(Path("/proc/meminfo").read_text()),
        pid_exists: Callable[[int], bool] = lambda pid: Path(f"/proc/{pid}").exists(),
        sees_all_pids: Callable[[], bool] = lambda: _own_pid_namespace() == FIRST_PID_NAMESPACE,
    ) -> None:
        self._nvml = nvml
        self._host_memory = host_memory
        self._pid_exists = pid_exists
        self._sees_all_pids = sees_all_pids
        self._process = os.getpid()
        self._threads: dict[str, DeviceThread] = {}
        self._handles: dict[GpuId, Any] = {}  # each written by its GPU's thread only
        self._infos: dict[int, GpuInfo] = {}

    # -- the port ----------------------------------------------------------------------------------------------------

    async def inventory(self, *, deadline_s: float) -> tuple[GpuInfo, ...]:
        """All GPUs, by index. One that fails or hangs is left out with a warning (a later call tries it again);
        raises DeviceError or DeviceTimeout where none answers."""
        loop = asyncio.get_running_loop()
        until_s = loop.time() + deadline_s
        count = await self._call("NVML", self._count, deadline_s)
        left_s = max(0.0, until_s - loop.time())
        found = await asyncio.gather(*(self._info(index, left_s) for index in range(count)), return_exceptions=True)
        errors = [answer for answer in found if isinstance(answer, BaseException)]
        if errors and (len(errors) == count or not all(isinstance(e, DeviceError) for e in errors)):
            raise errors[0]
        for error in errors:
            _log.warning("left out of the inventory: %s", error)
        return tuple(info for info in found if isinstance(info, GpuInfo))

    async def read(self, gpu: GpuId, *, deadline_s: float) -> GpuReading:
        return await self._call(gpu, lambda: self._read_or_forget(gpu), deadline_s)

    async def _info(self, index: int, deadline_s: float) -> GpuInfo:
        if index not in self._infos:
            name = f"GPU {index}"
            info = await self._call(name, lambda: self._describe(index), deadline_s)
            self._threads.setdefault(info.id, self._threads[name])
            self._infos[index] = info
        return self._infos[index]

    async def _call(self, name: str, work: Callable[[], T], deadline_s: float) -> T:
        if self._process != os.getpid():  # threads and handles do not survive a fork
            self._process = os.getpid()
            self._threads, self._handles, self._infos = {}, {}, {}
        thread = self._threads.setdefault(name, DeviceThread(name))
        return await thread.call(lambda: self._guarded(thread.name, work), deadline_s=deadline_s)

    # -- in the device's thread --------------------------------------------------------------------------------------

    def _guarded(self, name: str, work: Callable[[], T]) -> T:
        """Run NVML calls; whatever they raise becomes a DeviceError in words."""
        try:
            return work()
        except DeviceError:
            raise
        except Exception as e:
            raise _in_words(self._nvml, name, e) from None

    def _open(self) -> None:
        # Counted by NVML, so once for each handle looked up is fine, and a driver that was reloaded is opened again.
        self._nvml.nvmlInit()

    def _count(self) -> int:
        self._open()
        return int(self._nvml.nvmlDeviceGetCount())

    def _handle(self, gpu: GpuId) -> Any:
        if gpu not in self._handles:
            self._open()
            self._handles[gpu] = self._nvml.nvmlDeviceGetHandleByUUID(gpu)
        return self._handles[gpu]

    def _describe(self, index: int) -> GpuInfo:
        nvml = self._nvml
        self._open()
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        _, total_bytes, unified = self._memory(handle)
        pci = self._optional(lambda: nvml.nvmlDeviceGetPciInfo(handle))
        return GpuInfo(
            id=str(nvml.nvmlDeviceGetUUID(handle)),
            index=index,
            name=str(nvml.nvmlDeviceGetName(handle)),
            total_bytes=total_bytes,
            compute_capability=self._optional(lambda: nvml.nvmlDeviceGetCudaComputeCapability(handle)) or (0, 0),
            pci_bus_id=_text(pci.busId) if pci is not None else "",
            unified_memory=unified,
        )

    def _read_or_forget(self, gpu: GpuId) -> GpuReading:
        try:
            return self._reading(gpu)
        except Exception:
            self._handles.pop(gpu, None)  # a GPU that was lost and came back has another handle
            raise

    def _reading(self, gpu: GpuId) -> GpuReading:
        handle = self._handle(gpu)
        used_bytes, total_bytes, _ = self._memory(handle)
        rates = self._optional(lambda: self._nvml.nvmlDeviceGetUtilizationRates(handle))
        return GpuReading(
            id=gpu,
            used_bytes=used_bytes,
            total_bytes=total_bytes,
            by_pid=self._by_pid(handle, used_bytes),
            utilization=rates.gpu / 100 if rates is not None else None,
        )

    def _memory(self, handle: Any) -> tuple[int, int, bool]:
        """Used and total bytes, and whether they are the host's."""
        nvml = self._nvml
        try:
            memory = nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
            return int(memory.used), int(memory.total - memory.reserved), False
        except nvml.NVMLError_NotSupported:
            host = self._host_memory()
            return host.total_bytes - host.available_bytes, host.total_bytes, True
        except nvml.NVMLError_FunctionNotFound:
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
            return int(memory.used), int(memory.total), False

    def _by_pid(self, handle: Any, used_bytes: int) -> Mapping[int, int] | None:
        held = self._processes(handle)
        if held is None or self._sees_all_pids():
            return held
        if not held:
            return None if used_bytes > UNLISTED_BYTES_MAX else held
        # A process that just ended is gone from the second list; one of another namespace is still in it.
        if unknown := {pid for pid in held if not self._pid_exists(pid)}:
            held = self._processes(handle)
            if held is None or not unknown.isdisjoint(held):
                return None
        return held

    def _processes(self, handle: Any) -> dict[int, int] | None:
        """Bytes by pid. A process that computes and draws is in both lists with the same bytes."""
        nvml = self._nvml
        compute = self._optional(lambda: nvml.nvmlDeviceGetComputeRunningProcesses(handle))
        if compute is None:
            return None
        graphics = self._optional(lambda: nvml.nvmlDeviceGetGraphicsRunningProcesses(handle)) or []
        computing, drawing = _sums(compute), _sums(graphics)
        if computing is None or drawing is None:
            return None
        return {pid: max(computing.get(pid, 0), drawing.get(pid, 0)) for pid in {**computing, **drawing}}

    def _optional(self, query: Callable[[], T]) -> T | None:
        """None where this driver or device has no such query."""
        nvml = self._nvml
        try:
            return query()
        except (nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound, nvml.NVMLLibraryMismatchError):
            return None


def _sums(processes: Iterable[Any]) -> dict[int, int] | None:
    """Bytes by pid (a process may be listed once for each slice of a GPU). None where a size is not available."""
    sums: dict[int, int] = {}
    for process in processes:
        if process.usedGpuMemory is None:
            return None
        sums[int(process.pid)] = sums.get(int(process.pid), 0) + int(process.usedGpuMemory)
    return sums


def _in_words(nvml: Any, name: str, error: Exception) -> DeviceError:
    """What an operator can do, where something is known to help; NVML's own words everywhere."""
    hints = (
        (
            nvml.NVMLError_LibraryNotFound,
            "no NVIDIA driver library found (libnvidia-ml.so.1): install the NVIDIA driver, or give the container its "
            "GPUs; `rotator demo` needs none",
        ),
        (nvml.NVMLError_DriverNotLoaded, "the NVIDIA driver is not loaded: see `nvidia-smi`"),
        (
            nvml.NVMLError_LibRmVersionMismatch,
            "the NVIDIA driver was updated while it was loaded: reload it, or reboot",
        ),
        (nvml.NVMLError_GpuIsLost, "it fell off the bus: see Xid lines in dmesg; it needs a reset or a reboot"),
        (nvml.NVMLError_ResetRequired, "it needs a reset: `nvidia-smi --gpu-reset`, with nothing running on it"),
        (nvml.NVMLError_NotFound, "no GPU of that name: see `nvidia-smi -L`"),
        (nvml.NVMLError_Unknown, "see Xid lines in dmesg"),
    )
    hint = next((f": {text}" for kind, text in hints if isinstance(error, kind)), "")
    timed_out = isinstance(error, nvml.NVMLError_Timeout)
    return (DeviceTimeout if timed_out else DeviceError)(f"{name}: NVML says: {error or type(error).__name__}{hint}")


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _own_pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
