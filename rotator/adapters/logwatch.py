"""Counts what an engine's workers warn of in its log, reading each line once."""

import asyncio
import os
from dataclasses import dataclass
from pathlib import Path

READ_BYTES_MAX = 4 << 20  # in one look; of a log that grows faster only the end is read
# vLLM's workers log this once a minute while a rank does not take what is broadcast to it.
WARNING = b"No available shared memory broadcast block found"
_DEADLINE_S = 2.0


@dataclass(slots=True)
class _Place:
    inode: int = 0
    offset: int = -1
    count: int = 0


class FileLogWatch:
    """LogWatch over files in ``folder`` (relative paths are relative to it). What was there at the first look is old:
    it is not counted."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._places: dict[str, _Place] = {}

    async def warnings(self, log_path: str) -> int:
        place = self._places.setdefault(log_path, _Place())
        try:
            async with asyncio.timeout(_DEADLINE_S):
                await asyncio.to_thread(self._look, self._folder / log_path, place)
        except (OSError, TimeoutError):
            pass
        return place.count

    def _look(self, path: Path, place: _Place) -> None:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if place.offset < 0:
                place.inode, place.offset = status.st_ino, status.st_size
            elif status.st_ino != place.inode or status.st_size < place.offset:  # rotated: all of it is new
                place.inode, place.offset = status.st_ino, 0
            start = max(place.offset, status.st_size - READ_BYTES_MAX)
            file.seek(start)
            piece = file.read(READ_BYTES_MAX)
        whole = piece[: piece.rfind(b"\n") + 1]  # a line that is still being written waits for the next look
        place.count += whole.count(WARNING)
        place.offset = start + len(whole)
