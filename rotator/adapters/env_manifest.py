"""What an archive of a Python environment holds, in a file beside it: every path with its hash, and what it is."""

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, BinaryIO

from rotator.ports import ArchiveError

FORMAT = 1
MANIFEST, CONTENT = "manifest.json", "files.tar.zst"
CHUNK_BYTES = 1 << 20
_SKIPPED = "__pycache__"  # made again from what is there


@dataclass(frozen=True, slots=True)
class Entry:
    """One path below the prefix. ``kind`` is file, link or folder; ``digest`` a file's SHA-256, or a link's target."""

    path: str
    kind: str
    mode: int
    size_bytes: int = 0
    digest: str = ""


@dataclass(frozen=True, slots=True)
class Manifest:
    """``scripts`` are programs in bin that start with a line naming this environment's own interpreter."""

    name: str
    prefix: str
    created_at: str
    python: str
    interpreter: str
    packages: Mapping[str, str]
    scripts: tuple[str, ...]
    size_bytes: int
    packed_bytes: int
    packed_digest: str
    entries: tuple[Entry, ...]
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        text = json.dumps(asdict(self), separators=(",", ":"))
        write_whole(folder / MANIFEST, text.encode())


def read_manifest(folder: Path) -> Manifest:
    """Raises ArchiveError for what is no archive, or one of a newer release."""
    try:
        told: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        if told["format"] != FORMAT:
            raise ArchiveError(f"{folder}: made by a newer release (format {told['format']}): restore it with that one")
        entries = tuple(Entry(**entry) for entry in told.pop("entries"))
        return Manifest(**{**told, "scripts": tuple(told["scripts"])}, entries=entries)
    except FileNotFoundError:
        raise ArchiveError(f"{folder}: holds no {MANIFEST}: see `rotator env list`") from None
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ArchiveError(f"{folder}: its {MANIFEST} cannot be read ({e}): it is damaged") from None


def check_environment(prefix: Path) -> tuple[str, str]:
    """The environment's Python version and its base interpreter. Raises ArchiveError for a folder that is no
    environment of its own, with what to do."""
    if not prefix.is_dir():
        raise ArchiveError(f"{prefix}: there is no such folder: give the environment's prefix, as /opt/vllm")
    python = prefix / "bin/python"
    if not (prefix / "pyvenv.cfg").is_file() and not (prefix / "conda-meta").is_dir():
        raise ArchiveError(
            f"{prefix}: is no virtual environment (it has no pyvenv.cfg): what it shares with the system cannot be "
            "put back as a whole; install vLLM into an environment of its own: python3 -m venv /opt/vllm"
        )
    if not python.exists():
        raise ArchiveError(f"{prefix}: its interpreter bin/python leads nowhere: it is broken already")
    return python_version(prefix), os.path.realpath(python)


def python_version(prefix: Path) -> str:
    """By its own library folders, without running it: 3.12."""
    found = sorted(path.name.removeprefix("python") for path in prefix.glob("lib/python3.*"))
    if not found:
        raise ArchiveError(f"{prefix}: has no lib/python3.*: it is no Python environment")
    return found[-1]


def packages_of(prefix: Path) -> dict[str, str]:
    places = [str(p) for p in sorted(prefix.glob("lib/python3*/site-packages"))]
    return {str(d.metadata["Name"]): d.version for d in distributions(path=places) if d.metadata["Name"]}


def scripts_of(prefix: Path) -> tuple[str, ...]:
    found = []
    for path in sorted((prefix / "bin").iterdir()):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                first = file.readline(4096)
            if first.startswith(f"#!{prefix}/bin/".encode()):
                found.append(path.name)
    return tuple(found)


def walk(prefix: Path) -> Iterator[Path]:
    """Every path below, folders before what is in them, in an order that does not change. Raises ArchiveError."""

    def failed(error: OSError) -> None:
        raise ArchiveError(f"{error.filename}: cannot be read ({error.strerror}): run as the user it belongs to")

    for folder, folders, files in os.walk(prefix, onerror=failed):
        folders[:] = sorted(name for name in folders if name != _SKIPPED)
        yield from (Path(folder) / name for name in sorted([*folders, *files]))


def kind_of(path: Path, status: os.stat_result) -> str:
    """Raises ArchiveError for what is neither file nor link nor folder."""
    if stat.S_ISLNK(status.st_mode):
        return "link"
    if stat.S_ISDIR(status.st_mode):
        return "folder"
    if stat.S_ISREG(status.st_mode):
        return "file"
    raise ArchiveError(f"{path}: is neither file, link nor folder: an environment holds none of that; remove it")


def digest_of(file: BinaryIO) -> str:
    made = hashlib.sha256()
    while chunk := file.read(CHUNK_BYTES):
        made.update(chunk)
    return made.hexdigest()


def write_whole(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
