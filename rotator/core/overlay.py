"""Whether an engine's workers run the files of the overlay bundle that they are said to run."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BundledFile:
    """One file of a bundle's manifest; hashes are SHA-256 in hexadecimal. ``mark`` is what its code bears in memory."""

    path: str
    sha256: str
    mark: str


@dataclass(frozen=True, slots=True)
class RunFile:
    """What one worker says of one file. ``mark`` is None where the code in memory bears none, and means nothing where
    that process has not ``loaded`` it."""

    path: str
    file: str
    sha256: str
    loaded: bool = False
    mark: str | None = None


def strangers(bundle: Iterable[BundledFile], ranks: Iterable[Iterable[RunFile]]) -> tuple[str, ...]:
    """What is not as the bundle has it, a line each; empty if every rank runs every file of it."""
    wanted = tuple(bundle)
    found = []
    for number, rank in enumerate(ranks):
        told = {item.path: item for item in rank}
        for item in wanted:
            if wrong := _difference(item, told.get(item.path)):
                found.append(f"rank {number}: {item.path}: {wrong}")  # noqa: PERF401 - a loop in a loop reads better
    return tuple(found)


def _difference(item: BundledFile, told: RunFile | None) -> str:
    if told is None:
        return "it does not tell which file it runs"
    if told.sha256 != item.sha256:
        return (
            f"it runs {told.file or 'no file'} with SHA-256 {told.sha256 or 'unknown'}, not the bundle's {item.sha256}"
        )
    if told.loaded and told.mark != item.mark:
        return f"{told.file} is the bundle's, but the code in memory is not from it"
    return ""
