"""What the simulated driver can do and a GPU cannot: fail on command, count its calls, hold a kernel back.

For tests and for the self-test. Works in the process that runs the allocator, on the box its environment names.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_char_p, c_int, c_size_t, c_uint64, c_ulonglong, c_void_p

from allocator.box import driver_path

_SIGNATURES: dict[str, tuple[list[type], type | None]] = {
    "rotatorSimFaults": ([c_char_p], c_int),
    "rotatorSimCalls": ([c_char_p], c_uint64),
    "rotatorSimInjected": ([], c_uint64),
    "rotatorSimLog": ([c_char_p, c_size_t], c_size_t),
    "rotatorSimClearLog": ([], None),
    "rotatorSimHold": ([c_int], None),
    "rotatorSimBytes": ([c_int, c_int], c_uint64),
    "rotatorSimRegisteredBytes": ([], c_uint64),
    "rotatorSimRdmaBytes": ([], c_uint64),
    "rotatorSimLaunch": ([c_void_p, c_ulonglong, c_size_t, c_int, c_int], c_int),
    "rotatorSimWriter": ([c_void_p, c_ulonglong, c_size_t, c_int, ctypes.c_uint], c_int),
    "cuInit": ([ctypes.c_uint], c_int),
    "cuDevicePrimaryCtxRetain": ([ctypes.POINTER(c_void_p), c_int], c_int),
    "cuDevicePrimaryCtxRelease_v2": ([c_int], c_int),
    "cuCtxPushCurrent_v2": ([c_void_p], c_int),
    "cuCtxPopCurrent_v2": ([ctypes.POINTER(c_void_p)], c_int),
    "cuCtxSynchronize": ([], c_int),
    "cuStreamCreate": ([ctypes.POINTER(c_void_p), ctypes.c_uint], c_int),
    "cuStreamDestroy_v2": ([c_void_p], c_int),
    "cuStreamQuery": ([c_void_p], c_int),
    "cuStreamSynchronize": ([c_void_p], c_int),
    "cuStreamBeginCapture_v2": ([c_void_p, c_int], c_int),
    "cuStreamEndCapture": ([c_void_p, ctypes.POINTER(c_void_p)], c_int),
}


class SimulatedDriver:
    """Bytes here are the driver's real bytes, not shown ones."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(str(driver_path()))
        for name, (argtypes, restype) in _SIGNATURES.items():
            function = getattr(self.library, name)
            function.argtypes, function.restype = argtypes, restype

    def set_faults(self, rules: str = "") -> None:
        """Replace all rules; their grammar is in sim/faults.h. Raises ValueError."""
        if self.library.rotatorSimFaults(rules.encode()) != 0:
            raise ValueError(f"not a fault rule: {rules!r}")

    @contextmanager
    def faults(self, rules: str) -> Iterator[None]:
        self.set_faults(rules)
        try:
            yield
        finally:
            self.set_faults()

    def calls(self, name: str = "*") -> int:
        return int(self.library.rotatorSimCalls(name.encode()))

    @property
    def faults_injected(self) -> int:
        return int(self.library.rotatorSimInjected())

    def log(self) -> list[str]:
        """Names of the calls since `clear_log`, with `!` behind those that a rule answered. Bounded at 65,536."""
        buffer = ctypes.create_string_buffer(self.library.rotatorSimLog(None, 0))
        self.library.rotatorSimLog(buffer, len(buffer))
        return buffer.value.decode().split()

    def clear_log(self) -> None:
        self.library.rotatorSimClearLog()

    def bytes_used(self, device: int = 0, *, own: bool = False) -> int:
        return int(self.library.rotatorSimBytes(device, own))

    def bytes_registered(self) -> int:
        return int(self.library.rotatorSimRegisteredBytes())

    def bytes_for_rdma(self) -> int:
        """Of this process's device memory, what a network card could register."""
        return int(self.library.rotatorSimRdmaBytes())

    def hold(self, hold: bool) -> None:
        """While held, kernels launched with `held` do not start."""
        self.library.rotatorSimHold(hold)

    def launch(self, stream: int | None, address: int, nbytes: int, value: int, *, held: bool = False) -> int:
        """A kernel that fills a range with `value` when it ends. Returns the driver's answer."""
        return int(self.library.rotatorSimLaunch(stream, address, nbytes, value, held))

    def write_for(self, stream: int | None, address: int, nbytes: int, last: int, duration_ms: int) -> int:
        """A kernel that writes `last` or something else whenever anybody looks, and `last` at its end."""
        return int(self.library.rotatorSimWriter(stream, address, nbytes, last, duration_ms))

    @contextmanager
    def context(self, device: int = 0) -> Iterator[None]:
        """Make the device's primary context current, as torch does before it calls anything."""
        context = c_void_p()
        self._check(self.library.cuInit(0))
        self._check(self.library.cuDevicePrimaryCtxRetain(ctypes.byref(context), device))
        self._check(self.library.cuCtxPushCurrent_v2(context))
        try:
            yield
        finally:
            self.library.cuCtxPopCurrent_v2(ctypes.byref(context))
            self.library.cuDevicePrimaryCtxRelease_v2(device)

    @contextmanager
    def stream(self) -> Iterator[int]:
        """A stream of the current context."""
        stream = c_void_p()
        self._check(self.library.cuStreamCreate(ctypes.byref(stream), 1))
        try:
            yield stream.value or 0
        finally:
            self.hold(False)  # destroying waits for the stream, also for kernels held in it
            self.library.cuStreamDestroy_v2(stream)

    def synchronize(self) -> int:
        """Wait for the current context. Returns the driver's answer: 700 after an illegal address."""
        return int(self.library.cuCtxSynchronize())

    def begin_capture(self, stream: int) -> None:
        self._check(self.library.cuStreamBeginCapture_v2(stream, 0))

    def end_capture(self, stream: int) -> int:
        """Returns the driver's answer: 901 when something in between spoiled the capture."""
        graph = c_void_p()
        return int(self.library.cuStreamEndCapture(stream, ctypes.byref(graph)))

    @staticmethod
    def _check(result: int) -> None:
        if result != 0:
            raise RuntimeError(f"the simulated driver answered {result}")
