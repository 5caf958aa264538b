"""Collects the evidence of an incident before anything is killed: all of it side by side, within one deadline.

What a bundle holds, as far as it can be had: stacks of every process (py-spy and gdb where they are installed; what the
kernel tells in any case), the NCCL flight recorder's dumps, the log's last lines, `nvidia-smi -q`, the driver's lines
in the kernel's log, and what the service itself knows. ``manifest.json`` says what is there and what is not, and why.
"""

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from rotator.adapters.blocking import off_loop
from rotator.adapters.evidence_store import MANIFEST, BundleStore, Retention
from rotator.adapters.evidence_tools import ToolFailed, kernel_view, process_names, run_tool
from rotator.adapters.flight_recorder import dumps, trigger
from rotator.adapters.redact import redactor
from rotator.config_watchdog import EvidenceConfig
from rotator.ports import LaunchError
from rotator.ports_watchdog import Case

MIB = 1 << 20
PROCESSES_MAX = 64
_AT_ONCE = 8  # debuggers
_LINE_BYTES = 400  # what a line of a log is taken for
_DUMP_WAIT_S = 3.0
_DUMP_POLL_S = 0.25
_PIECE_BYTES = 1 << 18
_FILE_BYTES_MAX = 16 * MIB
_DISK_S = 10.0  # for one file

T = TypeVar("T")


@dataclass(slots=True)
class _Folder:
    """A bundle in the making. What comes after it is full, or after the deadline, is told as missing."""

    path: Path
    bytes_max: int
    redact: Callable[[str], str]
    held_bytes: int = 0
    items: list[dict[str, Any]] = field(default_factory=list)
    missing: list[dict[str, str]] = field(default_factory=list)

    async def put(self, name: str, text: str) -> None:
        """Raises LaunchError where this machine does not get it done in time, as ``put_bytes`` does."""
        await self.put_bytes(name, await _aside(lambda: self.redact(text).encode(errors="replace"), name))

    async def put_bytes(self, name: str, content: bytes) -> None:
        room = min(_FILE_BYTES_MAX, self.bytes_max - self.held_bytes)
        if room <= 0:
            return self.lack(name, f"the bundle has reached its {self.bytes_max / MIB:g} MiB")
        taken = content[:room]
        self.held_bytes += len(taken)  # before it is written: others are written meanwhile
        try:
            await _aside(lambda: _write(self.path / name, taken), name)
        except OSError as e:
            self.held_bytes -= len(taken)
            return self.lack(name, f"it could not be written: {e.strerror}")
        cut = {"cut_from_bytes": len(content)} if len(content) > room else {}
        self.items.append({"name": name, "bytes": len(taken), **cut})
        return None

    def lack(self, what: str, why: str) -> None:
        self.missing.append({"what": what, "why": why})


class FileEvidence:
    """Evidence in folders under ``state_dir``. ``config`` is asked at each incident: it may be reloaded."""

    def __init__(
        self,
        state_dir: Path,
        config: Callable[[], EvidenceConfig],
        *,
        environ: Mapping[str, str] | None = None,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._state_dir = state_dir
        self._config = config
        self._wall = wall
        self._redact = redactor(os.environ if environ is None else environ)
        self._store = BundleStore(state_dir / "incidents")
        self._debuggers = asyncio.Semaphore(_AT_ONCE)

    async def collect(self, case: Case, *, deadline_s: float) -> int:
        with self._store.making(case.id):
            return await self._collect(case, deadline_s)

    async def _collect(self, case: Case, deadline_s: float) -> int:
        config, began_wall_s = self._config(), self._wall()
        end_at_s = asyncio.get_running_loop().time() + deadline_s
        try:
            path = await _aside(lambda: self._store.make(case.id), case.id)
        except (OSError, LaunchError):
            return 0  # no room for evidence is no reason not to recover
        folder = _Folder(path, int(config.bundle_max_mib * MIB), self._redact)
        await self._within(end_at_s, {"what the service knows": self._texts(case, folder)}, folder)
        await self._within(end_at_s, self._parts(case, folder, config), folder)
        told = {
            "id": case.id,
            "engine": case.engine,
            "began_wall_s": began_wall_s,
            "seconds": self._wall() - began_wall_s,
            "processes": sorted(case.pids),
            "items": sorted(folder.items, key=lambda i: str(i["name"])),
            "missing": sorted(folder.missing, key=lambda m: m["what"]),
        }
        try:
            return await _aside(lambda: self._finish(path, told, config), MANIFEST)
        except LaunchError:
            return 0

    def _finish(self, path: Path, told: Mapping[str, Any], config: EvidenceConfig) -> int:
        try:
            (path / MANIFEST).write_text(json.dumps(told, indent=2))
            rule = Retention(config.kept, config.kept_days * 86400, int(config.kept_max_mib * MIB))
            self._store.retain(rule, self._wall())
            return self._store.size(path.name)
        except OSError:
            return 0

    async def _within(self, end_at_s: float, parts: Mapping[str, Coroutine[Any, Any, None]], folder: _Folder) -> None:
        """Run every part; what fails or is late is told as missing, and holds up nothing else."""
        left_s = max(0.0, end_at_s - asyncio.get_running_loop().time())
        tasks = {asyncio.create_task(part): name for name, part in parts.items()}
        done, late = await asyncio.wait(tasks, timeout=left_s) if tasks else (set(), set())
        for task in late:
            task.cancel()
            folder.lack(tasks[task], "it was not there within the time for evidence")
        await asyncio.gather(*late, return_exceptions=True)
        for task in done:
            if (error := task.exception()) is not None:
                folder.lack(tasks[task], str(error) or repr(error))

    # -- the parts ---------------------------------------------------------------------------------------------------

    def _parts(self, case: Case, folder: _Folder, config: EvidenceConfig) -> dict[str, Coroutine[Any, Any, None]]:
        parts: dict[str, Coroutine[Any, Any, None]] = {}
        for pid in sorted(case.pids)[:PROCESSES_MAX]:
            parts[f"process {pid}: kernel"] = self._kernel(pid, folder)
            for tool, command in _debuggers(pid).items():
                parts[f"process {pid}: {tool}"] = self._stacks(pid, tool, command, folder, config)
        for left_out in sorted(case.pids)[PROCESSES_MAX:]:
            folder.lack(f"process {left_out}", f"only {PROCESSES_MAX} processes are looked at")
        if case.log_path:
            parts["log.txt"] = self._log(case.log_path, folder, config)
        if case.engine is not None and case.pids:
            parts["nccl"] = self._flight(case.engine, folder)
        parts["nvidia-smi.txt"] = self._tool("nvidia-smi.txt", ("nvidia-smi", "-q"), folder, config)
        parts["kernel-log.txt"] = self._kernel_log(folder, config)
        return parts

    async def _texts(self, case: Case, folder: _Folder) -> None:
        for name, text in case.texts.items():
            await folder.put(name, text)

    async def _kernel(self, pid: int, folder: _Folder) -> None:
        told = await _aside(lambda: kernel_view(pid), f"/proc/{pid}")
        await folder.put(f"stacks/{pid}-kernel.txt", told)

    async def _stacks(
        self, pid: int, tool: str, command: tuple[str, ...], folder: _Folder, config: EvidenceConfig
    ) -> None:
        async with self._debuggers:
            await folder.put(f"stacks/{pid}-{tool}.txt", await run_tool(command, deadline_s=config.stack_deadline_s))

    async def _tool(self, name: str, command: tuple[str, ...], folder: _Folder, config: EvidenceConfig) -> None:
        await folder.put(name, await run_tool(command, deadline_s=config.deadline_s))

    async def _kernel_log(self, folder: _Folder, config: EvidenceConfig) -> None:
        text = await run_tool(("dmesg", "--time-format", "iso"), deadline_s=config.stack_deadline_s)
        words = ("nvrm", "xid", "nvidia", "out of memory", "oom", "hung task", "pcie", "aer:")
        lines = [line for line in text.splitlines() if any(word in line.lower() for word in words)]
        await folder.put("kernel-log.txt", "\n".join(lines[-config.log_lines :]) or "nothing of GPUs or memory in it")

    async def _log(self, log_path: str, folder: _Folder, config: EvidenceConfig) -> None:
        path = self._state_dir / log_path
        try:
            text = await _aside(lambda: _tail(path, config.log_lines), log_path)
        except OSError as e:
            raise ToolFailed(f"{path}: {e.strerror}") from None
        await folder.put("log.txt", text)

    async def _flight(self, engine: str, folder: _Folder) -> None:
        since_wall_s = time.time()
        asked = await _aside(lambda: trigger(self._state_dir, engine), "nccl")
        if not asked:
            raise ToolFailed(
                "no rank listens: it is no torch process with a flight recorder, or was launched elsewhere"
            )
        found: tuple[Path, ...] = ()
        for _ in range(int(_DUMP_WAIT_S / _DUMP_POLL_S)):
            enough = len(found) >= asked  # one pause more: the last may still be writing
            await asyncio.sleep(_DUMP_POLL_S)
            found = await _aside(lambda: dumps(self._state_dir, engine, since_wall_s), "nccl")
            if enough:
                break
        for path in found:
            await folder.put_bytes(f"nccl/{path.name}", await _aside(partial(_head, path), path.name))
        if len(found) < asked:
            folder.lack("nccl", f"{asked} ranks were asked, {len(found)} wrote within {_DUMP_WAIT_S:g} s")

    # -- what is there -----------------------------------------------------------------------------------------------

    async def manifest(self, id: str) -> Mapping[str, Any]:
        try:
            return await _aside(lambda: self._store.manifest(id), id)
        except LaunchError:
            return {}

    async def bundle(self, id: str) -> AsyncIterator[bytes]:
        file = await asyncio.to_thread(self._store.packed, id)
        try:
            while piece := await asyncio.to_thread(file.read, _PIECE_BYTES):
                yield piece
        finally:
            file.close()

    async def names(self, pids: frozenset[int]) -> Mapping[int, str]:
        try:
            return await _aside(lambda: process_names(pids), "/proc")
        except LaunchError:
            return {}


def _debuggers(pid: int) -> dict[str, tuple[str, ...]]:
    gdb = ("gdb", "-p", str(pid), "-batch", "-nx", "-ex", "set pagination off", "-ex", "thread apply all bt 64")
    return {"py-spy": ("py-spy", "dump", "--pid", str(pid)), "gdb": gdb}


async def _aside(work: Callable[[], T], what: str) -> T:
    """Off the loop: whoever asks for evidence has streams to carry. Raises LaunchError after _DISK_S."""
    return await off_loop(work, deadline_s=_DISK_S, doing=what)


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _head(path: Path) -> bytes:
    """One byte more than is kept, so that a cut is told."""
    with path.open("rb") as file:
        return file.read(_FILE_BYTES_MAX + 1)


def _tail(path: Path, lines: int) -> str:
    """Blocking. Raises OSError."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - lines * _LINE_BYTES))
        text = file.read(2 * lines * _LINE_BYTES).decode(errors="replace")
    return "\n".join(text.splitlines()[-lines:])
