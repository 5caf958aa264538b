"""Patches on one build of vLLM, in memory: located, probed, edited, probed again. Nothing is written here."""

from __future__ import annotations

import ast
import contextlib
import enum
import fnmatch
import hashlib
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from overlays import probing
from overlays.errors import NotHere, ShapeUnknown
from overlays.patch import Finding, Patch, Target, Verdict
from overlays.probing import ProbeModule
from overlays.source import Source
from overlays.sources import Source as Build

SEARCHED_MAX = 400  # files parsed to find one that moved
PROBE_DEADLINE_S = 30.0  # they take milliseconds


class Result(enum.StrEnum):
    APPLIED = "applied"
    UPSTREAM = "upstream"  # the probe finds nothing wrong with the build as it came
    NOT_APPLICABLE = "not applicable"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one patch on one build, and the evidence."""

    patch: str
    required: bool
    result: Result
    reason: str
    paths: tuple[str, ...] = ()  # what it changed or added
    outside: bool = False  # nobody looked at this release


@dataclass(slots=True)
class Patched:
    """A build with patches in: `files` has what was changed or added, by path."""

    build: Build
    files: dict[str, bytes] = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def failed(self) -> tuple[Outcome, ...]:
        return tuple(outcome for outcome in self.outcomes if outcome.result is Result.FAILED)


class View:
    """What one patch sees of a build (`overlays.patch.Files`)."""

    def __init__(self, build: Build, changed: Mapping[str, bytes], located: Mapping[str, str]) -> None:
        self._build = build
        self._changed = changed
        self._located = located
        self._sources: dict[str, Source] = {}
        self._added: dict[str, bytes] = {}

    @property
    def version(self) -> str:
        return self._build.version

    def path(self, target: str) -> str:
        return self._located[target]

    def read(self, path: str) -> bytes | None:
        for place in (self._added, self._changed):
            if path in place:
                return place[path]
        return self._build.read(path)

    def source(self, target: str) -> Source:
        path = self.path(target)
        if path not in self._sources:
            self._sources[path] = Source(path, self._existing(path))
        return self._sources[path]

    def add(self, path: str, text: str) -> None:
        if self.read(path) is not None:
            raise ShapeUnknown(f"{path}, which the patch would add, exists")
        data = text.encode()
        compile(data, path, "exec", dont_inherit=True)
        self._added[path] = data

    def load(self, target_or_path: str, modules: Mapping[str, object] | None = None) -> ProbeModule:
        path = self._located.get(target_or_path, target_or_path)
        return probing.load(self._existing(path), path, modules)

    def _existing(self, path: str) -> bytes:
        data = self.read(path)
        if data is None:
            raise NotHere(f"this build has no {path}")
        return data

    def result(self) -> dict[str, bytes]:
        """Every file that was changed or added. Raises ShapeUnknown."""
        edited = {path: source.result() for path, source in self._sources.items() if source.changed}
        return {**edited, **self._added}


def apply_all(build: Build, patches: Sequence[Patch]) -> Patched:
    """All patches, in the given order; at the end each is probed once more on what came of all together."""
    patched = Patched(build)
    for patch in patches:
        outcome, files = _apply(build, patch, patched.files)
        patched.files.update(files)
        patched.outcomes.append(outcome)
    by_name = {patch.name: patch for patch in patches}
    for index, outcome in enumerate(patched.outcomes):
        if outcome.result in (Result.APPLIED, Result.UPSTREAM):
            patched.outcomes[index] = _still_good(build, by_name[outcome.patch], patched.files, outcome)
    return patched


def try_patch(patch: Patch, build: Build) -> Outcome:
    """One patch alone on one build."""
    return apply_all(build, [patch]).outcomes[0]


def locate(build: Build, target: Target, read: Callable[[str], bytes | None]) -> str | None:
    """The path of the target's file in this build; None if there is none, or more than one that it could be."""
    for path in target.paths:
        if _shaped(read(path), target):
            return path
    candidates = [path for path in build.paths() if any(fnmatch.fnmatch(path, pattern) for pattern in target.search)]
    found = [path for path in candidates[:SEARCHED_MAX] if _shaped(read(path), target)]
    return found[0] if len(found) == 1 else None


def _shaped(data: bytes | None, target: Target) -> bool:
    if data is None or target.needle not in data:
        return False
    try:
        return target.shape(ast.parse(data))
    except (SyntaxError, ValueError):
        return False


def _apply(build: Build, patch: Patch, changed: Mapping[str, bytes]) -> tuple[Outcome, dict[str, bytes]]:
    def outcome(result: Result, reason: str, paths: tuple[str, ...] = ()) -> Outcome:
        return Outcome(patch.name, patch.required, result, reason, paths)

    version = known_version(build.version)
    if version is not None and version not in SpecifierSet(patch.releases, prereleases=True):
        reason = f"{version} is outside {patch.releases}"
        return Outcome(patch.name, patch.required, Result.NOT_APPLICABLE, reason, outside=True), {}
    located = {name: locate(build, target, build.read) for name, target in patch.targets.items()}
    if missing := [name for name, path in located.items() if path is None]:
        return outcome(*_missing(patch, version, missing)), {}
    places = {name: path for name, path in located.items() if path is not None}

    before = probe(patch, View(build, {}, places))
    match before:
        case NotHere():
            return outcome(Result.NOT_APPLICABLE, str(before)), {}
        case Verdict(Finding.FIXED, evidence):
            return outcome(Result.UPSTREAM, evidence), {}
        case Verdict(Finding.UNKNOWN, evidence):
            return outcome(Result.FAILED, f"the probe cannot tell: {evidence}"), {}
    try:
        files = _edited(build, patch, changed, places)
    except ShapeUnknown as error:
        return outcome(Result.FAILED, str(error)), {}
    after = probe(patch, View(build, {**changed, **files}, places))
    if not isinstance(after, Verdict) or after.finding is not Finding.FIXED:
        return outcome(Result.FAILED, f"after the edit the probe still says: {_said(after)}"), {}
    return outcome(Result.APPLIED, f"before: {_said(before)}; after: {after.evidence}", tuple(sorted(files))), files


def _edited(build: Build, patch: Patch, changed: Mapping[str, bytes], places: Mapping[str, str]) -> dict[str, bytes]:
    view = View(build, changed, places)
    try:
        patch.edit(view)
    except (ShapeUnknown, NotHere) as error:
        raise ShapeUnknown(str(error)) from None
    except Exception as error:
        raise ShapeUnknown(f"the edit broke: {type(error).__name__}: {error}") from error
    files = view.result()
    if not files:
        raise ShapeUnknown("the edit changed nothing")
    return files


def probe(patch: Patch, view: View, deadline_s: float = PROBE_DEADLINE_S) -> Verdict | NotHere:
    """What the patch's probe says. Whatever it raises, but for NotHere, is "unknown", and so is one that hangs."""
    try:
        with _bounded(deadline_s):
            return patch.probe(view)
    except NotHere as error:
        return error
    except Exception as error:  # the code under probe may do anything
        return Verdict(Finding.UNKNOWN, f"{type(error).__name__}: {error}")


@contextlib.contextmanager
def _bounded(deadline_s: float) -> Iterator[None]:
    """Raise TimeoutError in code that does not end, again and again until it does; only in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def give_up(*_: object) -> None:
        raise TimeoutError(f"not done after {deadline_s:.0f} s")

    before = signal.signal(signal.SIGALRM, give_up)
    running = signal.setitimer(signal.ITIMER_REAL, deadline_s, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *running)  # whoever else had set one


def _still_good(build: Build, patch: Patch, files: Mapping[str, bytes], outcome: Outcome) -> Outcome:
    places = {name: locate(build, target, build.read) or "" for name, target in patch.targets.items()}
    again = probe(patch, View(build, files, places))
    if isinstance(again, Verdict) and again.finding is Finding.FIXED:
        return outcome
    reason = f"with all patches in, the probe says: {_said(again)}"
    return Outcome(patch.name, patch.required, Result.FAILED, reason, outcome.paths)


def _missing(patch: Patch, version: Version | None, missing: list[str]) -> tuple[Result, str]:
    what = ", ".join(", ".join(patch.targets[name].paths) for name in missing)
    if version is None and not patch.required:
        return Result.NOT_APPLICABLE, f"this build has no {what}"
    if version is not None and patch.optional_in and version in SpecifierSet(patch.optional_in, prereleases=True):
        return Result.NOT_APPLICABLE, f"{version} has no {what}"
    return Result.FAILED, f"{what} is not there, or not as the patch knows it, and nothing of its shape was found"


def known_version(text: str) -> Version | None:
    """The version, if it says anything: not the 0.1.dev of a build without tags, not what is no version at all."""
    try:
        version = Version(text)
    except InvalidVersion:
        return None
    return version if version >= Version("0.2") else None


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _said(seen: Verdict | NotHere) -> str:
    return seen.evidence if isinstance(seen, Verdict) else str(seen)
