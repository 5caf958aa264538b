"""What a bundle says of itself: `manifest.json`, whose shape the service and the jobs read without importing this.

    {"format": 1, "bundle": HASH, "tool": "overlays 0.1.0",
     "build": {"id": SHA256, "version": "0.26.0", "name": "where it came from", "files": {PATH: SHA256}},
     "files": [{"path": PATH, "source_sha256": SHA256 or null, "sha256": SHA256, "body_sha256": SHA256, "bytes": N}],
     "patches": [{"name", "required", "result", "reason", "paths", "upstream", "drop_when"}]}

PATH is spelt from the package's root, "vllm/...". A file of a bundle lies at `files/PATH` and is mounted read-only at
the same path in the folder that holds the engine's package `vllm`. `source_sha256` is null where the build has no such
file. `body_sha256` is the hash of a file without its last line, which sets `__overlay__` to that hash: so a running
module tells what it was compiled from.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from overlays.errors import BundleBroken

NAME = "manifest.json"
FILES = "files"
HASH_LENGTH = 32  # hexadecimal digits of a bundle's name
_SHA256 = r"^[0-9a-f]{64}$"
_PATH = r"^vllm/([A-Za-z0-9_]+/)*[A-Za-z0-9_]+\.py$"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BuildFacts(_Part):
    """The vLLM that a bundle is for: all that patches looked at, and a hash over the files that tell builds apart."""

    id: str = Field(pattern=_SHA256)
    version: str
    name: str
    files: dict[str, str]


class FileFacts(_Part):
    path: str = Field(pattern=_PATH)
    source_sha256: str | None = Field(pattern=_SHA256)
    sha256: str = Field(pattern=_SHA256)
    body_sha256: str = Field(pattern=_SHA256)
    bytes: int


class PatchFacts(_Part):
    name: str
    required: bool
    result: str
    reason: str
    paths: tuple[str, ...]
    upstream: tuple[str, ...]
    drop_when: str


class Manifest(_Part):
    format: Literal[1] = 1
    bundle: str
    tool: str
    build: BuildFacts
    files: tuple[FileFacts, ...]
    patches: tuple[PatchFacts, ...]

    def content_hash(self) -> str:
        """The bundle's name: of all that decides what is mounted over what; not of where the build was found."""
        patches = [(patch.name, patch.result) for patch in self.patches]
        decisive = [self.format, self.build.id, self.build.version, [f.model_dump() for f in self.files], patches]
        return hashlib.sha256(repr(decisive).encode()).hexdigest()[:HASH_LENGTH]


def read(bundle: Path) -> Manifest:
    """Raises BundleBroken."""
    try:
        return Manifest.model_validate_json((bundle / NAME).read_bytes())
    except OSError as error:
        raise BundleBroken(f"{bundle} is no bundle: {NAME}: {error.strerror}: name one that `status` lists") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BundleBroken(f"{bundle}/{NAME} is not as a bundle's: {where}: {first['msg']}") from None
