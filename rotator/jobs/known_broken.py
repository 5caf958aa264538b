"""The table of combinations that were seen to fail: read from data, asked with what is known of an engine."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import yaml
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version
from pydantic import Field, TypeAdapter

from rotator.config_base import Section
from rotator.jobs.findings import Finding
from rotator.jobs.recipe import Arch, Family, Quantization

_FILE = Path(__file__).with_name("known_broken.yaml")


class When(Section):
    """What must all hold for an entry to apply."""

    vllm: str | None = Field(default=None, description="a version specifier")
    arch: tuple[Arch, ...] = ()
    family: tuple[Family, ...] = ()
    quantization: tuple[Quantization, ...] = ()
    ranks_min: int = 1
    pipeline_min: int = 1
    level: Literal[1, 2] | None = None
    allocator: Literal["rotator", "stock"] | None = None
    overlay: bool | None = None
    has: dict[str, str | None] = Field(default={})
    lacks: dict[str, str | None] = Field(default={})


class KnownBroken(Section):
    """One entry of the table."""

    id: str
    when: When
    problem: str
    fix: str
    source: str
    severity: Literal["error", "warning"] = "error"
    at_start: bool = Field(default=False, description="it never starts like this: the doctor refuses the launch")


@dataclass(frozen=True, slots=True)
class Situation:
    """What is known of one engine; None where it is not, and then no entry that asks for it applies.

    ``settings``: arguments and environment variables by name, a bare flag with the value ''.
    """

    vllm: str | None = None
    arch: Arch | None = None
    family: Family | None = None
    quantization: Quantization | None = None
    ranks: int | None = None
    pipeline: int | None = None
    levels: tuple[int, ...] = ()
    allocator: Literal["rotator", "stock"] | None = None
    overlay: bool | None = None
    settings: Mapping[str, str] = field(default_factory=dict)


def known_broken() -> tuple[KnownBroken, ...]:
    """The whole table."""
    return TypeAdapter(tuple[KnownBroken, ...]).validate_python(yaml.safe_load(_FILE.read_text(encoding="utf-8")))


def match(situation: Situation, table: tuple[KnownBroken, ...] | None = None) -> tuple[KnownBroken, ...]:
    """The entries that apply to an engine."""
    return tuple(entry for entry in (table or known_broken()) if applies(entry.when, situation))


def applies(when: When, s: Situation) -> bool:
    """Whether everything holds that an entry asks for."""
    settings = s.settings
    return (
        (when.vllm is None or _in_range(s.vllm, when.vllm))
        and (not when.arch or s.arch in when.arch)
        and (not when.family or s.family in when.family)
        and (not when.quantization or s.quantization in when.quantization)
        and (when.ranks_min <= 1 or (s.ranks or 0) >= when.ranks_min)
        and (when.pipeline_min <= 1 or (s.pipeline or 0) >= when.pipeline_min)
        and (when.level is None or when.level in s.levels)
        and (when.allocator is None or s.allocator == when.allocator)
        and (when.overlay is None or s.overlay == when.overlay)
        and all(_holds(settings, name, value) for name, value in when.has.items())
        and not any(_holds(settings, name, value) for name, value in when.lacks.items())
    )


def found(entry: KnownBroken, place: str) -> Finding:
    """An entry that applies, as a finding."""
    is_error = entry.severity == "error"
    return Finding(f"known-broken/{entry.id}", place, entry.problem, entry.fix, entry.source, is_error)


def is_version(text: str) -> bool:
    """Whether it says which release it is."""
    try:
        Version(text)
    except InvalidVersion:
        return False
    return True


def _in_range(version: str | None, specifier: str) -> bool:
    """Nightlies count as the release that they lead to."""
    if version is None or not is_version(version):
        return False
    return SpecifierSet(specifier).contains(Version(Version(version).base_version))


def _holds(settings: Mapping[str, str], name: str, value: str | None) -> bool:
    return name in settings and (value is None or settings[name] == value)
