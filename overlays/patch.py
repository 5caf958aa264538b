"""What a patch is: what it is about, why, when it may go, its edit, and the probe that decides.

Each module in `overlays/patches` has one patch as its `PATCH`; there is no list to edit.
"""

from __future__ import annotations

import ast
import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from overlays.probing import ProbeModule
from overlays.source import Source


class Finding(enum.StrEnum):
    BUG = "bug"
    FIXED = "fixed"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a probe saw, with its evidence in one line."""

    finding: Finding
    evidence: str


def bug(evidence: str) -> Verdict:
    return Verdict(Finding.BUG, evidence)


def fixed(evidence: str) -> Verdict:
    return Verdict(Finding.FIXED, evidence)


def unknown(evidence: str) -> Verdict:
    """The probe could not tell. Before the edit that fails the patch, and after it as well."""
    return Verdict(Finding.UNKNOWN, evidence)


@dataclass(frozen=True, slots=True)
class Target:
    """One file that a patch is about.

    `paths` are tried in order ("vllm/device_allocator/cumem.py"; the root package is always spelt `vllm`). The first
    that exists and that `shape` takes is the file. If none does, all files that match a pattern in `search` and contain
    `needle` are parsed, and the only one that `shape` takes is the file: that is how moved code is found.
    """

    paths: tuple[str, ...]
    shape: Callable[[ast.Module], bool] = field(default=lambda tree: True)
    search: tuple[str, ...] = ()
    needle: bytes = b""


class Files(Protocol):
    """What edits and probes see of a build: its targets as they are now, and everything else of it, read-only."""

    @property
    def version(self) -> str:
        """As the build says of itself; forks and nightlies say many things."""

    def source(self, target: str) -> Source:
        """The target's file under edit (edits only)."""

    def add(self, path: str, text: str) -> None:
        """A new file in the bundle, at a path that the build does not have (edits only)."""

    def path(self, target: str) -> str:
        """Where the target was found."""

    def read(self, path: str) -> bytes | None:
        """Any file of the build, with what was changed and added so far; None if there is none."""

    def load(self, target_or_path: str, modules: Mapping[str, object] | None = None) -> ProbeModule:
        """The file executed with fakes (see overlays/probing.py): `modules` by import name; `vllm.*`, torch, triton and
        all else outside the standard library that is not in there becomes a stub that swallows everything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patch:
    name: str  # as its file, with dashes: stream-aware-free
    targets: Mapping[str, Target]
    releases: str  # PEP 440; released versions outside are "not applicable" without a look
    why: str  # what breaks without it, for an operator
    drop_when: str  # what must be true for this file to be deleted
    upstream: tuple[str, ...]  # vLLM's own numbers: "vLLM #43020"
    required: bool  # if it fails, there is no bundle
    edit: Callable[[Files], None]
    probe: Callable[[Files], Verdict]
    opt_in: bool = False  # in bundles only if asked for by name
    after: tuple[str, ...] = ()  # names of patches that are edited in before, if they are there
    optional_in: str = ""  # PEP 440; there a missing target is "not applicable", elsewhere within `releases` it fails
