"""Memory, limits and clocks of the host, below a root. Blocking."""

import contextlib
import ctypes
import re
import resource
import time
from pathlib import Path

from rotator.doctor.facts import HostFacts

_KIB = 1024
_STA_UNSYNC = 0x0040
_STATUS_OFFSET = 40  # of `status` in struct timex: modes, offset, freq, maxerror, esterror come first (64-bit Linux)
_TIMEX_BYTES = 256


def read_host(root: Path) -> HostFacts:
    """Raises ValueError where there is no meminfo."""
    sizes = _meminfo(_text(root / "proc/meminfo"))
    if "MemTotal" not in sizes:
        raise ValueError(f"{root / 'proc/meminfo'} tells no MemTotal")
    page = sizes.get("Hugepagesize", 2 << 20)
    thp = re.search(r"\[(\w+)\]", _text(root / "sys/kernel/mm/transparent_hugepage/enabled"))
    is_here = root == Path("/")
    memlock, files = _limits(_text(root / "proc/self/limits"))
    rtc = _text(root / "sys/class/rtc/rtc0/since_epoch").strip()
    return HostFacts(
        total_bytes=sizes["MemTotal"],
        available_bytes=sizes.get("MemAvailable", 0),
        free_bytes=sizes.get("MemFree", 0),
        cached_bytes=sizes.get("Cached", 0),
        huge_reserved_bytes=sizes.get("HugePages_Total", 0) // _KIB * page,
        huge_free_bytes=sizes.get("HugePages_Free", 0) // _KIB * page,
        thp=thp[1] if thp else "",
        memlock_bytes=_memlock_here() if is_here else memlock,
        files_max=resource.getrlimit(resource.RLIMIT_NOFILE)[1] if is_here else files,
        clock_synchronized=_synchronized() if is_here else None,
        now_wall_s=time.time(),
        rtc_wall_s=float(rtc) if rtc.isdecimal() and is_here else None,
    )


def _meminfo(text: str) -> dict[str, int]:
    """Sizes in bytes. Counts of pages, which have no unit, come out as so many KiB."""
    sizes = {}
    for line in text.splitlines():
        name, _, rest = line.partition(":")
        if (words := rest.split()) and words[0].isdecimal():
            sizes[name.strip()] = int(words[0]) * _KIB
    return sizes


def _limits(text: str) -> tuple[int | None, int | None]:
    found = {}
    for name in ("Max locked memory", "Max open files"):
        match = re.search(rf"^{name}\s+(\S+)", text, re.MULTILINE)
        found[name] = int(match[1]) if match and match[1].isdecimal() else None
    return found["Max locked memory"], found["Max open files"]


def _memlock_here() -> int | None:
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if resource.RLIM_INFINITY in (soft, hard) else soft


def _synchronized() -> bool | None:
    """Whether the kernel takes the clock for synchronized. None where it does not tell."""
    with contextlib.suppress(OSError, AttributeError):
        state = ctypes.create_string_buffer(_TIMEX_BYTES)  # modes 0: nothing is changed
        if ctypes.CDLL(None, use_errno=True).adjtimex(state) < 0:
            return None
        status = int.from_bytes(state.raw[_STATUS_OFFSET : _STATUS_OFFSET + 4], "little")
        return not status & _STA_UNSYNC
    return None


def _text(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(errors="replace")
    return ""
