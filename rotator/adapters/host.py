"""Host memory as this process may use it: the machine's, less what a control group (a container) withholds.

Control groups of version 2 only: the limit of our own group and of each one above it, which bounds us just as well.
"""

from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from rotator.ports import HostMemory

KIB = 1024


def parse_meminfo(text: str) -> HostMemory:
    """Parse ``/proc/meminfo``. Raises ValueError where it lacks MemTotal or MemAvailable."""
    sizes = {}
    for line in text.splitlines():
        name, _, rest = line.partition(":")
        if rest:
            sizes[name.strip()] = int(rest.split()[0]) * KIB
    try:
        return HostMemory(total_bytes=sizes["MemTotal"], available_bytes=sizes["MemAvailable"])
    except KeyError as e:
        raise ValueError(f"no {e.args[0]} in /proc/meminfo") from None


def parse_own_group(text: str) -> str | None:
    """Our group's path within the version 2 hierarchy, from ``/proc/self/cgroup``. None where there is none."""
    for line in text.splitlines():
        if line.startswith("0::"):
            return line.removeprefix("0::").strip() or "/"
    return None


def parse_limit_bytes(text: str) -> int | None:
    """``memory.max``: a number of bytes, or None for ``max`` (no limit)."""
    word = text.strip()
    return int(word) if word.isdecimal() else None


def parse_reclaimable_bytes(text: str) -> int:
    """The page cache in ``memory.stat`` that the kernel drops before anything runs out of memory."""
    for line in text.splitlines():
        name, _, value = line.partition(" ")
        if name == "inactive_file":
            return int(value)
    return 0


def within(memory: HostMemory, limit_bytes: int, used_bytes: int) -> HostMemory:
    """The memory that is left of ``memory`` under one group's limit."""
    return HostMemory(
        total_bytes=min(memory.total_bytes, limit_bytes),
        available_bytes=min(memory.available_bytes, max(0, limit_bytes - used_bytes)),
    )


def read_host_memory(root: Path = Path("/")) -> HostMemory:
    """Total and available bytes. ``root`` is where /proc and /sys are. Raises OSError or ValueError without meminfo."""
    memory = parse_meminfo((root / "proc/meminfo").read_text())
    for group in _own_groups(root):
        limit = parse_limit_bytes(_read(group / "memory.max"))
        current = parse_limit_bytes(_read(group / "memory.current"))
        if limit is not None and current is not None:
            memory = within(memory, limit, max(0, current - parse_reclaimable_bytes(_read(group / "memory.stat"))))
    return memory


def _own_groups(root: Path) -> Iterable[Path]:
    """Our own control group's directory and all above it, the root included: in a container the root is limited."""
    path = parse_own_group(_read(root / "proc/self/cgroup"))
    if path is None:
        return
    # Seen from outside a namespace the path may begin with "..": such groups are not to be found below the mount.
    inner = PurePosixPath(path.lstrip("/"))
    base = root / "sys/fs/cgroup"
    yield from (base / part for part in (inner, *inner.parents) if ".." not in part.parts)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
