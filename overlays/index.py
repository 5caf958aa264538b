"""Released wheels on a package index: listed, and single files of them read by HTTP range, kept in a folder.

The index is the one that pip uses here (PIP_INDEX_URL, or pip's configuration), else pypi.org.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any, Self

import platformdirs
import requests
from packaging.version import InvalidVersion, Version
from pypi_simple import DistributionPackage, PyPISimple
from remotezip import RangeNotSupported, RemoteIOError, RemoteZip

from overlays.errors import SourceError, reason
from overlays.sources import Archive

DEFAULT_INDEX = "https://pypi.org/simple"
ARCHITECTURES = ("x86_64", "aarch64")
TIMEOUT_S = (10.0, 60.0)  # to connect, between two bytes
_TAG = re.compile(r"^(?P<name>[^-]+)-(?P<version>[^-]+)(-(?P<build>\d[^-]*))?-[^-]+-[^-]+-(?P<platform>[^-]+)\.whl$")


def pip_index() -> str:
    """The index that pip is configured for, else pypi.org. PIP_INDEX_URL wins, as with pip."""
    if url := os.environ.get("PIP_INDEX_URL"):
        return url
    asked = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
    try:
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return DEFAULT_INDEX
    return answer.stdout.strip() or DEFAULT_INDEX


def cache_folder() -> Path:
    return Path(platformdirs.user_cache_dir("rotator-overlays"))


class Index:
    """vLLM's releases on one index. Use as a context manager."""

    def __init__(self, url: str = "", cache: Path | None = None, architecture: str = "x86_64") -> None:
        if architecture not in ARCHITECTURES:
            raise SourceError(f"there are no wheels for {architecture!r}, only for {' and '.join(ARCHITECTURES)}")
        self.url = url or pip_index()
        self.name = _plain(self.url)
        self._cache = cache or cache_folder()
        self._architecture = architecture
        self._session = _Session()
        self._wheels: dict[Version, DistributionPackage] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *args: object) -> None:
        self._session.close()

    def releases(self, first: str, last: str) -> list[Version]:
        """Released versions with a wheel, without pre-releases, in order. Raises SourceError."""
        return sorted(v for v in self._listed() if Version(first) <= v <= Version(last) and not v.is_prerelease)

    def open(self, version: str) -> CachedWheel:
        """One wheel. Raises SourceError."""
        try:
            package = self._listed()[Version(version)]
        except (KeyError, InvalidVersion):
            there = ", ".join(str(v) for v in sorted(self._listed())[-8:])
            raise SourceError(
                f"{self.name} has no wheel of vLLM {version!r} for {self._architecture}; newest: {there}"
            ) from None
        return CachedWheel(package, self._session, self._cache)

    def _listed(self) -> dict[Version, DistributionPackage]:
        if not self._wheels:
            try:
                with PyPISimple(self.url, session=self._session) as client:
                    page = client.get_project_page("vllm", timeout=TIMEOUT_S)
            except Exception as error:  # the client lets through whatever its parsers and requests raise
                raise SourceError(
                    f"cannot list vLLM on {self.name}: {_plain(reason(error))}: name another index with --index-url, "
                    "or a wheel on this machine with --wheel"
                ) from None
            self._wheels = _best(page.packages, self._architecture)
        return self._wheels


class _Session(requests.Session):
    """Trusts what pip trusts, and lets nothing hang."""

    def __init__(self) -> None:
        super().__init__()
        if certificates := os.environ.get("PIP_CERT"):
            self.verify = certificates

    def request(self, *args: Any, **kwargs: Any) -> requests.Response:
        kwargs.setdefault("timeout", TIMEOUT_S)
        return super().request(*args, **kwargs)


def _best(packages: list[DistributionPackage], architecture: str) -> dict[Version, DistributionPackage]:
    """The wheel that pip would take, of each version: the one with the highest build number."""
    best: dict[Version, tuple[int, DistributionPackage]] = {}
    for package in packages:
        tag = _TAG.match(package.filename)
        if tag is None or not tag["platform"].endswith(architecture) or "linux" not in tag["platform"]:
            continue
        try:
            version = Version(tag["version"])
        except InvalidVersion:
            continue
        number = int(re.match(r"\d+", tag["build"])[0]) if tag["build"] else 0  # type: ignore[index]
        if version not in best or number > best[version][0]:
            best[version] = (number, package)
    return {version: package for version, (_, package) in best.items()}


class CachedWheel:
    """A wheel on the index (`overlays.sources.Source`). What was read once is not fetched again.

    A kept file is believed if its CRC is still the one in the wheel's own directory, which is kept as well.
    """

    def __init__(self, package: DistributionPackage, session: requests.Session, cache: Path) -> None:
        self._url = package.url
        self._session = session
        known = package.digests.get("sha256", "")[:16]
        self._folder = cache / f"{package.filename}{'-' + known if known else ''}"
        self._archive: Archive | None = None
        self.name = package.filename
        self.version = package.version or ""
        self._listing: dict[str, int] = self._load_listing()

    def paths(self) -> tuple[str, ...]:
        return tuple(sorted(self._listing))

    def read(self, path: str) -> bytes | None:
        if path not in self._listing:
            return None
        kept = self._folder / path
        if kept.is_file() and zlib.crc32(data := kept.read_bytes()) == self._listing[path]:
            return data
        data = self._opened().read(path) or b""
        _keep(kept, data)
        return data

    def close(self) -> None:
        if self._archive is not None:
            self._archive.close()
            self._archive = None

    def _load_listing(self) -> dict[str, int]:
        kept = self._folder / "listing.json"
        try:
            listing = json.loads(kept.read_bytes())
            if isinstance(listing, dict) and listing:
                return listing
        except (OSError, ValueError):
            pass
        listing = self._opened().checksums()
        _keep(kept, json.dumps(listing).encode())
        return listing

    def _opened(self) -> Archive:
        if self._archive is None:
            try:
                self._archive = Archive(RemoteZip(self._url, session=self._session), self.name)
            except RangeNotSupported:
                raise SourceError(
                    f"the server of {self.name} answers no range requests: download the wheel and name it with --wheel"
                ) from None
            except (RemoteIOError, requests.RequestException, OSError, ValueError) as error:
                raise SourceError(f"cannot read {self.name} from the index: {_plain(reason(error))}") from None
        return self._archive


def _keep(path: Path, data: bytes) -> None:
    """Into the cache, whole or not at all; a cache that cannot be written is done without."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _plain(text: str) -> str:
    """Addresses in it without the names and passwords that they may hold."""
    return re.sub(r"//[^/@\s]+@", "//", text)
