"""What vLLM's stock allocator does, in our own words, to measure beside ours on bare torch.

Each allocation is a reservation, a handle and a mapping of its own. A sleep takes them one by one: a new pinned tensor,
a synchronous copy, unmap, release. A wake takes them one by one: create, map, access, a synchronous copy, and the
pinned tensor is dropped. Needs torch and libcuda.
"""

import ctypes
from ctypes import byref, c_int, c_size_t, c_ubyte, c_ulonglong, c_ushort, c_void_p
from dataclasses import dataclass
from typing import Any

_PINNED, _DEVICE, _READ_WRITE = 1, 1, 3


class _Location(ctypes.Structure):
    _fields_ = [("type", c_int), ("id", c_int)]


class _Flags(ctypes.Structure):
    _fields_ = [
        ("compression", c_ubyte),
        ("rdma_capable", c_ubyte),
        ("usage", c_ushort),
        ("reserved", c_ubyte * 4),
    ]


class _Properties(ctypes.Structure):
    _fields_ = [
        ("type", c_int),
        ("handle_types", c_int),
        ("location", _Location),
        ("win32", c_void_p),
        ("flags", _Flags),
    ]


class _Access(ctypes.Structure):
    _fields_ = [("location", _Location), ("flags", c_int)]


@dataclass
class Allocation:
    address: int
    nbytes: int
    handle: int
    backup: Any = None


class StockLike:
    """Allocations of one device. The device's context must be current, which torch sees to."""

    def __init__(self, torch: Any, device: int = 0) -> None:
        self.torch, self.device = torch, device
        self.driver = ctypes.CDLL("libcuda.so.1")
        self.allocations: list[Allocation] = []
        where = _Location(_DEVICE, device)
        self.properties = _Properties(_PINNED, 0, where, None, _Flags(0, 1, 0))
        self.access = _Access(where, _READ_WRITE)
        self.granularity = c_size_t()
        self._call("cuMemGetAllocationGranularity", byref(self.granularity), byref(self.properties), 0)

    def alloc(self, nbytes: int) -> Allocation:
        step = self.granularity.value
        size = -(-nbytes // step) * step
        address = c_ulonglong()
        self._call("cuMemAddressReserve", byref(address), c_size_t(size), c_size_t(0), c_ulonglong(0), c_ulonglong(0))
        made = Allocation(address.value, size, 0)
        self._map(made)
        self.allocations.append(made)
        return made

    def sleep(self) -> None:
        for one in self.allocations:
            one.backup = self.torch.empty(one.nbytes, dtype=self.torch.uint8, pin_memory=True)
            self._call(
                "cuMemcpyDtoH_v2", c_void_p(one.backup.data_ptr()), c_ulonglong(one.address), c_size_t(one.nbytes)
            )
            self._unmap(one)

    def wake(self) -> None:
        for one in self.allocations:
            self._map(one)
            self._call(
                "cuMemcpyHtoD_v2", c_ulonglong(one.address), c_void_p(one.backup.data_ptr()), c_size_t(one.nbytes)
            )
            one.backup = None

    def close(self) -> None:
        for one in self.allocations:
            self._unmap(one)
            self._call("cuMemAddressFree", c_ulonglong(one.address), c_size_t(one.nbytes))
        self.allocations.clear()

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Device to device, in order with torch's work: the default stream."""
        self._call("cuMemcpyDtoD_v2", c_ulonglong(target), c_ulonglong(source), c_size_t(nbytes))

    def _map(self, one: Allocation) -> None:
        handle = c_ulonglong()
        self._call("cuMemCreate", byref(handle), c_size_t(one.nbytes), byref(self.properties), c_ulonglong(0))
        one.handle = handle.value
        at, size = c_ulonglong(one.address), c_size_t(one.nbytes)
        self._call("cuMemMap", at, size, c_size_t(0), handle, c_ulonglong(0))
        self._call("cuMemSetAccess", at, size, byref(self.access), c_size_t(1))

    def _unmap(self, one: Allocation) -> None:
        self._call("cuMemUnmap", c_ulonglong(one.address), c_size_t(one.nbytes))
        self._call("cuMemRelease", c_ulonglong(one.handle))

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self.driver, name)(*arguments)
        if code != 0:
            raise RuntimeError(f"{name} answered {code}")
