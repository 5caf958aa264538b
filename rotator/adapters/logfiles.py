"""Engines' logs for operators: the last lines of a file, and what is added to it, with secrets taken out."""

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rotator.adapters.blocking import off_loop
from rotator.ports import LaunchError

POLL_S = 0.25
READ_S = 5.0
CHUNK_BYTES = 1 << 18
LINE_BYTES_MAX = 16 << 10  # a progress bar without line ends must not grow for ever
LINES_MAX = 10_000


@dataclass(slots=True)
class _Place:
    """How far a file was read. ``inode`` tells a rotated one."""

    inode: int
    offset: int
    rest: bytes = b""  # a line that has not ended yet


class FileLogs:
    """Implements ports.EngineLogs over the files that launchers write or keep."""

    def __init__(self, redact: Callable[[str], str]) -> None:
        self._redact = redact

    async def read(self, path: str, *, lines: int, follow: bool) -> AsyncGenerator[tuple[str, ...]]:
        """Batches of lines: first the last ``lines`` (one batch, maybe empty), then with ``follow`` what is added, an
        empty batch now and then while nothing is. A file that does not answer raises LaunchError."""
        file = Path(path)
        found, place = await self._off_loop(lambda: _tail(file, min(lines, LINES_MAX)), path)
        yield found
        while follow:
            await asyncio.sleep(POLL_S)
            found, place = await self._off_loop(partial(_more, file, place), path)
            yield found

    async def _off_loop(
        self, work: Callable[[], tuple[list[bytes], _Place | None]], path: str
    ) -> tuple[tuple[str, ...], _Place | None]:
        """Read and redact in a thread: both may take their time."""

        def read() -> tuple[tuple[str, ...], _Place | None]:
            found, place = work()
            return tuple(self._redact(line.decode(errors="replace").rstrip("\r\n")) for line in found), place

        try:
            return await off_loop(read, deadline_s=READ_S, doing=f"reading {path}")
        except OSError as e:
            raise LaunchError(f"the log {path} cannot be read: {e.strerror}") from None


def _tail(file: Path, lines: int) -> tuple[list[bytes], _Place | None]:
    """The last lines, and where the file ends. None where there is no file yet."""
    with contextlib.suppress(FileNotFoundError), file.open("rb") as opened:
        stat = os.fstat(opened.fileno())
        start, data = stat.st_size, b""
        while start > 0 and data.count(b"\n") <= lines and len(data) < 16 * CHUNK_BYTES:
            step = min(CHUNK_BYTES, start)
            start -= step
            opened.seek(start)
            data = opened.read(step) + data
        whole, rest = _split(data)
        return (whole[-lines:] if lines else []), _Place(stat.st_ino, stat.st_size, rest)
    return [], None


def _more(file: Path, place: _Place | None) -> tuple[list[bytes], _Place | None]:
    """What was added. A file that was rotated away or cut is read from its beginning."""
    with contextlib.suppress(FileNotFoundError), file.open("rb") as opened:
        stat = os.fstat(opened.fileno())
        if place is None or place.inode != stat.st_ino or stat.st_size < place.offset:
            place = _Place(stat.st_ino, 0)
        opened.seek(place.offset)
        data = opened.read(CHUNK_BYTES)
        whole, rest = _split(place.rest + data)
        return whole, _Place(place.inode, place.offset + len(data), rest)
    return [], place


def _split(data: bytes) -> tuple[list[bytes], bytes]:
    """Whole lines, and what comes after the last line end. A line that is too long counts as whole."""
    whole = data.splitlines(keepends=True)
    rest = whole.pop() if whole and not whole[-1].endswith((b"\n", b"\r")) else b""
    if len(rest) > LINE_BYTES_MAX:
        whole, rest = [*whole, rest], b""
    return [line[:LINE_BYTES_MAX] for line in whole], rest
