"""Every patch over every release: what it does there, from real wheels."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from overlays.build import Outcome, Result, apply_all
from overlays.index import CachedWheel, Index
from overlays.patch import Patch

FIRST, LAST = "0.19.1", "0.33.0"


@dataclass(frozen=True, slots=True)
class Column:
    """One release and what became of each patch on it."""

    version: str
    wheel: str
    outcomes: tuple[Outcome, ...]


def run(index: Index, patches: Sequence[Patch], versions: Iterable[str], told: Callable[[str], None]) -> list[Column]:
    """Each release in turn; `told` hears of each before it starts. Raises SourceError."""
    columns = []
    for version in versions:
        told(version)
        wheel: CachedWheel = index.open(version)
        try:
            outcomes = apply_all(wheel, patches).outcomes
        finally:
            wheel.close()
        columns.append(Column(version, wheel.name, tuple(outcomes)))
    return columns


def failures(columns: Sequence[Column]) -> list[str]:
    return [
        f"{column.version}: {outcome.patch}: {outcome.reason}"
        for column in columns
        for outcome in column.outcomes
        if outcome.result is Result.FAILED
    ]


def as_json(columns: Sequence[Column]) -> list[dict[str, object]]:
    return [
        {
            "version": column.version,
            "wheel": column.wheel,
            "patches": {
                outcome.patch: {"result": outcome.result.value, "reason": outcome.reason, "paths": outcome.paths}
                for outcome in column.outcomes
            },
        }
        for column in columns
    ]


def markdown(columns: Sequence[Column], patches: Sequence[Patch], on: datetime.date, machine: str) -> str:
    """The page docs/overlays-matrix.md."""
    names = [patch.name for patch in patches]
    failed = len(failures(columns))
    lines = [
        "# Patches over releases",
        "",
        f"Made by `python -m overlays matrix --markdown` on {on.isoformat()} ({machine}) from the released wheels.",
        f"{len(names)} patches over {len(columns)} releases, {failed} failed.",
        "What a patch is for, and when it may go, is in [overlays.md](overlays.md).",
        "",
        "| release | " + " | ".join(names) + " |",
        "|" + "---|" * (len(names) + 1),
    ]
    for column in columns:
        cells = {outcome.patch: outcome.result.value for outcome in column.outcomes}
        lines.append(f"| {column.version} | " + " | ".join(cells[name] for name in names) + " |")
    lines += [
        "",
        "- **applied**: the probe found the bug in the release's own file and not in the patched one.",
        "- **upstream**: the probe finds no bug in the release's own file, which stays as it is.",
        "- **not applicable**: the release lacks what the patch is about, or lies outside its range.",
        "- **failed**: the code is not as the patch knows it, or the bug is still there.",
        "",
        "## What the probes saw",
        "",
    ]
    for name in names:
        lines += [f"### {name}", ""]
        lines += [f"- {versions}: {text}" for text, versions in _grouped(columns, name)]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _grouped(columns: Sequence[Column], name: str) -> list[tuple[str, str]]:
    """Evidence -> the releases that gave it, as runs of neighbours."""
    runs: list[tuple[str, list[str]]] = []
    for column in columns:
        for outcome in column.outcomes:
            if outcome.patch != name:
                continue
            reason = "outside the patch's releases" if " is outside " in outcome.reason else outcome.reason
            text = f"{outcome.result.value}; {reason}"
            if runs and runs[-1][0] == text:
                runs[-1][1].append(column.version)
            else:
                runs.append((text, [column.version]))
    return [(text, found[0] if len(found) == 1 else f"{found[0]} to {found[-1]}") for text, found in runs]
