"""What GPUs report of themselves, through NVML: Xid events, uncorrectable ECC errors, remapped rows, being lost.

Xids come through one event set a GPU, emptied at each call: the driver keeps what came between. Each GPU has a thread
of its own here, apart from that of its readings: a report that hangs holds up no reading.
"""

import contextlib
import os
from collections.abc import Callable
from typing import Any, TypeVar

import pynvml

from rotator.adapters.device_thread import DeviceThread
from rotator.core.gpu_faults import GpuHealth
from rotator.core.values import GpuId
from rotator.ports import DeviceError, DeviceTimeout

T = TypeVar("T")
XIDS_MAX = 64  # taken in one call; the rest come with the next
_WAIT_MS = 1  # NVML's own least: 0 may mean for ever on old drivers


class NvmlReports:
    """GpuReports for one event loop. ``nvml`` is a module like pynvml."""

    def __init__(self, nvml: Any = pynvml) -> None:
        self._nvml = nvml
        self._process = os.getpid()
        self._threads: dict[GpuId, DeviceThread] = {}
        self._handles: dict[GpuId, Any] = {}  # these two: each entry by its GPU's thread only
        self._events: dict[GpuId, Any] = {}

    async def health(self, gpu: GpuId, *, deadline_s: float) -> GpuHealth:
        if self._process != os.getpid():  # threads and handles do not survive a fork
            self._process = os.getpid()
            self._threads, self._handles, self._events = {}, {}, {}
        thread = self._threads.setdefault(gpu, DeviceThread(f"{gpu} reports"))
        return await thread.call(lambda: self._ask(gpu), deadline_s=deadline_s)

    # -- in the GPU's thread -----------------------------------------------------------------------------------------

    def _ask(self, gpu: GpuId) -> GpuHealth:
        nvml = self._nvml
        try:
            return self._report(gpu)
        except Exception as e:
            self._handles.pop(gpu, None)  # one that was lost and came back has another handle, and no events of ours
            self._free(self._events.pop(gpu, None))
            if isinstance(e, nvml.NVMLError_GpuIsLost):
                return GpuHealth(gpu, lost=f"NVML says: {e}")
            if isinstance(e, nvml.NVMLError_ResetRequired):
                return GpuHealth(gpu, reset_required=f"NVML says: {e}")
            kind = DeviceTimeout if isinstance(e, nvml.NVMLError_Timeout) else DeviceError
            raise kind(f"{gpu}: NVML says: {e or type(e).__name__}") from None

    def _report(self, gpu: GpuId) -> GpuHealth:
        handle, nvml = self._handle(gpu), self._nvml
        # A cheap query that every GPU answers: it tells a lost one, which optional ones may hide.
        nvml.nvmlDeviceGetMemoryInfo(handle)
        rows = self._optional(lambda: nvml.nvmlDeviceGetRemappedRows(handle))
        ecc = self._optional(
            lambda: int(
                nvml.nvmlDeviceGetTotalEccErrors(
                    handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
                )
            )
        )
        pending = self._optional(lambda: bool(nvml.nvmlDeviceGetRetiredPagesPendingStatus(handle)))
        return GpuHealth(
            gpu,
            xids=self._xids(gpu),
            ecc_uncorrected=ecc,
            remap_failed=bool(rows and rows[3]),
            remap_pending=bool(rows and rows[2]) or bool(pending),
        )

    def _handle(self, gpu: GpuId) -> Any:
        if gpu not in self._handles:
            nvml = self._nvml
            nvml.nvmlInit()
            handle = nvml.nvmlDeviceGetHandleByUUID(gpu)
            self._events[gpu] = self._optional(lambda: self._register(handle))
            self._handles[gpu] = handle
        return self._handles[gpu]

    def _register(self, handle: Any) -> Any:
        nvml = self._nvml
        events = nvml.nvmlEventSetCreate()
        try:
            nvml.nvmlDeviceRegisterEvents(handle, nvml.nvmlEventTypeXidCriticalError, events)
        except Exception:
            self._free(events)
            raise
        return events

    def _free(self, events: Any) -> None:
        """A GPU that stays lost would leave one behind at each look."""
        if events is not None:
            with contextlib.suppress(self._nvml.NVMLError):
                self._nvml.nvmlEventSetFree(events)

    def _xids(self, gpu: GpuId) -> tuple[int, ...]:
        events, nvml = self._events[gpu], self._nvml
        if events is None:
            return ()
        found: list[int] = []
        while len(found) < XIDS_MAX:
            try:
                event = nvml.nvmlEventSetWait_v2(events, _WAIT_MS)
            except nvml.NVMLError_Timeout:
                break
            if event.eventType == nvml.nvmlEventTypeXidCriticalError:
                found.append(int(event.eventData))
        return tuple(found)

    def _optional(self, query: Callable[[], T]) -> T | None:
        """None where this driver or device has no such query, or may not be asked (containers)."""
        nvml = self._nvml
        try:
            return query()
        except (
            nvml.NVMLError_NotSupported,
            nvml.NVMLError_FunctionNotFound,
            nvml.NVMLError_NoPermission,
            nvml.NVMLLibraryMismatchError,
        ):
            return None
