"""One machine's processes of an engine, whoever started them: found by mark, by listening port, by Nomad's job name."""

import asyncio
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

from rotator.adapters import exits
from rotator.adapters.blocking import off_loop
from rotator.adapters.loopback import listeners
from rotator.adapters.proctable import Identity, Proc, Table, TableReader

TABLE_DEADLINE_S = 5.0
LISTENERS_FRESH_S = 10.0  # who listens changes rarely, and asking is dear
POLL_S = 0.05
KILL_PATIENCE_S = 10.0
_JOB_MARK = b"NOMAD_JOB_ID="


@dataclass(frozen=True, slots=True)
class Seen:
    """One process, as people look for it. ``state`` is the kernel's letter: D is stuck in the kernel."""

    pid: int
    name: str
    state: str

    def __str__(self) -> str:
        return f"{self.pid} ({self.name})"


class Machine:
    """For one event loop. It sees what this user may see: other users' environments only as root."""

    def __init__(self) -> None:
        self._reader = TableReader()
        self._reading = asyncio.Lock()
        self._listeners: dict[int, tuple[float, frozenset[Identity]]] = {}

    async def processes(self, engine: str, *, port: int | None = None, job: str = "") -> tuple[Seen, ...]:
        """All that is left of an engine here: what carries its mark or that Nomad job's, what listens on its port,
        and everything that those started. Raises LaunchError where the table cannot be read in time."""
        return tuple(Seen(p.pid, p.name, p.state) for p in await self._members(engine, port, job))

    async def kill(self, engine: str, *, job: str = "", grace_s: float) -> tuple[Seen, ...]:
        """End what carries the engine's mark with all it started: SIGTERM, after ``grace_s`` SIGKILL. What merely
        listens on its port is not ours to end. Returns what would not go."""
        loop = asyncio.get_running_loop()
        kill_at_s = loop.time() + grace_s
        told: set[Identity] = set()
        while members := await self._members(engine, None, job):
            now_s = loop.time()
            if now_s > kill_at_s + KILL_PATIENCE_S:
                break
            number = signal.SIGTERM if now_s < kill_at_s else signal.SIGKILL
            for proc in members:
                if number is signal.SIGKILL or proc.identity not in told:
                    told.add(proc.identity)
                    exits.send(proc.identity, number)
            await asyncio.sleep(POLL_S)
        return tuple(Seen(p.pid, p.name, p.state) for p in members)

    async def _members(self, engine: str, port: int | None, job: str) -> tuple[Proc, ...]:
        async with self._reading:
            now_s = asyncio.get_running_loop().time()
            return await off_loop(
                lambda: self._find(engine, port, job, now_s),
                deadline_s=TABLE_DEADLINE_S,
                doing=f"listing the processes of engine '{engine}'",
            )

    def _find(self, engine: str, port: int | None, job: str, now_s: float) -> tuple[Proc, ...]:
        table = self._reader.read()
        spare = table.ancestors(os.getpid())
        roots = {table.procs[pid].identity for pid, marks in table.marks.items() if marks.engine == engine}
        if port is not None:
            roots |= self._listening(table, port, now_s)
        if job:
            roots |= {proc.identity for proc in table.procs.values() if _is_of_job(proc.pid, job)}
        return table.family(roots, None, spare=spare)

    def _listening(self, table: Table, port: int, now_s: float) -> frozenset[Identity]:
        asked_s, roots = self._listeners.get(port, (now_s - 2 * LISTENERS_FRESH_S, frozenset()))
        still_there = any(proc.identity in roots for proc in table.procs.values())
        if now_s - asked_s > LISTENERS_FRESH_S or not still_there:
            roots = frozenset(table.procs[pid].identity for pid in listeners(port) if pid in table.procs)
            self._listeners[port] = now_s, roots
        return roots


def _is_of_job(pid: int, job: str) -> bool:
    try:
        return _JOB_MARK + job.encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False


def package_versions(environment: Path) -> Mapping[str, str]:
    """Versions of what ranks must have alike, by ``torch``, ``vllm``, ``nccl``, ``flashinfer``: read from the metadata
    of a Python environment's installed packages, importing nothing. What is not installed there is left out.

    ``environment`` is its prefix (a venv, /usr, /usr/local). Blocking."""
    places = [str(p) for p in sorted(environment.glob("lib/python3*/*-packages"))]
    found: dict[str, str] = {}
    for package in distributions(path=places):
        name = (package.metadata["Name"] or "").lower().replace("_", "-")
        for key in ("torch", "vllm"):
            if name == key:
                found[key] = package.version
        if name.startswith("nvidia-nccl-"):
            found["nccl"] = package.version
        if name in ("flashinfer-python", "flashinfer"):
            found["flashinfer"] = package.version
    return found


def unequal(versions: Mapping[str, Mapping[str, str]], packages: tuple[str, ...] = ("nccl", "flashinfer")) -> list[str]:
    """One line for each package that the nodes do not have alike; ``versions`` is by node."""
    problems = []
    for package in packages:
        told = {node: found.get(package, "none") for node, found in versions.items()}
        if len(set(told.values())) > 1:
            each = ", ".join(f"{version} on {node or 'this machine'}" for node, version in told.items())
            problems.append(f"{package} differs: {each}: install the same on all")
    return problems
