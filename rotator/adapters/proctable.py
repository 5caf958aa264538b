"""The process table as values: who runs, who descends from whom, and which processes carry an engine's marks.

A process is identified by pid and start time (clock ticks since boot): a reused pid has another start time, so it is
never mistaken. Marks are two environment variables that an engine is started with and hands to everything it starts.
"""

import os
import time
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path

ENGINE_MARK = "ROTATOR_ENGINE"
SERVICE_MARK = "ROTATOR_SERVICE"
KTHREADD_PID = 2
MARKS_SETTLE_S = 1.0

Identity = tuple[int, int]
"""(pid, start_ticks)"""


@dataclass(frozen=True, slots=True)
class Marks:
    """Whose engine a process belongs to; both empty for a process that is nobody's."""

    service: str = ""
    engine: str = ""


@dataclass(frozen=True, slots=True)
class Proc:
    """One line of the process table."""

    pid: int
    name: str
    state: str
    ppid: int
    pgrp: int
    session: int
    threads: int
    start_ticks: int

    @property
    def identity(self) -> Identity:
        return self.pid, self.start_ticks

    @property
    def is_gone(self) -> bool:
        """A zombie holds nothing any more, unless only its first thread has ended."""
        return self.state in "ZX" and self.threads <= 1


def parse_stat(text: str) -> Proc:
    """Parse ``/proc/<pid>/stat``. The name may itself hold blanks and brackets. Raises ValueError."""
    head, _, tail = text.rpartition(")")
    pid, _, name = head.partition(" (")
    fields = tail.split()
    if len(fields) < 20:
        raise ValueError("not a line of /proc/<pid>/stat")
    return Proc(
        pid=int(pid),
        name=name,
        state=fields[0],
        ppid=int(fields[1]),
        pgrp=int(fields[2]),
        session=int(fields[3]),
        threads=int(fields[17]),
        start_ticks=int(fields[19]),
    )


def parse_marks(environ: bytes) -> Marks | None:
    """Marks in ``/proc/<pid>/environ``. None where it cannot tell: programs that set a process title may overwrite
    their environment's first copy, which is the one that the kernel shows."""
    pairs = [pair.split(b"=", 1) for pair in environ.split(b"\0") if b"=" in pair]
    if not pairs:
        return None
    found = {key.decode(errors="replace"): value.decode(errors="replace") for key, value in pairs}
    return Marks(service=found.get(SERVICE_MARK, ""), engine=found.get(ENGINE_MARK, ""))


def read_proc(pid: int) -> Proc | None:
    """The process with this pid, None if there is none."""
    try:
        return parse_stat(_read(f"/proc/{pid}/stat").decode(errors="replace"))
    except (OSError, ValueError):
        return None


def _read(path: str) -> bytes:
    # Plain calls: this runs for every process of the machine, and a file object costs more than the reading.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(descriptor, 4096)
    finally:
        os.close(descriptor)


def is_running(identity: Identity) -> bool:
    """Whether exactly this process (not a later one with its pid) runs. A zombie does not."""
    proc = read_proc(identity[0])
    return proc is not None and proc.identity == identity and not proc.is_gone


def read_marks(pid: int) -> Marks | None:
    try:
        return parse_marks(Path(f"/proc/{pid}/environ").read_bytes())
    except OSError:
        return None


def read_boot_id() -> str:
    """Changes with every boot: start times count from it. Empty where the system does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


@dataclass(frozen=True, slots=True)
class Table:
    """One reading of the process table, without kernel threads. ``marks`` lacks processes that cannot tell."""

    procs: Mapping[int, Proc]
    marks: Mapping[int, Marks] = field(default_factory=dict)

    def marked(self, marks: Marks) -> frozenset[int]:
        return frozenset(pid for pid, found in self.marks.items() if found == marks)

    def ancestors(self, pid: int) -> frozenset[int]:
        seen: set[int] = set()
        while pid in self.procs and pid not in seen:
            seen.add(pid)
            pid = self.procs[pid].ppid
        return frozenset(seen)

    def family(self, roots: Set[Identity], marks: Marks | None, *, spare: Set[int] = frozenset()) -> tuple[Proc, ...]:
        """Every live process that is one of ``roots``, carries ``marks``, descends from such a one, or shares the
        session or group that such a one leads; never one of the pids in ``spare``, nor what only they lead to."""
        pids = self.marked(marks) if marks else frozenset()
        members = {
            pid for pid, proc in self.procs.items() if (pid in pids or proc.identity in roots) and pid not in spare
        }
        rest = [proc for proc in self.procs.values() if proc.pid not in members and proc.pid not in spare]
        while new := {p.pid for p in rest if p.ppid in members or p.session in members or p.pgrp in members}:
            members |= new
            rest = [proc for proc in rest if proc.pid not in new]
        return tuple(self.procs[pid] for pid in sorted(members) if not self.procs[pid].is_gone)


def list_pids() -> Iterable[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdecimal())


class TableReader:
    """Reads the table. Marks are read once for each process: they change only when a program is executed, so those of
    a process younger than MARKS_SETTLE_S are read again. Not for use by two threads at once."""

    def __init__(self) -> None:
        self._marks: dict[Identity, Marks | None] = {}
        self._ticks_per_s = os.sysconf("SC_CLK_TCK")

    def read(self) -> Table:
        """Blocking; about 20 µs a process, 60 µs for one not seen before."""
        procs = {proc.pid: proc for pid in list_pids() if (proc := read_proc(pid)) and not _is_kernel(proc)}
        settled_before = (time.clock_gettime(time.CLOCK_BOOTTIME) - MARKS_SETTLE_S) * self._ticks_per_s
        known: dict[Identity, Marks | None] = {}
        marks: dict[int, Marks] = {}
        for proc in procs.values():
            identity = proc.identity
            found = self._marks[identity] if identity in self._marks else read_marks(proc.pid)
            if proc.start_ticks < settled_before:
                known[identity] = found
            if found is not None:
                marks[proc.pid] = found
        self._marks = known
        return Table(procs, marks)


def _is_kernel(proc: Proc) -> bool:
    # In a container pid 2 may be an ordinary process: only the real one leads nothing and belongs to nobody.
    return proc.pgrp == 0 and KTHREADD_PID in (proc.pid, proc.ppid)
