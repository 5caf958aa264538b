"""Which processes of this machine belong to a Nomad allocation: bytes on a GPU are told by process id alone.

Three signs, each enough: its cgroup's path holds the allocation's id (readable by everyone; Nomad's own drivers), its
environment says NOMAD_ALLOC_ID (readable as root or the same user; every driver), or it listens on the engine's port.
Whoever is known brings its container (others of its cgroup) and its family (children, session) with it.
"""

import os
import re
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from rotator.adapters.loopback import listeners
from rotator.adapters.proctable import Identity, Proc, parse_stat

SETTLE_S = 2.0
ALLOC_VARIABLE = b"NOMAD_ALLOC_ID="
# A path that ends in a container's or an allocation's own group; a slice or a session is shared with strangers.
_OWN_CGROUP = re.compile(r"[0-9a-f]{64}|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@dataclass(frozen=True, slots=True)
class Seen:
    """One process. ``alloc`` is what its environment says; empty where that is silent or not ours to read."""

    proc: Proc
    cgroup: str
    alloc: str


def processes_of(allocs: Collection[str], seen: Iterable[Seen], listening: Collection[int] = ()) -> tuple[Proc, ...]:
    """Pure. Never a zombie; nothing for no allocation."""
    by_pid = {s.proc.pid: s for s in seen if not s.proc.is_gone}
    members = {
        pid
        for pid, s in by_pid.items()
        if s.alloc in allocs or any(a in s.cgroup for a in allocs) or (pid in listening and not s.alloc)
    }
    while True:
        groups = {g for pid in members if _OWN_CGROUP.search(g := by_pid[pid].cgroup)}
        new = {pid for pid, s in by_pid.items() if pid not in members and _joins(s, members, groups, allocs)}
        if not new:
            return tuple(by_pid[pid].proc for pid in sorted(members))
        members |= new


def _joins(seen: Seen, members: set[int], groups: set[str], allocs: Collection[str]) -> bool:
    if seen.alloc and seen.alloc not in allocs:
        return False  # it is another allocation's, whoever started it
    return seen.cgroup in groups or seen.proc.ppid in members or seen.proc.session in members


class AllocationProcesses:
    """Reads ``root`` (/proc). What a process says of itself is read once; not for two threads at once."""

    def __init__(self, root: Path = Path("/proc"), listening: Callable[[int], Collection[int]] = listeners) -> None:
        self._root = root
        self._listening = listening
        self._known: dict[Identity, Seen] = {}
        self._ticks_per_s = os.sysconf("SC_CLK_TCK")

    def of(self, allocs: Collection[str], port: int | None = None) -> tuple[Proc, ...]:
        """Blocking. ``port`` is looked for only where no other sign was found: that is dear."""
        if not allocs:
            return ()
        seen = self._read()
        found = processes_of(allocs, seen)
        if found or port is None:
            return found
        return processes_of(allocs, seen, frozenset(self._listening(port)))

    def _read(self) -> tuple[Seen, ...]:
        now: dict[Identity, Seen] = {}
        settled_before = (time.clock_gettime(time.CLOCK_BOOTTIME) - SETTLE_S) * self._ticks_per_s
        for entry in self._root.iterdir():
            if entry.name.isdecimal() and (proc := self._stat(entry)) is not None:
                known = self._known.get(proc.identity)
                # One that has just been started may still be on its way into its cgroup and its program.
                settled = known is not None and proc.start_ticks < settled_before
                now[proc.identity] = Seen(proc, known.cgroup, known.alloc) if known and settled else _look(entry, proc)
        self._known = now
        return tuple(now.values())

    @staticmethod
    def _stat(entry: Path) -> Proc | None:
        try:
            return parse_stat((entry / "stat").read_text(errors="replace"))
        except (OSError, ValueError):
            return None


def _look(entry: Path, proc: Proc) -> Seen:
    return Seen(proc, _cgroup(entry), _alloc(entry))


def _cgroup(entry: Path) -> str:
    try:
        lines = (entry / "cgroup").read_text(errors="replace").splitlines()
    except OSError:
        return ""
    paths = [line.split(":", 2)[2] for line in lines if line.count(":") >= 2]
    return max(paths, key=len, default="")


def _alloc(entry: Path) -> str:
    try:
        environ = (entry / "environ").read_bytes()
    except OSError:
        return ""
    values = (pair[len(ALLOC_VARIABLE) :] for pair in environ.split(b"\0") if pair.startswith(ALLOC_VARIABLE))
    return next(values, b"").decode(errors="replace")
