"""An allocation's tasks as local processes, as the raw_exec driver would run them. Other drivers' tasks run nothing."""

import asyncio
import contextlib
import os
import re
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_PLACE = re.compile(r"\$\{([A-Za-z0-9_]+)\}")
Argv = Callable[[Mapping[str, Any], Mapping[str, Any]], list[str] | None]
"""(job, task) -> what to run for it; None for nothing."""


def raw_exec(job: Mapping[str, Any], task: Mapping[str, Any]) -> list[str] | None:
    config = task.get("Config") or {}
    if task.get("Driver") != "raw_exec" or not config.get("command"):
        return None
    return [str(config["command"]), *map(str, config.get("args") or ())]


class Task:
    """One task of one allocation."""

    def __init__(self, argv: list[str] | None, environ: dict[str, str], folder: Path, name: str) -> None:
        filled = [_PLACE.sub(lambda m: environ.get(m[1], m[0]), word) for word in argv] if argv else None
        self._argv, self._environ = filled, environ
        self._files = {kind: folder / f"{name}.{kind}.0" for kind in ("stdout", "stderr")}
        self._ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._process: asyncio.subprocess.Process | None = None
        self._waiting: asyncio.Task[None] | None = None
        self.started = False

    async def start(self) -> None:
        self.started = True
        if self._argv is None:
            return
        self._files["stdout"].parent.mkdir(parents=True, exist_ok=True)
        with self._files["stdout"].open("ab") as out, self._files["stderr"].open("ab") as err:
            self._process = await asyncio.create_subprocess_exec(
                *self._argv, stdin=asyncio.subprocess.DEVNULL, stdout=out, stderr=err, env=self._environ,
                start_new_session=True,
            )  # fmt: skip
        self._waiting = asyncio.create_task(self._wait(self._process))

    async def _wait(self, process: asyncio.subprocess.Process) -> None:
        code = await process.wait()
        if not self._ended.done():
            self._ended.set_result(code)

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    async def ended(self) -> int:
        """Its exit code, negative for a signal, once it has ended."""
        return await asyncio.shield(self._ended)

    def send(self, number: signal.Signals) -> None:
        if self._process is None:
            if not self._ended.done():
                self._ended.set_result(-number)
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    async def stop(self, number: signal.Signals, timeout_s: float) -> None:
        """The kill signal, then SIGKILL once the kill timeout is over."""
        if not self.started or self._ended.done():
            return
        self.send(number)
        try:
            async with asyncio.timeout(timeout_s):
                await self.ended()
        except TimeoutError:
            self.send(signal.SIGKILL)
            await self.ended()

    def read(self, kind: str) -> bytes:
        try:
            return self._files[kind].read_bytes()
        except FileNotFoundError:
            return b""

    def write(self, kind: str, text: str) -> None:
        """Words into its log, as if it had said them."""
        self._files[kind].parent.mkdir(parents=True, exist_ok=True)
        with self._files[kind].open("a") as file:
            file.write(text)
