"""Driver calls as they are, for tests that speak to the simulated driver without the allocator."""

import ctypes
import struct
from ctypes import byref, c_int, c_size_t, c_uint, c_uint64, c_ulonglong, c_void_p

from allocator.simdriver import SimulatedDriver

PAGE = 4096
PTX = b".version 8.0\n.target sm_80\n.visible .entry rotator_digest(\n)\n{ ret; }\n"
MASK = (1 << 64) - 1


class Prop(ctypes.Structure):
    _fields_ = [("kind", c_int), ("handles", c_int), ("place", c_int), ("device", c_int), ("rest", ctypes.c_ubyte * 16)]


class Access(ctypes.Structure):
    _fields_ = [("place", c_int), ("device", c_int), ("flags", c_int)]


class Calls:
    """Driver calls as they are, on one device."""

    def __init__(self, driver: SimulatedDriver) -> None:
        self.driver, self.library = driver, driver.library
        self.held: dict[int, int] = {}

    def __call__(self, name: str, *arguments: object) -> int:
        return int(getattr(self.library, name)(*arguments))

    def ok(self, name: str, *arguments: object) -> None:
        assert self(name, *arguments) == 0

    def memory(self, nbytes: int, device: int = 0) -> int:
        address, handle = c_ulonglong(), c_ulonglong()
        prop, access = Prop(1, 0, 1, device), Access(1, device, 3)
        self.ok("cuMemAddressReserve", byref(address), c_size_t(nbytes), c_size_t(0), c_ulonglong(0), c_ulonglong(0))
        self.ok("cuMemCreate", byref(handle), c_size_t(nbytes), byref(prop), c_ulonglong(0))
        self.ok("cuMemMap", address, c_size_t(nbytes), c_size_t(0), handle, c_ulonglong(0))
        self.ok("cuMemSetAccess", address, c_size_t(nbytes), byref(access), c_size_t(1))
        self.ok("cuMemRelease", handle)  # the mapping keeps it, and it goes with the mapping
        self.held[address.value] = nbytes
        return address.value

    def close(self) -> None:
        for address, nbytes in list(self.held.items()):
            self.unmap(address, nbytes)

    def unmap(self, address: int, nbytes: int) -> int:
        self.held.pop(address, None)
        return self("cuMemUnmap", c_ulonglong(address), c_size_t(nbytes))

    def stream(self, priority: int = 0) -> c_void_p:
        stream = c_void_p()
        self.ok("cuStreamCreateWithPriority", byref(stream), c_uint(1), c_int(priority))
        return stream

    def event(self) -> c_void_p:
        event = c_void_p()
        self.ok("cuEventCreate", byref(event), c_uint(2))
        return event

    def digest_kernel(self) -> tuple[c_void_p, c_void_p]:
        module, function = c_void_p(), c_void_p()
        self.ok("cuModuleLoadData", byref(module), PTX)
        self.ok("cuModuleGetFunction", byref(function), module, b"rotator_digest")
        return module, function

    def launch(self, function: c_void_p, stream: c_void_p | None, *values: int) -> int:
        held = [c_uint64(value) for value in values]
        parameters = (c_void_p * len(held))(*(ctypes.addressof(value) for value in held))
        return self("cuLaunchKernel", function, *(c_uint(n) for n in (1, 1, 1, 32, 1, 1, 0)), stream, parameters, None)


def fold(a: int, b: int) -> int:
    product = (a & MASK) * (b & MASK)
    return (product & MASK) ^ (product >> 64)


def digest(data: bytes) -> tuple[int, int]:
    """The digest once more, from its description: a mistake would have to be made in two languages."""
    starts = [0x9E3779B97F4A7C15, 0xD1B54A32D192ED03, 0xAEF17502108EF2D9, 0x8BB84B93962EACC9]
    steps = [0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0xDA942042E4DD58B5, 0xE7037ED1A0B428DB]
    padded, first, second = data + bytes(-len(data) % 16), 0, 0
    for i, (low, high) in enumerate(struct.iter_unpack("<QQ", padded)):
        key = [start + i * step for start, step in zip(starts, steps, strict=True)]
        first += fold(low ^ (key[0] & MASK), high ^ (key[1] & MASK))
        second += fold(low ^ (key[2] & MASK), high ^ (key[3] & MASK))
    return first & MASK, second & MASK
