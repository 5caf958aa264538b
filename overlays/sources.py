"""Where vLLM's files come from: a folder, a wheel, the package index, or memory. All are only ever read.

Paths are spelt from the package's own root, "vllm/device_allocator/cumem.py", wherever the package lies: site-packages,
/opt/vllm of an image's tree, a wheel.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from email.parser import HeaderParser
from pathlib import Path
from typing import Protocol

from overlays.errors import SourceError

_VERSION = re.compile(rb"""^\s*(?:__version__|version)\b[^'"\n]*['"]([^'"\n]+)['"]""", re.MULTILINE)


class Source(Protocol):
    """One build of vLLM."""

    @property
    def name(self) -> str:
        """For people: where it came from."""

    @property
    def version(self) -> str:
        """As it says of itself; "" if it says nothing."""

    def paths(self) -> tuple[str, ...]:
        """Every file of the package, sorted."""

    def read(self, path: str) -> bytes | None:
        """One file; None if there is none. Raises SourceError if it exists and cannot be read."""


class Memory:
    """Files that are given, for tests."""

    def __init__(self, files: Mapping[str, bytes | str], version: str = "", name: str = "memory") -> None:
        self._files = {path: data.encode() if isinstance(data, str) else data for path, data in files.items()}
        self.version = version
        self.name = name

    def paths(self) -> tuple[str, ...]:
        return tuple(sorted(self._files))

    def read(self, path: str) -> bytes | None:
        return self._files.get(path)


class Tree:
    """A folder that holds the package `vllm`, or is that package: site-packages, an extracted image, a checkout."""

    def __init__(self, folder: Path) -> None:
        self.package = _find_package(folder)
        self.name = str(self.package)
        self.version = _folder_version(self.package)

    def paths(self) -> tuple[str, ...]:
        found = (path for path in self.package.rglob("*.py") if path.is_file())
        return tuple(sorted(f"vllm/{path.relative_to(self.package).as_posix()}" for path in found))

    def read(self, path: str) -> bytes | None:
        file = self.package / path.removeprefix("vllm/")
        try:
            return file.read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        except OSError as error:
            raise SourceError(f"cannot read {file}: {error.strerror}; is this user allowed to?") from None


class Archive:
    """A wheel, as a zip file that may be remote: members are read one by one."""

    def __init__(self, archive: zipfile.ZipFile, name: str) -> None:
        self._archive = archive
        self._members = frozenset(archive.namelist())
        self.name = name
        self.version = self._metadata_version()

    def paths(self) -> tuple[str, ...]:
        return tuple(sorted(name for name in self._members if name.startswith("vllm/") and name.endswith(".py")))

    def read(self, path: str) -> bytes | None:
        if path not in self._members:
            return None
        try:
            return self._archive.read(path)
        except Exception as error:  # a remote one raises what its transport raises
            raise SourceError(f"cannot read {path} of {self.name}: {error}") from None

    def checksums(self) -> dict[str, int]:
        """CRC-32 of each of the package's files, from the archive's directory."""
        return {path: self._archive.getinfo(path).CRC for path in self.paths()}

    def close(self) -> None:
        self._archive.close()

    def _metadata_version(self) -> str:
        for name in self._members:
            if re.fullmatch(r"vllm-[^/]+\.dist-info/METADATA", name):
                return _metadata_version(self._archive.read(name))
        return _stated_version(self.read("vllm/_version.py") or b"")


def open_wheel(path: Path) -> Archive:
    """A wheel file on this machine. Raises SourceError."""
    try:
        return Archive(zipfile.ZipFile(path), str(path))
    except (zipfile.BadZipFile, OSError) as error:
        raise SourceError(f"{path} is no wheel that can be read: {error}") from None


def _find_package(folder: Path) -> Path:
    """The folder of the package: `folder` itself, `folder/vllm`, or the only `vllm/__init__.py` beneath it."""
    for candidate in (folder, folder / "vllm", folder / "vllm" / "vllm"):
        if _is_package(candidate):
            return candidate.resolve()
    if not folder.is_dir():
        raise SourceError(f"{folder} is no folder")
    found = [path for path in folder.rglob("vllm") if _is_package(path)]
    if len(found) == 1:
        return found[0].resolve()
    if not found:
        raise SourceError(f"there is no vLLM under {folder}: no vllm/__init__.py with its version beside it")
    places = ", ".join(str(path.relative_to(folder)) for path in sorted(found))
    raise SourceError(f"there are several vLLM under {folder}: {places}; name the one that the engine loads")


def _is_package(folder: Path) -> bool:
    return folder.name == "vllm" and (folder / "__init__.py").is_file() and (folder / "device_allocator").is_dir()


def _folder_version(package: Path) -> str:
    for metadata in sorted(package.parent.glob("vllm-*.dist-info/METADATA")):
        return _metadata_version(metadata.read_bytes())
    for name in ("_version.py", "version.py"):
        if (package / name).is_file() and (version := _stated_version((package / name).read_bytes())):
            return version
    return ""


def _metadata_version(data: bytes) -> str:
    return HeaderParser().parsestr(data.decode(errors="replace")).get("Version", "")


def _stated_version(data: bytes) -> str:
    match = _VERSION.search(data)
    return match[1].decode() if match else ""
