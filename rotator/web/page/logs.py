"""The end of an engine's log file, and what is written to it from then on."""

import asyncio
from pathlib import Path

TAIL_BYTES = 48 << 10
STEP_BYTES_MAX = 256 << 10  # of what came since the last look; more is skipped, and said
READ_S = 5.0


class LogGone(Exception):
    """The log cannot be read; the text says why."""


class Tail:
    """``path`` is the service's word, never a viewer's."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._at: int | None = None

    async def more(self) -> list[str]:
        """Lines since the last call; at first the end of the file. Raises LogGone."""
        if not self._path.name:
            raise LogGone("this engine's launcher keeps no log file here")
        try:
            async with asyncio.timeout(READ_S):
                return await asyncio.to_thread(self._read)
        except TimeoutError:
            raise LogGone(f"{self._path} could not be read within {READ_S:.0f} s") from None
        except OSError as e:
            raise LogGone(f"{self._path}: {e.strerror}") from None

    def _read(self) -> list[str]:
        with self._path.open("rb") as file:
            size = file.seek(0, 2)
            first = self._at is None or size < self._at  # it was begun anew
            begin = max(0, size - TAIL_BYTES) if first else max(self._at or 0, size - STEP_BYTES_MAX)
            skipped = begin > 0 and (first or begin != self._at)
            file.seek(begin)
            text = file.read(size - begin)
        whole, _, _rest = text.rpartition(b"\n")
        self._at = begin + len(whole) + (1 if whole or text.startswith(b"\n") else 0)
        lines = whole.decode("utf-8", "replace").splitlines()
        return lines[1:] if skipped and first else lines
