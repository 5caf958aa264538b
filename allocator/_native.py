"""The C ABI of `csrc/api.h`, declared once. Nothing here decides anything."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from ctypes import POINTER, c_char, c_char_p, c_double, c_int, c_int32, c_size_t, c_uint32, c_uint64, c_void_p
from functools import cache
from pathlib import Path

from allocator.errors import LibraryMissing


class Error(ctypes.Structure):
    code: int
    driver_code: int
    bytes_wanted: int
    bytes_free: int
    call: bytes
    message: bytes
    _fields_ = [
        ("code", c_int32),
        ("driver_code", c_int32),
        ("bytes_wanted", c_uint64),
        ("bytes_free", c_uint64),
        ("call", c_char * 48),
        ("message", c_char * 256),
    ]


class Config(ctypes.Structure):
    _fields_ = [
        ("slab_bytes", c_uint64),
        ("host_budget_bytes", c_uint64),
        ("chunk_bytes", c_uint64),
        ("prefault_threads", c_uint32),
        ("use_digest", c_uint32),
        ("link_share_permille", c_uint32),
        ("use_packing", c_uint32),
        ("spill_directory", c_char_p),
        ("budget_file", c_char_p),
    ]


class Report(ctypes.Structure):
    seconds: float
    fence_seconds: float
    digest_seconds: float
    host_seconds: float
    copy_seconds: float
    map_seconds: float
    release_seconds: float
    bytes_device: int
    bytes_copied: int
    bytes_spilled: int
    bytes_unchanged: int
    bytes_discarded: int
    bytes_kept: int
    bytes_held: int
    _fields_ = [
        ("seconds", c_double),
        ("fence_seconds", c_double),
        ("digest_seconds", c_double),
        ("host_seconds", c_double),
        ("copy_seconds", c_double),
        ("map_seconds", c_double),
        ("release_seconds", c_double),
        ("bytes_device", c_uint64),
        ("bytes_copied", c_uint64),
        ("bytes_spilled", c_uint64),
        ("bytes_unchanged", c_uint64),
        ("bytes_discarded", c_uint64),
        ("bytes_kept", c_uint64),
        ("bytes_held", c_uint64),
    ]


class Usage(ctypes.Structure):
    tag: int
    device: int
    asleep: int
    segments: int
    bytes_allocated: int
    bytes_mapped: int
    bytes_peak: int
    bytes_deferred: int
    bytes_masters: int
    bytes_spilled: int
    _fields_ = [
        ("tag", c_int32),
        ("device", c_int32),
        ("asleep", c_int32),
        ("segments", c_int32),
        ("bytes_allocated", c_uint64),
        ("bytes_mapped", c_uint64),
        ("bytes_peak", c_uint64),
        ("bytes_deferred", c_uint64),
        ("bytes_masters", c_uint64),
        ("bytes_spilled", c_uint64),
    ]


class HostUsage(ctypes.Structure):
    bytes_registered: int
    bytes_used: int
    bytes_budget: int
    bytes_shared_used: int
    bytes_limit: int
    bytes_spilled: int
    _fields_ = [
        ("bytes_registered", c_uint64),
        ("bytes_used", c_uint64),
        ("bytes_budget", c_uint64),
        ("bytes_shared_used", c_uint64),
        ("bytes_limit", c_uint64),
        ("bytes_spilled", c_uint64),
    ]


class PrepareState(ctypes.Structure):
    running: int
    code: int
    bytes_done: int
    bytes_total: int
    seconds: float
    message: bytes
    _fields_ = [
        ("running", c_int32),
        ("code", c_int32),
        ("bytes_done", c_uint64),
        ("bytes_total", c_uint64),
        ("seconds", c_double),
        ("message", c_char * 256),
    ]


_ERROR = POINTER(Error)
_SIGNATURES: dict[str, list[type]] = {
    "ra_open": [c_char_p, POINTER(Config), POINTER(c_void_p), _ERROR],
    "ra_close": [c_void_p, _ERROR],
    "ra_scale": [c_char_p, POINTER(c_uint64), POINTER(c_int), _ERROR],
    "ra_alloc": [c_void_p, c_size_t, c_int, c_int, POINTER(c_uint64), _ERROR],
    "ra_free": [c_void_p, c_uint64, c_void_p, _ERROR],
    "ra_write": [c_void_p, c_uint64, c_size_t, c_void_p, c_size_t, _ERROR],
    "ra_read": [c_void_p, c_uint64, c_size_t, c_void_p, c_size_t, _ERROR],
    "ra_sleep": [c_void_p, c_uint32, c_uint32, c_int, c_uint64, POINTER(Report), _ERROR],
    "ra_wake": [c_void_p, c_uint32, c_int, POINTER(Report), _ERROR],
    "ra_prepare": [c_void_p, c_uint32, POINTER(Report), _ERROR],
    "ra_prepare_start": [c_void_p, c_uint32, _ERROR],
    "ra_prepare_status": [c_void_p, POINTER(PrepareState)],
    "ra_pin": [c_void_p, c_uint64, _ERROR],
    "ra_unpin": [c_void_p, c_uint64, _ERROR],
    "ra_place_masters": [c_void_p, c_int, POINTER(c_uint64), _ERROR],
    "ra_set_host_budget": [c_void_p, c_uint64, _ERROR],
    "ra_release_masters": [c_void_p, c_uint32, POINTER(c_uint64), _ERROR],
    "ra_collect": [c_void_p, POINTER(c_uint64), _ERROR],
    "ra_capture": [c_void_p, c_int, _ERROR],
    "ra_asleep_tags": [c_void_p, POINTER(c_uint32)],
    "ra_memory_usage": [c_void_p, POINTER(Usage), c_size_t, POINTER(c_size_t)],
    "ra_host_memory": [c_void_p, POINTER(HostUsage)],
    "ra_device_memory": [c_void_p, c_int, POINTER(c_uint64), POINTER(c_uint64), _ERROR],
    "ra_torch_bind": [c_void_p],
    "ra_torch_tag": [c_int],
}


def _folders() -> Iterator[Path]:
    # Another build of the same libraries: one with a sanitizer, say.
    named = os.environ.get("ROTATOR_ALLOCATOR_LIBRARIES")
    if named:
        yield Path(named).absolute()
    # An editable install keeps the sources where they are and puts what was built beside them on the import path.
    package = sys.modules["allocator"]
    yield from (Path(folder) / "_lib" for folder in package.__path__)
    yield from (Path(folder) / "allocator" / "_lib" for folder in sys.path if folder)


def library_path(name: str) -> Path:
    """Where the built library `name` is. Raises LibraryMissing."""
    for folder in _folders():
        path = folder / name
        if path.is_file():
            return path
    raise LibraryMissing(f"{name} is not built: `pip install .` builds it")


@cache
def library() -> ctypes.CDLL:
    """The allocator's library with its signatures set. Raises LibraryMissing."""
    # RTLD_LOCAL and no PyDLL: calls run without the interpreter's lock, and none of them calls back.
    loaded = ctypes.CDLL(str(library_path("librotator_alloc.so")))
    for name, argtypes in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.argtypes = argtypes
        function.restype = c_int
    return loaded
