"""Archives of installed Python environments: files as they are, not a list of packages, verified before they count."""

import contextlib
import datetime
import fcntl
import hashlib
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from rotator.adapters.env_manifest import (
    CONTENT,
    Entry,
    Manifest,
    check_environment,
    digest_of,
    kind_of,
    packages_of,
    read_manifest,
    scripts_of,
    sync_folder,
    walk,
)
from rotator.ports import ArchiveError

LEVEL = 3
PARTIAL = ".partial-"
_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,127}$")

Progress = Callable[[int], None]
"""Told the bytes of the environment that are done, as it goes."""


def archive(prefix: Path, archives: Path, name: str = "", *, progress: Progress = lambda _: None) -> Manifest:
    """Archive the environment at ``prefix`` into ``archives``/``name`` (by its vLLM and the time where absent).

    It appears there when it is whole and was read back, or not at all. Raises ArchiveError."""
    prefix = prefix.absolute()
    python, interpreter = check_environment(prefix)
    packages = packages_of(prefix)
    now = datetime.datetime.now(datetime.UTC)
    name = name or f"{prefix.name}-{packages.get('vllm', 'no-vllm')}-{now:%Y%m%dT%H%M%SZ}"
    if not _NAME.match(name):
        raise ArchiveError(f"'{name}' is no name for an archive: letters, digits and . _ + - only")
    if archives.absolute().is_relative_to(prefix):
        raise ArchiveError(f"{archives} lies within {prefix}: it would hold itself; choose a folder outside")
    with locked(archives):
        if (archives / name).exists():
            raise ArchiveError(
                f"there is an archive '{name}' already: choose another name, or remove {archives / name}"
            )
        half = archives / f"{PARTIAL}{name}"
        with explained(f"archiving {prefix} into {archives}", half):
            half.mkdir()
            entries, packed, digest = _pack(prefix, half / CONTENT, progress)
            manifest = Manifest(
                name=name,
                prefix=str(prefix),
                created_at=now.isoformat(timespec="seconds"),
                python=python,
                interpreter=interpreter,
                packages=packages,
                scripts=scripts_of(prefix),
                size_bytes=sum(entry.size_bytes for entry in entries),
                packed_bytes=packed,
                packed_digest=digest,
                entries=entries,
            )
            manifest.write(half)
            verify(half)
            sync_folder(half)
            half.rename(archives / name)
            sync_folder(archives)
    return manifest


def list_archives(archives: Path) -> list[tuple[str, Manifest | str]]:
    """Every archive by name: what it holds, or in words why it cannot be used. The newest first."""
    if not archives.is_dir():
        return []
    found: list[tuple[str, Manifest | str]] = []
    for folder in sorted(archives.iterdir()):
        if folder.is_dir() and not folder.name.startswith("."):
            try:
                found.append((folder.name, read_manifest(folder)))
            except ArchiveError as e:
                found.append((folder.name, str(e)))
    return sorted(found, key=lambda one: one[1].created_at if isinstance(one[1], Manifest) else "", reverse=True)


def verify(folder: Path) -> Manifest:
    """Read an archive back and compare every byte with its manifest. Raises ArchiveError."""
    manifest = read_manifest(folder)
    known = {entry.path: entry for entry in manifest.entries}
    with opened(folder, manifest) as tar:
        for member in tar:
            entry = known.pop(member.name, None)
            if entry is None or read_entry(tar, member) != entry:
                raise ArchiveError(f"{folder}: '{member.name}' is not what was archived: it is damaged")
    if known:
        raise ArchiveError(f"{folder}: lacks {len(known)} of its files, as '{min(known)}': it is damaged")
    return manifest


@contextlib.contextmanager
def opened(folder: Path, manifest: Manifest) -> Iterator[tarfile.TarFile]:
    """The archive's files, as a stream. Raises ArchiveError where it is not the one that the manifest tells of."""
    try:
        with (folder / CONTENT).open("rb") as file:
            if digest_of(file) != manifest.packed_digest:
                raise ArchiveError(f"{folder / CONTENT}: is not what was archived: it is damaged")
            file.seek(0)
            with (
                zstandard.ZstdDecompressor().stream_reader(file) as plain,
                tarfile.open(fileobj=plain, mode="r|") as tar,
            ):
                yield tar
    except (OSError, zstandard.ZstdError, tarfile.TarError) as e:
        raise ArchiveError(f"{folder / CONTENT}: cannot be read ({e})") from None


def read_entry(tar: tarfile.TarFile, member: tarfile.TarInfo) -> Entry:
    """A member of an archive as its manifest would tell of it."""
    if member.issym():
        return Entry(member.name, "link", 0, 0, member.linkname)
    if member.isdir():
        return Entry(member.name, "folder", member.mode)
    content = tar.extractfile(member)
    if content is None:
        raise ArchiveError(f"'{member.name}' in the archive is neither file, link nor folder")
    return Entry(member.name, "file", member.mode, member.size, digest_of(content))  # type: ignore[arg-type] # typeshed: IO[bytes]


@contextlib.contextmanager
def locked(archives: Path) -> Iterator[None]:
    """One command at a time; what a killed one left behind is removed. Raises ArchiveError."""
    try:
        archives.mkdir(parents=True, exist_ok=True)
        lock = (archives / ".lock").open("w")
    except OSError as e:
        raise ArchiveError(f"{archives}: {e.strerror}: choose another folder with --archives") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ArchiveError(f"another command archives or restores in {archives} right now: wait for it") from None
        for half in archives.glob(f"{PARTIAL}*"):
            shutil.rmtree(half, ignore_errors=True)
        yield


@contextlib.contextmanager
def explained(doing: str, half: Path) -> Iterator[None]:
    """Errors of the system in words, and nothing half done is left."""
    try:
        yield
    except BaseException as e:
        shutil.rmtree(half, ignore_errors=True)
        if isinstance(e, OSError):
            raise ArchiveError(
                f"{doing}: {e.strerror or e} ({e.filename or half}): make room, or mend the rights"
            ) from None
        raise


def _pack(prefix: Path, target: Path, progress: Progress) -> tuple[tuple[Entry, ...], int, str]:
    """Write the tar. Returns what is in it, its bytes and its digest."""
    entries: list[Entry] = []
    done = 0
    with target.open("wb") as file:
        packer = zstandard.ZstdCompressor(level=LEVEL, threads=-1)
        with packer.stream_writer(file, closefd=False) as plain, tarfile.open(fileobj=plain, mode="w|") as tar:
            for path in walk(prefix):
                entry = _add(tar, path, path.relative_to(prefix).as_posix())
                entries.append(entry)
                done += entry.size_bytes
                progress(done)
        file.flush()
        os.fsync(file.fileno())
    with target.open("rb") as file:
        return tuple(entries), target.stat().st_size, digest_of(file)


def _add(tar: tarfile.TarFile, path: Path, name: str) -> Entry:
    status = path.lstat()
    kind = kind_of(path, status)
    info = tarfile.TarInfo(name)
    info.mode, info.mtime = status.st_mode & 0o7777, int(status.st_mtime)
    if kind == "link":
        info.type, info.linkname = tarfile.SYMTYPE, os.readlink(path)
        info.mode = 0
        tar.addfile(info)
        return Entry(name, kind, 0, 0, info.linkname)
    if kind == "folder":
        info.type = tarfile.DIRTYPE
        tar.addfile(info)
        return Entry(name, kind, info.mode)
    info.size = status.st_size
    with path.open("rb") as file:
        hashing = _Hashing(file)
        tar.addfile(info, hashing)
        if hashing.size_bytes != info.size or file.read(1):
            raise ArchiveError(f"{path}: changed while it was archived: stop what installs there, and try again")
    return Entry(name, kind, info.mode, info.size, hashing.digest)


class _Hashing:
    """A file that is hashed as it is read."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._made: Any = hashlib.sha256()
        self.size_bytes = 0

    def read(self, size: int = -1) -> bytes:
        chunk = self._file.read(size)
        self._made.update(chunk)
        self.size_bytes += len(chunk)
        return chunk

    @property
    def digest(self) -> str:
        return str(self._made.hexdigest())
