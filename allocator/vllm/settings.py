"""The plugin's settings, all from the environment, which vLLM hands to every worker.

docs/allocator-vllm.md has the table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from allocator.errors import PluginRefused

_TRUE, _FALSE = ("1", "true", "on", "yes"), ("0", "false", "off", "no")


@dataclass(frozen=True, slots=True)
class Settings:
    enabled: bool = True
    prepare: bool = True
    host_budget_bytes: int | None = None
    spill_dir: Path | None = None
    slab_bytes: int | None = None
    budget_file: Path | None = None
    link_share: float | None = None
    trim: bool = True
    pack: bool = True

    def allocator_arguments(self) -> dict[str, Any]:
        """Keyword arguments of `allocator.Allocator`: only what was set, so that its own defaults hold."""
        given = {
            "host_budget_bytes": self.host_budget_bytes,
            "spill_dir": self.spill_dir,
            "slab_bytes": self.slab_bytes,
            "budget_file": self.budget_file,
            "link_share": self.link_share,
            "pack": None if self.pack else False,
        }
        return {name: value for name, value in given.items() if value is not None}


def from_environment(environ: Mapping[str, str]) -> Settings:
    """Raises PluginRefused for a value that is none: a typing error must not switch a safety off."""
    return Settings(
        enabled=_flag(environ, "ROTATOR_ALLOCATOR"),
        prepare=_flag(environ, "ROTATOR_ALLOCATOR_PREPARE"),
        host_budget_bytes=_size(environ, "ROTATOR_ALLOCATOR_HOST_GIB", 1 << 30),
        spill_dir=_path(environ, "ROTATOR_ALLOCATOR_SPILL_DIR", Path.is_dir, "directory"),
        slab_bytes=_size(environ, "ROTATOR_ALLOCATOR_SLAB_MIB", 1 << 20),
        budget_file=_path(environ, "ROTATOR_ALLOCATOR_BUDGET_FILE", Path.is_file, "file"),
        link_share=_share(environ, "ROTATOR_ALLOCATOR_LINK_SHARE"),
        trim=_flag(environ, "ROTATOR_ALLOCATOR_TRIM"),
        pack=_flag(environ, "ROTATOR_ALLOCATOR_PACK"),
    )


def _flag(environ: Mapping[str, str], name: str) -> bool:
    value = environ.get(name, "").strip().lower()
    if value in _FALSE:
        return False
    if value in _TRUE or not value:
        return True
    raise PluginRefused(f"{name}={environ[name]} is neither on nor off")


def _path(environ: Mapping[str, str], name: str, exists: Callable[[Path], bool], kind: str) -> Path | None:
    value = environ.get(name, "").strip()
    if not value:
        return None
    if not exists(Path(value)):
        raise PluginRefused(f"{name}={value} is no {kind}: create it, or unset the variable")
    return Path(value)


def _share(environ: Mapping[str, str], name: str) -> float | None:
    value = environ.get(name, "").strip()
    if not value:
        return None
    try:
        share = float(value)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise PluginRefused(f"{name}={value} is no share: give a number above 0 and up to 1, or unset it")
    return share


def _size(environ: Mapping[str, str], name: str, unit_bytes: int) -> int | None:
    value = environ.get(name, "").strip()
    if not value:
        return None
    try:
        nbytes = int(float(value) * unit_bytes)
    except (ValueError, OverflowError):
        nbytes = 0
    if nbytes <= 0:
        raise PluginRefused(f"{name}={value} is no size: give a positive number, or unset it")
    return nbytes
