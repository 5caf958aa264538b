"""The CUDA driver itself, without the allocator: a few calls as ordinary programs make them, on one device.

The same calls run on a GPU and on the simulated driver. Bytes are the driver's bytes.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import byref, c_int, c_size_t, c_ubyte, c_uint, c_ulonglong, c_ushort, c_void_p
from dataclasses import dataclass

from allocator.errors import DriverError, DriverMissing, OutOfMemory

_OUT_OF_MEMORY, _NO_DEVICE = 2, 100
_ATTRIBUTES = {"integrated": 18, "capability_major": 75, "capability_minor": 76, "numa_node": 134}


class _Location(ctypes.Structure):
    _fields_ = [("kind", c_int), ("device", c_int)]


class _Prop(ctypes.Structure):
    _fields_ = [
        ("kind", c_int),
        ("handle_types", c_int),
        ("location", _Location),
        ("win32", c_void_p),
        ("compression", c_ubyte),
        ("rdma", c_ubyte),
        ("usage", c_ushort),
        ("reserved", c_ubyte * 4),
    ]


class _Access(ctypes.Structure):
    _fields_ = [("location", _Location), ("flags", c_int)]


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """What a driver says of a device. Attributes that it cannot answer are None."""

    name: str
    driver_version: str
    bus_id: str | None
    attributes: dict[str, int | None]


class BareDriver:
    """Calls on one device while `open`. All of them raise DriverError, or OutOfMemory."""

    def __init__(self, device: int = 0) -> None:
        """Load the driver that ROTATOR_CUDA_DRIVER names, or libcuda.so.1. Raises DriverMissing."""
        try:
            self._library = ctypes.CDLL(os.environ.get("ROTATOR_CUDA_DRIVER") or "libcuda.so.1")
        except OSError as error:
            raise DriverMissing(f"cannot load the CUDA driver: {error}") from error
        self.device = device

    @contextmanager
    def open(self) -> Iterator[BareDriver]:
        """The device's primary context, current in the calling thread. Raises DriverMissing without a device."""
        context = c_void_p()
        if self._library.cuInit(c_uint(0)) == _NO_DEVICE:
            raise DriverMissing("the CUDA driver finds no device")
        self.call("cuInit", c_uint(0))
        self.call("cuDevicePrimaryCtxRetain", byref(context), c_int(self.device))
        self.call("cuCtxPushCurrent_v2", context)
        try:
            yield self
        finally:
            self._library.cuCtxPopCurrent_v2(byref(context))
            self._library.cuDevicePrimaryCtxRelease_v2(c_int(self.device))

    def facts(self) -> DeviceFacts:
        version, name, bus = c_int(), ctypes.create_string_buffer(128), ctypes.create_string_buffer(32)
        self.call("cuDriverGetVersion", byref(version))
        self.call("cuDeviceGetName", name, c_int(len(name)), c_int(self.device))
        has_bus = self._library.cuDeviceGetPCIBusId(bus, c_int(len(bus)), c_int(self.device)) == 0
        return DeviceFacts(
            name=name.value.decode(errors="replace"),
            driver_version=f"{version.value // 1000}.{version.value % 1000 // 10}",
            bus_id=bus.value.decode() if has_bus else None,
            attributes={what: self._attribute(number) for what, number in _ATTRIBUTES.items()},
        )

    def granularity(self) -> int:
        nbytes, prop = c_size_t(), self._prop()
        self.call("cuMemGetAllocationGranularity", byref(nbytes), byref(prop), c_int(0))
        return nbytes.value

    @contextmanager
    def plain(self, nbytes: int) -> Iterator[int]:
        """The address of device memory as cuMemAlloc gives it."""
        address = c_ulonglong()
        self.call("cuMemAlloc_v2", byref(address), c_size_t(nbytes))
        try:
            yield address.value
        finally:
            self.call("cuMemFree_v2", address)

    @contextmanager
    def stream(self) -> Iterator[c_void_p]:
        stream = c_void_p()
        self.call("cuStreamCreate", byref(stream), c_uint(1))
        try:
            yield stream
        finally:
            self.call("cuStreamDestroy_v2", stream)

    @contextmanager
    def reserved(self, nbytes: int) -> Iterator[int]:
        """Addresses with nothing behind them."""
        address, nothing = c_ulonglong(), c_ulonglong(0)
        self.call("cuMemAddressReserve", byref(address), c_size_t(nbytes), c_size_t(0), nothing, nothing)
        try:
            yield address.value
        finally:
            self.call("cuMemAddressFree", address, c_size_t(nbytes))

    def back(self, address: int, nbytes: int) -> int:
        """Put a handle's memory behind reserved addresses; returns the handle. On an error nothing stays."""
        handle, prop = c_ulonglong(), self._prop()
        access, at, size = _Access(prop.location, 3), c_ulonglong(address), c_size_t(nbytes)
        self.call("cuMemCreate", byref(handle), size, byref(prop), c_ulonglong(0))
        try:
            self.call("cuMemMap", at, size, c_size_t(0), handle, c_ulonglong(0))
            self.call("cuMemSetAccess", at, size, byref(access), c_size_t(1))
        except DriverError:
            self._library.cuMemUnmap(at, size)
            self._library.cuMemRelease(handle)
            raise
        return handle.value

    def drop(self, address: int, handle: int, nbytes: int) -> None:
        self.call("cuMemUnmap", c_ulonglong(address), c_size_t(nbytes))
        self.call("cuMemRelease", c_ulonglong(handle))

    def pin(self, nbytes: int) -> c_void_p:
        data = c_void_p()
        self.call("cuMemHostAlloc", byref(data), c_size_t(nbytes), c_uint(1))
        return data

    def unpin(self, data: c_void_p) -> None:
        self.call("cuMemFreeHost", data)

    def call(self, name: str, *arguments: object) -> None:
        result = int(getattr(self._library, name)(*arguments))
        if result == _OUT_OF_MEMORY:
            raise OutOfMemory(f"{name} finds no memory", call=name, driver_code=result)
        if result != 0:
            raise DriverError(f"{name} answered {result}", call=name, driver_code=result)

    def _attribute(self, number: int) -> int | None:
        value = c_int()
        answered = self._library.cuDeviceGetAttribute(byref(value), c_int(number), c_int(self.device)) == 0
        return value.value if answered else None

    def _prop(self) -> _Prop:
        return _Prop(kind=1, location=_Location(1, self.device))
