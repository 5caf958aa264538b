"""What this machine allows, as the self-test shows it: limits that make pinning slow or impossible, and the link."""

from __future__ import annotations

import ctypes
from ctypes import c_char, c_int32, c_uint64
from dataclasses import dataclass
from pathlib import Path

from allocator import _native

_UNLIMITED = (1 << 64) - 1
_HUGE_PAGES = {0: "never", 1: "madvise", 2: "always"}


class _HostLimits(ctypes.Structure):
    """`ra_host_limits_t` of csrc/api.h."""

    memlock_soft: int
    cgroup_limit: int
    cgroup_current: int
    mem_available: int
    bytes_room: int
    cap_ipc_lock: int
    huge_pages: int
    numa_nodes: int
    cgroup_path: bytes
    _fields_ = [
        ("memlock_soft", c_uint64),
        ("memlock_hard", c_uint64),
        ("cgroup_limit", c_uint64),
        ("cgroup_current", c_uint64),
        ("cgroup_reclaimable", c_uint64),
        ("mem_total", c_uint64),
        ("mem_available", c_uint64),
        ("bytes_room", c_uint64),
        ("huge_page_bytes", c_uint64),
        ("cap_ipc_lock", c_int32),
        ("cgroup_version", c_int32),
        ("huge_pages", c_int32),
        ("numa_nodes", c_int32),
        ("cgroup_path", c_char * 256),
    ]


@dataclass(frozen=True, slots=True)
class Limits:
    """None: no limit, or none that can be read. `link` is the PCIe link as the kernel sees it at the moment; an idle
    one may show a lower speed than it has under load."""

    memlock_bytes: int | None
    memlock_counts: bool
    cgroup_path: str | None
    cgroup_bytes_max: int | None
    host_bytes_room: int | None
    huge_pages: str | None
    numa_nodes: int
    numa_node: int | None
    link: str | None


def _link(root: Path, bus_id: str | None) -> str | None:
    device = root / "sys/bus/pci/devices" / (bus_id or "none").lower()
    try:
        speed, width = ((device / f"current_link_{what}").read_text().strip() for what in ("speed", "width"))
    except OSError:
        return None
    return f"{speed} x{width}"


def limits(bus_id: str | None, numa_node: int | None, root: Path = Path("/")) -> Limits:
    """`bus_id` and `numa_node` are the device's, as the driver names them. `root` stands before /sys, for tests."""
    read = _HostLimits()
    _native.library().ra_host_limits(ctypes.byref(read))

    def bounded(nbytes: int) -> int | None:
        return None if nbytes == _UNLIMITED else nbytes

    return Limits(
        memlock_bytes=bounded(read.memlock_soft),
        memlock_counts=not read.cap_ipc_lock,
        cgroup_path=read.cgroup_path.decode(errors="replace") or None,
        cgroup_bytes_max=bounded(read.cgroup_limit),
        host_bytes_room=bounded(read.bytes_room),
        huge_pages=_HUGE_PAGES.get(read.huge_pages),
        numa_nodes=read.numa_nodes,
        numa_node=numa_node if numa_node is not None and numa_node >= 0 else None,
        link=_link(root, bus_id),
    )
