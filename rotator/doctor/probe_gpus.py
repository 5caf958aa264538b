"""GPUs as NVML tells of them, or as a machine's fixture does (``nvml.json`` below a root)."""

import asyncio
import ctypes
import json
from collections.abc import Callable
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, TypeVar

import pynvml

from rotator.adapters.device_thread import DeviceThread
from rotator.doctor.facts import GpuFacts, GpuState
from rotator.ports import DeviceError, Devices, GpuInfo

T = TypeVar("T")
NVML_S = 8.0
_FABRIC = {0: None, 1: "not started", 2: "in progress", 3: "completed"}
_PEER = {0: "", 1: "chipset not supported", 2: "GPU not supported", 3: "topology", 4: "disabled", 5: "not supported"}


async def read_gpus(devices: Devices, nvml: Any = pynvml) -> GpuFacts:
    """Never raises: what failed is in the facts. A query that hangs holds up nobody but itself."""
    try:
        infos = await devices.inventory(deadline_s=NVML_S)
    except DeviceError as e:
        return GpuFacts(error=str(e))
    states = await asyncio.gather(*(_state(devices, info) for info in infos))
    thread = DeviceThread("NVML")
    try:
        cuda, fabric, no_peer = await thread.call(lambda: _more(nvml, len(infos)), deadline_s=NVML_S)
    except DeviceError:
        return GpuFacts(tuple(states))
    with_fabric = (GpuState(s.info, s.used_bytes, s.by_pid, fabric.get(s.info.index), s.trouble) for s in states)
    return GpuFacts(tuple(with_fabric), None, cuda, no_peer)


async def _state(devices: Devices, info: GpuInfo) -> GpuState:
    try:
        reading = await devices.read(info.id, deadline_s=NVML_S)
    except DeviceError as e:
        return GpuState(info, trouble=str(e))
    return GpuState(info, reading.used_bytes, reading.by_pid)


def _more(
    nvml: Any, count: int
) -> tuple[tuple[int, int] | None, dict[int, str | None], tuple[tuple[int, int, str], ...]]:
    """The driver's CUDA, each GPU's fabric, pairs without peer access. In NVML's thread."""
    nvml.nvmlInit()
    handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(count)]
    number = _try(nvml, nvml.nvmlSystemGetCudaDriverVersion)
    cuda = (number // 1000, number % 1000 // 10) if number else None
    fabric = {i: _try(nvml, partial(_fabric, nvml, handle)) for i, handle in enumerate(handles)}
    no_peer = []
    for a, b in combinations(range(count), 2):
        status = _try(nvml, partial(_peer, nvml, handles[a], handles[b]))
        if status:
            no_peer.append((a, b, _PEER.get(status, f"status {status}")))
    return cuda, fabric, tuple(no_peer)


def _peer(nvml: Any, one: Any, other: Any) -> int:
    return int(nvml.nvmlDeviceGetP2PStatus(one, other, nvml.NVML_P2P_CAPS_INDEX_READ))


def _fabric(nvml: Any, handle: Any) -> str | None:
    info = nvml.c_nvmlGpuFabricInfo_t()
    nvml.nvmlDeviceGetGpuFabricInfo(handle, ctypes.byref(info))
    return _FABRIC.get(int(info.state))


def _try(nvml: Any, query: Callable[[], T]) -> T | None:
    """None where this driver, device or version of pynvml has no such query."""
    try:
        return query()
    except (nvml.NVMLError, AttributeError, OSError):
        return None


def recorded_gpus(root: Path) -> GpuFacts:
    """The GPUs of a machine that was written down: see docs/doctor.md for the file. Raises ValueError."""
    try:
        data = json.loads((root / "nvml.json").read_text())
    except FileNotFoundError:
        return GpuFacts(error="there is no nvml.json below --root: nobody wrote down what NVML said")
    try:
        states = tuple(_recorded(i, gpu) for i, gpu in enumerate(data.get("gpus", ())))
        cuda = data.get("cuda_driver")
        pairs = tuple((int(a), int(b), str(why)) for a, b, why in data.get("no_peer", ()))
        return GpuFacts(states, data.get("error"), (int(cuda[0]), int(cuda[1])) if cuda else None, pairs)
    except (AttributeError, KeyError, TypeError, IndexError) as e:
        raise ValueError(f"nvml.json: {e!r}: see docs/doctor.md for its shape") from None


def _recorded(index: int, gpu: Any) -> GpuState:
    info = GpuInfo(
        id=str(gpu.get("id", f"GPU-{index}")),
        index=index,
        name=str(gpu["name"]),
        total_bytes=int(gpu["total_bytes"]),
        compute_capability=(int(gpu["compute_capability"][0]), int(gpu["compute_capability"][1])),
        pci_bus_id=str(gpu.get("pci_bus_id", "")),
        unified_memory=bool(gpu.get("unified_memory", False)),
    )
    by_pid = gpu.get("by_pid")
    held = None if by_pid is None else {int(pid): int(size) for pid, size in by_pid.items()}
    return GpuState(info, gpu.get("used_bytes"), held, gpu.get("fabric"), str(gpu.get("trouble", "")))
