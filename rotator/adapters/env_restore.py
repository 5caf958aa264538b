"""Putting an archived Python environment back: made whole beside the one in place, then exchanged with it."""

import ctypes
import errno
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

from rotator.adapters.env_archive import Progress, explained, locked, opened, read_entry
from rotator.adapters.env_manifest import Entry, Manifest, digest_of, python_version, read_manifest, sync_folder
from rotator.ports import ArchiveError

STAGING, REPLACED = ".rotator-restoring", ".rotator-replaced"
RUN_S = 60.0
ROOM_MARGIN = 1.05  # folders and block sizes
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def restore(archives: Path, name: str, *, even_in_use: bool = False, progress: Progress = lambda _: None) -> Manifest:
    """Put the archive back where it came from. At every instant the old environment is there whole, or the new one.

    Raises ArchiveError."""
    folder = archives / name
    if not folder.is_dir() or name.startswith(".") or "/" in name:
        raise ArchiveError(f"there is no archive '{name}' in {archives}: see `rotator env list`")
    manifest = read_manifest(folder)
    prefix = Path(manifest.prefix)
    _check_interpreter(manifest)
    if (users := users_of(prefix)) and not even_in_use:
        raise ArchiveError(
            f"{prefix} is in use by {', '.join(users[:8])}: stop what runs there, or restore with --even-in-use "
            "(it goes on with what it has loaded)"
        )
    with locked(archives):
        staging, replaced = (prefix.with_name(prefix.name + end) for end in (STAGING, REPLACED))
        _clean(staging, replaced)
        _check_room(prefix, manifest)
        with explained(f"restoring {prefix}", staging):
            staging.mkdir(mode=0o755)
            _unpack(folder, manifest, staging, progress)
            _check_whole(manifest, staging)
            sync_folder(staging)
            _put_in_place(staging, prefix)
        _clean(staging, replaced)
    return manifest


def users_of(prefix: Path) -> list[str]:
    """Processes whose command line names a program in the environment, as ``pid (name)``; never our own."""
    found = []
    mark = f"{prefix}/".encode()
    for pid in sorted(int(n) for n in os.listdir("/proc") if n.isdecimal()):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            name = Path(f"/proc/{pid}/comm").read_text().strip()
        except OSError:
            continue
        if pid != os.getpid() and any(word.startswith(mark) for word in words[:2]):
            found.append(f"{pid} ({name})")
    return found


def _check_interpreter(manifest: Manifest) -> None:
    interpreter = Path(manifest.interpreter)
    inside = interpreter.is_relative_to(manifest.prefix)  # a conda environment brings its own
    if not inside and not interpreter.exists():
        raise ArchiveError(
            f"the archive needs {interpreter} (Python {manifest.python}), which is no longer there: install it again"
        )


def _check_room(prefix: Path, manifest: Manifest) -> None:
    try:
        free = shutil.disk_usage(prefix.parent).free
    except OSError as e:
        raise ArchiveError(f"{prefix.parent}: {e.strerror}: make the folder that the environment was in") from None
    needed = int(manifest.size_bytes * ROOM_MARGIN)
    if free < needed:
        raise ArchiveError(
            f"{prefix.parent}: {needed >> 20} MiB are needed beside the environment in place and {free >> 20} MiB are "
            "free: make room"
        )


def _unpack(folder: Path, manifest: Manifest, staging: Path, progress: Progress) -> None:
    known = {entry.path: entry for entry in manifest.entries}
    folders: list[tuple[Path, int]] = []
    done = 0
    with opened(folder, manifest) as tar:
        for member in tar:
            entry = known.pop(member.name, None)
            target = staging / member.name
            if entry is None or not _is_below(member.name):
                raise ArchiveError(f"{folder}: '{member.name}' is not in its manifest: it is damaged")
            _make(tar, member, entry, target, folders)
            done += entry.size_bytes
            progress(done)
    if known:
        raise ArchiveError(f"{folder}: lacks {len(known)} of its files, as '{min(known)}': it is damaged")
    for path, mode in reversed(folders):  # last: a folder may forbid writing
        path.chmod(mode)


def _make(
    tar: tarfile.TarFile, member: tarfile.TarInfo, entry: Entry, target: Path, folders: list[tuple[Path, int]]
) -> None:
    if entry.kind == "file":
        content = tar.extractfile(member)
        if content is None:
            raise ArchiveError(f"'{entry.path}' is no file in the archive: it is damaged")
        with target.open("wb") as file:
            shutil.copyfileobj(content, file, 1 << 20)
            file.flush()
            os.fsync(file.fileno())
        target.chmod(entry.mode)
        os.utime(target, (member.mtime, member.mtime))
        return
    if read_entry(tar, member) != entry:
        raise ArchiveError(f"'{entry.path}' is not what was archived: it is damaged")
    if entry.kind == "link":
        target.symlink_to(entry.digest)
    else:
        target.mkdir()
        folders.append((target, entry.mode))


def _check_whole(manifest: Manifest, staging: Path) -> None:
    """What was written is read back, and entry points are there: the environment would start."""
    for entry in manifest.entries:
        if entry.kind == "file":
            with (staging / entry.path).open("rb") as file:
                if digest_of(file) != entry.digest:
                    raise ArchiveError(f"'{entry.path}' was not written as it was archived: is the disk well?")
    if python_version(staging) != manifest.python:
        raise ArchiveError(f"the archive holds Python {python_version(staging)}, not {manifest.python}: it is damaged")
    _check_runs(manifest, staging)
    for script in manifest.scripts:
        if not os.access(staging / "bin" / script, os.X_OK):
            raise ArchiveError(f"the archive lacks the program bin/{script}: it is damaged")


def _check_runs(manifest: Manifest, staging: Path) -> None:
    """Its interpreter starts and is of the version that everything here was built for."""
    program = "import sys; print('%d.%d' % sys.version_info[:2])"
    try:
        told = subprocess.run(
            [staging / "bin/python", "-I", "-S", "-c", program],
            capture_output=True,
            text=True,
            timeout=RUN_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as e:
        raise ArchiveError(f"the archive's interpreter {manifest.interpreter} does not run: {e}") from None
    if told.stdout.strip() != manifest.python:
        raise ArchiveError(
            f"{manifest.interpreter} is no longer Python {manifest.python} (it says "
            f"'{(told.stdout or told.stderr).strip()[:200]}'): install that version again"
        )


def _put_in_place(staging: Path, prefix: Path) -> None:
    if not prefix.exists():
        staging.rename(prefix)
    elif (number := _exchange(staging, prefix)) != 0:
        raise ArchiveError(
            f"{prefix}: this file system cannot exchange two folders in one step ({os.strerror(number)}): move the one "
            f"in place away (mv {prefix} {prefix}.old) and restore again"
        )
    else:
        staging.rename(prefix.with_name(prefix.name + REPLACED))
    sync_folder(prefix.parent)


def _exchange(one: Path, other: Path) -> int:
    """Swap two names atomically. Returns 0, or the system's error number."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return errno.ENOSYS
    paths = os.fsencode(one), os.fsencode(other)
    failed = libc.renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE)
    return ctypes.get_errno() if failed else 0


def _clean(staging: Path, replaced: Path) -> None:
    """What a killed restore left: a half-made one, or the one that was replaced."""
    for path in (staging, replaced):
        if path.is_dir():
            _make_writable(path)
            shutil.rmtree(path, ignore_errors=True)


def _make_writable(path: Path) -> None:
    for folder, _, _ in os.walk(path):
        os.chmod(folder, 0o700)


def _is_below(name: str) -> bool:
    return not name.startswith("/") and ".." not in name.split("/")
