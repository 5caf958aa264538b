"""Runs the tools that look at processes and GPUs, where they are present, each within its time."""

import asyncio
import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rotator.adapters.proctable import read_proc

OUTPUT_BYTES_MAX = 4 << 20  # of one tool
THREADS_MAX = 256  # of one process, as /proc tells of them


class ToolFailed(Exception):
    """It is not here, did not end in time, or failed; the text says which."""


def find_tool(name: str) -> str | None:
    """On the PATH, or beside this interpreter (where a virtual environment has its programs)."""
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


async def run_tool(command: Sequence[str], *, deadline_s: float) -> str:
    """What it prints, at most OUTPUT_BYTES_MAX of it. It is killed, with what it started, at the deadline and when the
    caller is cancelled. Raises ToolFailed."""
    program = find_tool(command[0])
    if program is None:
        raise ToolFailed(f"{command[0]} is not installed")
    try:
        child = await asyncio.create_subprocess_exec(
            program,
            *command[1:],
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as e:
        raise ToolFailed(f"{command[0]} could not be started: {e.strerror}") from None
    try:
        async with asyncio.timeout(deadline_s):
            text = await _read(child)
            code = await child.wait()
    except TimeoutError:
        raise ToolFailed(f"{command[0]} was not done within {deadline_s:g} s") from None
    finally:
        if child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
    if code != 0:
        last = text.strip().splitlines()[-1:] or ["it says nothing"]
        raise ToolFailed(f"{command[0]} ended with {code}: {last[0][:300]}")
    return text


async def _read(child: asyncio.subprocess.Process) -> str:
    assert child.stdout is not None  # noqa: S101 - it was asked for
    kept = bytearray()
    while piece := await child.stdout.read(65536):
        kept += piece[: max(0, OUTPUT_BYTES_MAX - len(kept))]
    return kept.decode(errors="replace")


def kernel_view(pid: int) -> str:
    """Blocking. What the kernel tells of a process and its threads: where each waits. Its command line is not read:
    that can hang with the process. Raises ToolFailed where it is gone."""
    if (proc := read_proc(pid)) is None:
        raise ToolFailed("it is gone")
    lines = [f"{proc.pid} {proc.name} state {proc.state}, {proc.threads} threads", _file(pid, "status")]
    threads = sorted(Path(f"/proc/{pid}/task").iterdir(), key=lambda p: int(p.name))
    for task in threads[:THREADS_MAX]:
        told = " ".join(f"{name}={_one_line(task / name)}" for name in ("comm", "wchan", "syscall"))
        lines += [f"thread {task.name}: {told}", _file(int(task.name), "stack")]
    if len(threads) > THREADS_MAX:
        lines.append(f"... and {len(threads) - THREADS_MAX} more threads")
    return "\n".join(line for line in lines if line)


def _file(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace").rstrip()
    except OSError:
        return ""


def _one_line(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip() or "?"
    except OSError as e:
        return f"({e.strerror})"


def process_names(pids: frozenset[int]) -> Mapping[int, str]:
    """Blocking."""
    found = {pid: read_proc(pid) for pid in pids}
    return {pid: proc.name for pid, proc in found.items() if proc is not None}
