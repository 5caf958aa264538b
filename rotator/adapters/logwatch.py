"""Counts what an engine's workers warn of in its log, reading each line once."""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from rotator.adapters.blocking import off_loop
from rotator.ports import LaunchError

READ_BYTES_MAX = 4 << 20  # in one look; of a log that grows faster only the end is read
# vLLM's workers log this once a minute while a rank does not take what is broadcast to it.
WARNING = b"No available shared memory broadcast block found"
_DEADLINE_S = 2.0


@dataclass(slots=True)
class _Place:
    inode: int = 0
    offset: int = -1
    count: int = 0
    looking: bool = False  # also after its deadline: what hangs must not be asked by one thread more at every look


class FileLogWatch:
    """LogWatch over files in ``folder`` (relative paths are relative to it). What was there at the first look is old:
    it is not counted."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._places: dict[str, _Place] = {}

    async def warnings(self, log_path: str) -> int:
        place = self._places.setdefault(log_path, _Place())
        if not place.looking:
            with contextlib.suppress(OSError, LaunchError):
                await off_loop(
                    lambda: self._look(self._folder / log_path, place),
                    deadline_s=_DEADLINE_S,
                    doing=f"reading {log_path}",
                )
        return place.count

    def _look(self, path: Path, place: _Place) -> None:
        place.looking = True
        try:
            self._count(path, place)
        finally:
            place.looking = False

    def _count(self, path: Path, place: _Place) -> None:
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
