"""A hand-written NVML: a module-like object that answers from plain fields, with pynvml's own errors."""

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pynvml

GIB = 1 << 30


class FakeGpu:
    def __init__(self, uuid: str, total: int = 96 * GIB, reserved: int = GIB) -> None:
        self.uuid = uuid
        self.total = total
        self.reserved = reserved
        self.used = 0
        self.compute: list[tuple[int, int | None]] = []
        self.graphics: list[tuple[int, int | None]] = []
        self.on_list: Callable[[], None] = lambda: None
        self.fails: int | None = None
        self.memory_fails: int | None = None
        self.gate: threading.Event | None = None
        self.calls = 0

    def enter(self) -> None:
        self.calls += 1
        if self.gate is not None:
            self.gate.wait()
        if self.fails is not None:
            raise pynvml.NVMLError(self.fails)


class FakeNvml:
    def __init__(self, *gpus: FakeGpu) -> None:
        self.gpus = list(gpus)
        self.init_fails: int | None = None
        self.knows_v2 = True

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("NVMLError", "NVMLLibrary", "nvmlMemory_v2")):
            return getattr(pynvml, name)
        raise AttributeError(name)

    def nvmlInit(self) -> None:  # noqa: N802 - NVML's names, here and below
        if self.init_fails is not None:
            raise pynvml.NVMLError(self.init_fails)

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> FakeGpu:  # noqa: N802
        self.gpus[index].enter()
        return self.gpus[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> FakeGpu:  # noqa: N802
        for gpu in self.gpus:
            if gpu.uuid == uuid:
                return gpu
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)

    def nvmlDeviceGetUUID(self, gpu: FakeGpu) -> str:  # noqa: N802
        return gpu.uuid

    def nvmlDeviceGetName(self, gpu: FakeGpu) -> str:  # noqa: N802
        return "Fake GPU"

    def nvmlDeviceGetCudaComputeCapability(self, gpu: FakeGpu) -> tuple[int, int]:  # noqa: N802
        return 12, 0

    def nvmlDeviceGetPciInfo(self, gpu: FakeGpu) -> Any:  # noqa: N802
        return SimpleNamespace(busId=b"00000000:01:00.0")

    def nvmlDeviceGetUtilizationRates(self, gpu: FakeGpu) -> Any:  # noqa: N802
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    def nvmlDeviceGetMemoryInfo(self, gpu: FakeGpu, version: int | None = None) -> Any:  # noqa: N802
        gpu.enter()
        if gpu.memory_fails is not None:
            raise pynvml.NVMLError(gpu.memory_fails)
        if version is None:
            return SimpleNamespace(total=gpu.total, used=gpu.used + gpu.reserved)
        if not self.knows_v2:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)
        return SimpleNamespace(total=gpu.total, reserved=gpu.reserved, used=gpu.used)

    def nvmlDeviceGetComputeRunningProcesses(self, gpu: FakeGpu) -> list[Any]:  # noqa: N802
        listed = [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in gpu.compute]
        gpu.on_list()
        return listed

    def nvmlDeviceGetGraphicsRunningProcesses(self, gpu: FakeGpu) -> list[Any]:  # noqa: N802
        return [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in gpu.graphics]
