"""Engines made of a few lines of Python, and a launcher that leaves none of them behind."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

import pytest

from rotator.adapters.process import ProcessLauncher
from rotator.adapters.proctable import Marks, TableReader, is_running, read_proc
from rotator.ports import Handle, LaunchSpec

SERVICE = f"test-{os.getpid()}"


async def eventually(condition: Callable[[], bool], *, within_s: float = 10.0, what: str = "it") -> None:
    """Wait for a condition by looking often; fails by name after ``within_s`` seconds."""
    try:
        async with asyncio.timeout(within_s):
            while not condition():  # noqa: ASYNC110 - what is waited for is another process
                await asyncio.sleep(0.005)
    except TimeoutError:
        raise AssertionError(f"{what} did not happen within {within_s} s") from None


def is_gone(pid: int) -> bool:
    proc = read_proc(pid)
    return proc is None or proc.is_gone


class Engines:
    """Specs of engines whose program is Python text; each has its log and may write files into its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def spec(
        self,
        program: str,
        *,
        engine: str = "dsv4-flash",
        command: tuple[str, ...] | None = None,
        env: Mapping[str, str] | None = None,
        workdir: str | None = None,
    ) -> LaunchSpec:
        return LaunchSpec(
            engine=engine,
            launcher="process",
            command=command or (sys.executable, "-c", program),
            env={"FOLDER": str(self.folder), **(env or {})},
            url="http://127.0.0.1:1",
            log_path=str(self.folder / f"{engine}.log"),
            workdir=workdir,
        )

    def log(self, engine: str = "dsv4-flash") -> str:
        return (self.folder / f"{engine}.log").read_text()

    async def written(self, name: str) -> str:
        """What an engine wrote into a file of its folder, once it has (a whole line)."""
        path = self.folder / name
        await eventually(lambda: path.exists() and path.read_text().endswith("\n"), what=f"file {name}")
        return path.read_text().strip()


@pytest.fixture
def engines(tmp_path: Path) -> Engines:
    return Engines(tmp_path)


@pytest.fixture
async def launcher(tmp_path: Path) -> AsyncIterator[ProcessLauncher]:
    yield ProcessLauncher(tmp_path, SERVICE)
    await eventually(_none_left, what="the end of all engines")


def _none_left() -> bool:
    table = TableReader().read()
    left = [pid for pid, marks in table.marks.items() if marks.service == SERVICE and pid != os.getpid()]
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return not left


def pid_of(handle: Handle) -> int:
    pid = handle.ref["pid"]
    assert isinstance(pid, int)
    return pid


def is_same(handle: Handle) -> bool:
    return is_running((handle.ref["pid"], handle.ref["start_ticks"]))


def marks(engine: str = "dsv4-flash") -> Marks:
    return Marks(SERVICE, engine)
