"""Bundles on disk: one folder an incident, kept by number, age and bytes, given out as tar.gz."""

import contextlib
import json
import os
import re
import shutil
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rotator.ports_watchdog import BundleGone

MANIFEST = "manifest.json"
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


@dataclass(frozen=True, slots=True)
class Retention:
    """The newest bundle stays whatever it is."""

    kept: int
    kept_s: float
    kept_bytes: int


class BundleStore:
    """All methods block."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._making: Counter[str] = Counter()  # these are not dropped

    @contextlib.contextmanager
    def making(self, id: str) -> Iterator[None]:
        """While it is filled it is not dropped for another."""
        self._making[id] += 1
        try:
            yield
        finally:
            self._making[id] -= 1
            if not self._making[id]:
                del self._making[id]

    def make(self, id: str) -> Path:
        """The bundle's folder, for nobody else to read. One that is there already is added to. Raises OSError."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._path(id)
        path.mkdir(mode=0o700, exist_ok=True)
        return path

    def _path(self, id: str) -> Path:
        """Raises BundleGone for what is no incident's id: no path is made of it."""
        if not _ID.fullmatch(id) or ".." in id:
            raise BundleGone("there is no such incident: see `rotator incidents`")
        return self._folder / id

    def manifest(self, id: str) -> Mapping[str, Any]:
        try:
            read = json.loads((self._path(id) / MANIFEST).read_text())
        except (OSError, ValueError, BundleGone):
            return {}
        return read if isinstance(read, dict) else {}

    def size(self, id: str) -> int:
        return _size(self._path(id))

    def packed(self, id: str) -> IO[bytes]:
        """It as tar.gz, in a file that has no name and goes when it is closed. Raises BundleGone."""
        path = self._path(id)
        if not path.is_dir():
            raise BundleGone(f"the bundle of {id} is not there: none was collected, or it was too old to be kept")
        file = tempfile.TemporaryFile()  # noqa: SIM115 - it is the caller's
        try:
            with tarfile.open(fileobj=file, mode="w:gz") as archive:
                archive.add(path, arcname=id, filter=_plain)
        except OSError as e:
            file.close()
            raise BundleGone(f"the bundle of {id} cannot be packed: {e.strerror}") from None
        file.seek(0)
        return file

    def retain(self, rule: Retention, now_wall_s: float) -> tuple[str, ...]:
        """Drop what is too old, too many or too much, the oldest first. Returns what went."""
        if not self._folder.is_dir():
            return ()
        made_wall_s = {p: s.st_mtime for p in self._folder.iterdir() if p.is_dir() and (s := _status(p))}
        bundles = sorted(made_wall_s, key=lambda p: made_wall_s[p])
        sizes = {path: _size(path) for path in bundles}
        total, dropped = sum(sizes.values()), list[str]()
        for path in bundles[:-1]:
            old = now_wall_s - made_wall_s[path] > rule.kept_s
            many = len(bundles) - len(dropped) > rule.kept
            if not (old or many or total > rule.kept_bytes):
                break
            if path.name in self._making:
                continue
            shutil.rmtree(path, ignore_errors=True)
            total -= sizes[path]
            dropped.append(path.name)
        return tuple(dropped)


def _size(path: Path) -> int:
    found = path.rglob("*") if path.is_dir() else ()
    return sum(status.st_size for p in found if p.is_file() and (status := _status(p)))


def _status(path: Path) -> os.stat_result | None:
    """None where another thread has dropped it meanwhile."""
    with contextlib.suppress(FileNotFoundError):
        return path.lstat()
    return None


def _plain(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Only files and folders, owned by nobody in particular."""
    if not (info.isfile() or info.isdir()):
        return None
    info.uid = info.gid = 0
    info.uname = info.gname = ""
    return info
