"""Children of the ledger's tests: started, read line by line, killed whatever happens."""

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from pathlib import Path

ROOT = Path(__file__).parents[3]
LINE_DEADLINE_S = 30.0


class Child:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.pid = process.pid

    async def line(self) -> str:
        """The next line it says; "" when it says no more."""
        assert self.process.stdout is not None
        async with asyncio.timeout(LINE_DEADLINE_S):
            return (await self.process.stdout.readline()).decode().strip()

    async def rest(self) -> list[str]:
        lines = []
        while line := await self.line():
            lines.append(line)
        return lines

    async def kill(self) -> list[str]:
        """SIGKILL; returns what it had said and nobody had read."""
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        rest = await self.rest()
        await self.process.wait()
        return rest


@contextlib.asynccontextmanager
async def child(mode: str, path: Path, *arguments: object) -> AsyncIterator[Child]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.system.ledger.child", mode, str(path), *map(str, arguments),
        cwd=ROOT, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    started = Child(process)
    try:
        yield started
    finally:
        await started.kill()
