"""Engines as local processes: each in its own session, marked, logged to its own file, ended with all it started.

Engines outlive the service: nothing ties them to it (no pipe, no shared session, no death signal), so a service that
was killed finds them again by reference or by mark. Under systemd that also needs ``KillMode=process`` in the unit.
"""

import asyncio
import errno
import functools
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from rotator.adapters import cudalog, enginelog, exits, flight_recorder
from rotator.adapters.blocking import off_loop
from rotator.adapters.engine_keys import VARIABLE
from rotator.adapters.environment import engine_environment
from rotator.adapters.proctable import (
    Identity,
    Marks,
    Proc,
    Table,
    TableReader,
    is_running,
    read_boot_id,
    read_marks,
    read_proc,
)
from rotator.core.values import EngineName
from rotator.ports import Handle, LaunchError, LaunchSpec

LAUNCHER = "process"

SPAWN_DEADLINE_S = 30.0
TABLE_DEADLINE_S = 5.0
TABLE_FRESH_S = 0.5  # what pids() may be behind: one reading serves all engines
MARKS_SHOWN_S = 1.0
KILL_DEADLINE_S = 15.0
STRAGGLER_GRACE_S = 2.0  # for what stays when an engine's first process has ended: nobody leads it to an orderly end
POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class ProcessRef:
    """A process and nothing else that ever has its pid: start time in clock ticks of this boot."""

    pid: int
    start_ticks: int
    boot_id: str
    pgid: int
    log_path: str

    @classmethod
    def of(cls, ref: Mapping[str, Any]) -> Self | None:
        """None where it is not one of ours: a damaged record counts as lost."""
        try:
            return cls(
                int(ref["pid"]), int(ref["start_ticks"]), str(ref["boot_id"]), int(ref["pgid"]), str(ref["log_path"])
            )
        except (KeyError, TypeError, ValueError):
            return None

    @property
    def identity(self) -> Identity:
        return self.pid, self.start_ticks


class _Child(subprocess.Popen[bytes]):
    """A child that may outlive us: dropping the object is no mistake, so it does not warn."""

    def __del__(self) -> None: ...


@dataclass(frozen=True, slots=True)
class _Started:
    child: _Child
    reaper: asyncio.Task[None]


class ProcessLauncher:
    """A Launcher for one event loop. ``service_id`` marks this service's engines among those of others."""

    def __init__(
        self,
        state_dir: Path,
        service_id: str,
        *,
        environ: Mapping[str, str] | None = None,
        log_rotate_bytes: int = 16 << 20,
        logs_kept: int = 5,
        nccl_trace: Callable[[], bool] = lambda: False,
        api_key: Callable[[LaunchSpec], str] | None = None,
    ) -> None:
        self._state_dir = state_dir
        self._service_id = service_id
        self._environ = os.environ if environ is None else environ
        self._log_rotate_bytes = log_rotate_bytes
        self._logs_kept = logs_kept
        self._nccl_trace = nccl_trace
        self._api_key = api_key
        self._started: dict[EngineName, _Started] = {}
        self._seen: dict[EngineName, frozenset[Identity]] = {}  # members as last read: the mark may get lost
        self._reader = TableReader()
        self._table: tuple[float, Table] | None = None
        self._table_lock = asyncio.Lock()

    # -- start and find ----------------------------------------------------------------------------------------------

    async def start(self, spec: LaunchSpec) -> Handle:
        trace = dict(flight_recorder.environment(self._state_dir, spec.engine)) if self._nccl_trace() else {}
        if self._api_key is not None:
            trace[VARIABLE] = await asyncio.to_thread(self._api_key, spec)
        environment = engine_environment(self._environ, spec, self._service_id, trace)
        check_command(spec, environment)
        spawning = asyncio.ensure_future(asyncio.to_thread(self._spawn, spec, environment))
        try:
            async with asyncio.timeout(SPAWN_DEADLINE_S):
                child, ref = await asyncio.shield(spawning)
        except TimeoutError:
            spawning.add_done_callback(_kill_late)
            raise LaunchError(
                f"engine '{spec.engine}': its program or log did not open in {SPAWN_DEADLINE_S:g} s: "
                "is a network file system stuck?"
            ) from None
        self._table = None
        self._seen[spec.engine] = frozenset({ref.identity})
        reaper = asyncio.create_task(_reap(child, ref.identity), name=f"reap {spec.engine}")
        self._started[spec.engine] = _Started(child, reaper)
        return _handle(spec, ref)

    def _spawn(self, spec: LaunchSpec, environment: Mapping[str, str]) -> tuple[_Child, ProcessRef]:
        log_path = self._log_path(spec)
        try:
            enginelog.rotate(log_path, above_bytes=self._log_rotate_bytes, keep=self._logs_kept)
            log = enginelog.open_for_launch(log_path, spec.command)
        except OSError as e:
            raise LaunchError(
                f"engine '{spec.engine}': cannot write its log {log_path}: {e.strerror}: make room or fix the rights"
            ) from None
        try:
            child = _Child(
                spec.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                cwd=spec.workdir,
                start_new_session=True,
            )
        except OSError as e:
            raise LaunchError(_spawn_failed(spec, e)) from None
        finally:
            os.close(log)
        _await_marks(child.pid)
        # Not reaped yet, so there is an entry even if it has ended already.
        proc = read_proc(child.pid)
        ticks = proc.start_ticks if proc else 0
        return child, ProcessRef(child.pid, ticks, read_boot_id(), child.pid, str(log_path))

    def _log_path(self, spec: LaunchSpec) -> Path:
        name = spec.log_path or f"logs/{spec.engine.replace('/', '__')}.log"
        return self._state_dir / name

    async def find(self, spec: LaunchSpec, ref: Mapping[str, Any] | None) -> Handle | None:
        known = ProcessRef.of(ref) if ref else None
        if known is not None:
            is_ours = functools.partial(self._is_ours, known, spec.engine)
            if await off_loop(is_ours, deadline_s=TABLE_DEADLINE_S, doing=_finding(spec.engine)):
                return _handle(spec, known)
        table = await self._read_table(_finding(spec.engine), fresh_s=0.0)
        spare = table.ancestors(os.getpid())
        members = [table.procs[pid] for pid in table.marked(self._marks(spec.engine)) - spare]
        first = _first_of([proc for proc in members if not proc.is_gone])
        if first is None:
            return None
        found = ProcessRef(first.pid, first.start_ticks, read_boot_id(), first.pgrp, str(self._log_path(spec)))
        return _handle(spec, found)

    def _is_ours(self, ref: ProcessRef, engine: EngineName) -> bool:
        if ref.boot_id != read_boot_id() or not is_running(ref.identity):
            return False
        return read_marks(ref.pid) in (None, self._marks(engine))

    def _marks(self, engine: EngineName) -> Marks:
        return Marks(service=self._service_id, engine=engine)

    # -- watching ----------------------------------------------------------------------------------------------------

    async def is_alive(self, handle: Handle) -> bool:
        """Whether its first process runs. What it started may outlive that: ``stop`` ends those too."""
        ref = _ref_of(handle)
        return ref.boot_id == read_boot_id() and await off_loop(
            lambda: is_running(ref.identity), deadline_s=TABLE_DEADLINE_S, doing=f"looking at engine '{handle.engine}'"
        )

    async def wait_exit(self, handle: Handle) -> str:
        ref = _ref_of(handle)
        started = self._started.get(handle.engine)
        if started and started.child.pid == ref.pid:
            await asyncio.wait([started.reaper])
            words = exits.in_words(started.child.returncode)
        else:
            await exits.wait_gone(ref.identity)
            words = exits.in_words(None)
        told = await self.evidence(handle)
        return f"{words}; {told}" if told else f"{words}; it logged nothing"

    async def pids(self, handle: Handle) -> frozenset[int]:
        return frozenset(proc.pid for proc in await self._members(handle, fresh_s=TABLE_FRESH_S))

    async def evidence(self, handle: Handle) -> str:
        try:
            path = Path(_ref_of(handle).log_path)
            return await off_loop(
                lambda: cudalog.evidence(enginelog.tail(path)),
                deadline_s=TABLE_DEADLINE_S,
                doing=f"reading the log of engine '{handle.engine}'",
            )
        except LaunchError:
            return ""

    async def _members(self, handle: Handle, *, fresh_s: float = 0.0) -> tuple[Proc, ...]:
        ref = _ref_of(handle)
        table = await self._read_table(f"listing the processes of engine '{handle.engine}'", fresh_s=fresh_s)
        roots = self._seen.get(handle.engine, frozenset())
        if ref.boot_id == read_boot_id():
            roots |= {ref.identity}
        members = table.family(roots, self._marks(handle.engine), spare=table.ancestors(os.getpid()))
        self._seen[handle.engine] = frozenset(proc.identity for proc in members)
        return members

    async def _read_table(self, doing: str, *, fresh_s: float) -> Table:
        loop = asyncio.get_running_loop()
        async with self._table_lock:
            if self._table is None or loop.time() - self._table[0] > fresh_s:
                self._table = loop.time(), await off_loop(self._reader.read, deadline_s=TABLE_DEADLINE_S, doing=doing)
            return self._table[1]

    # -- stop --------------------------------------------------------------------------------------------------------

    async def stop(self, handle: Handle, *, grace_s: float) -> None:
        if grace_s > 0:
            await self._end_in_order(handle, grace_s)
        left = await self._kill(handle)
        if left:
            names = ", ".join(f"{proc.pid} ({proc.name}, state {proc.state})" for proc in left)
            raise LaunchError(
                f"engine '{handle.engine}': still there {KILL_DEADLINE_S:g} s after SIGKILL: {names}: "
                "state D is stuck in the kernel (see dmesg), another one may belong to another user"
            )
        started = self._started.get(handle.engine)
        if started and started.child.pid == _ref_of(handle).pid:
            started.child.poll()
        self._seen.pop(handle.engine, None)

    async def _end_in_order(self, handle: Handle, grace_s: float) -> None:
        """SIGTERM to the group. Once its first process has gone, what is left is told too, and has less time."""
        ref = _ref_of(handle)
        loop = asyncio.get_running_loop()
        until_s = loop.time() + grace_s
        exits.send_group(ref.pgid, members := await self._members(handle), signal.SIGTERM)
        told_stragglers = False
        while members and loop.time() < until_s:
            if not told_stragglers and all(proc.identity != ref.identity for proc in members):
                told_stragglers = True
                until_s = min(until_s, loop.time() + STRAGGLER_GRACE_S)
                for proc in members:
                    exits.send(proc.identity, signal.SIGTERM)
            await asyncio.sleep(min(POLL_S, max(0.0, until_s - loop.time())))
            members = await self._members(handle)

    async def _kill(self, handle: Handle) -> tuple[Proc, ...]:
        """SIGKILL to the group and to every member by itself, again for what was started meanwhile."""
        loop = asyncio.get_running_loop()
        until_s = loop.time() + KILL_DEADLINE_S
        while members := await self._members(handle):
            if loop.time() > until_s:
                break
            exits.send_group(_ref_of(handle).pgid, members, signal.SIGKILL)
            for proc in members:
                exits.send(proc.identity, signal.SIGKILL)
            await asyncio.sleep(POLL_S)
        return members


def check_command(spec: LaunchSpec, environment: Mapping[str, str]) -> None:
    """Raises LaunchError for a command that cannot be run, before anything is touched."""
    if not spec.command or not spec.command[0]:
        raise LaunchError(f"engine '{spec.engine}' has no command: give 'command' as a list, the program first")
    if spec.workdir is not None and not os.path.isdir(spec.workdir):
        raise LaunchError(f"engine '{spec.engine}': workdir {spec.workdir} is no directory: create it or correct it")
    program = spec.command[0]
    if os.path.dirname(program):
        path = os.path.join(spec.workdir or "", program)
        if not os.path.exists(path):
            raise LaunchError(_not_found(spec, path, "correct the path in 'command', or install it"))
        if os.path.isdir(path) or not os.access(path, os.X_OK):
            raise LaunchError(_not_executable(spec, path))
    elif shutil.which(program, path=environment.get("PATH", os.defpath)) is None:
        raise LaunchError(_not_found(spec, program, "give its full path in 'command', or install it on the PATH"))


def _not_found(spec: LaunchSpec, program: str, fix: str) -> str:
    return (
        f"engine '{spec.engine}': program '{program}' not found (what a shell calls exit 127; nothing was started, "
        f"this is no engine crash): {fix}"
    )


def _not_executable(spec: LaunchSpec, path: str) -> str:
    return (
        f"engine '{spec.engine}': '{path}' is not executable (what a shell calls exit 126; nothing was started, "
        "this is no engine crash): name the program in 'command', or chmod +x it"
    )


def _spawn_failed(spec: LaunchSpec, error: OSError) -> str:
    """The command looked right and still did not run."""
    match error.errno:
        case errno.ENOENT:
            return _not_found(spec, spec.command[0], "the interpreter in its first line does not exist: correct it")
        case errno.EACCES | errno.ENOEXEC:
            return _not_executable(spec, spec.command[0])
    return f"engine '{spec.engine}': '{spec.command[0]}' could not be started: {error.strerror}"


def _first_of(members: list[Proc]) -> Proc | None:
    """The process that stands for an engine: the oldest session leader (workers that lead one are younger)."""
    return min(members, key=lambda proc: (proc.session != proc.pid, proc.start_ticks, proc.pid), default=None)


def _await_marks(pid: int) -> None:
    """Blocking. The kernel shows the new environment a moment after the program was executed; once ``start`` returns,
    whoever looks for the mark must find it."""
    until_s = time.monotonic() + MARKS_SHOWN_S
    while (proc := read_proc(pid)) and not proc.is_gone and read_marks(pid) is None and time.monotonic() < until_s:
        time.sleep(0.001)


async def _reap(child: _Child, identity: Identity) -> None:
    """Take the child's exit code when it ends, whether anybody asks for it or not: no zombie stays."""
    await exits.wait_gone(identity)
    while child.poll() is None:  # noqa: ASYNC110 - at most once: the kernel says "gone" just before it can be reaped
        await asyncio.sleep(POLL_S)


def _kill_late(spawning: asyncio.Future[tuple[_Child, ProcessRef]]) -> None:
    """A launch that was given up is not left running behind our back."""
    if spawning.cancelled() or spawning.exception():
        return
    child, ref = spawning.result()
    exits.send(ref.identity, signal.SIGKILL)
    child.wait()


def _handle(spec: LaunchSpec, ref: ProcessRef) -> Handle:
    return Handle(spec.engine, LAUNCHER, spec.url, asdict(ref))


def _ref_of(handle: Handle) -> ProcessRef:
    ref = ProcessRef.of(handle.ref)
    if ref is None:
        raise LaunchError(f"engine '{handle.engine}': its record names no process: find it again by its mark")
    return ref


def _finding(engine: EngineName) -> str:
    return f"looking for engine '{engine}'"
