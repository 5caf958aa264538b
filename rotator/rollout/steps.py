"""What a rollout does next, from what its log says: one table of steps, one fold over the log, no I/O.

Forward, an engine goes through ``forward``; a step that fails (or an abort) sends it back through ``back``, and the
rollout ends there. Engines come one after another, so never more than one is down. The log alone decides: whoever
reads the same log goes on at the same step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Step(StrEnum):
    BASELINE = "baseline"  # what the version in place recalls, and how fast it is
    ARCHIVE = "archive"  # the environment in place, kept whole
    HOLD = "hold"  # its GPUs are cordoned while files are exchanged
    SWITCH = "switch"  # from now on a start is of the other version
    STOP = "stop"
    VRAM = "vram"
    INSTALL = "install"  # the other environment comes in its place
    LET_GO = "let-go"
    START = "start"
    CANARY = "canary"
    RECALL = "recall"
    SOAK = "soak"
    SPEED = "speed"


class Way(StrEnum):
    FORWARD = "forward"
    BACK = "back"


class Result(StrEnum):
    BEGUN = "begun"
    DONE = "done"
    FAILED = "failed"
    ABORT = "abort"  # an operator wants it back
    AGAIN = "again"  # an operator wants a failed way back tried once more


class Verdict(StrEnum):
    DONE = "done"
    UNTOUCHED = "untouched"  # it failed before anything of this engine was changed
    REVERTED = "reverted"
    STUCK = "stuck"  # the way back failed: somebody must look


_IN_PLACE = frozenset({Step.ARCHIVE, Step.HOLD, Step.INSTALL, Step.LET_GO})
_BACK = (*(Step.HOLD, Step.SWITCH, Step.STOP, Step.VRAM, Step.INSTALL, Step.LET_GO, Step.START, Step.CANARY),)
_TOUCHES = frozenset(Step) - {Step.BASELINE, Step.ARCHIVE}


@dataclass(frozen=True, slots=True)
class Part:
    """One engine's part. ``in_place``: its environment is exchanged under it, so files are archived and put back."""

    engine: str
    in_place: bool = False


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the log; ``facts`` are JSON values."""

    engine: str
    way: Way
    step: Step
    result: Result
    at_wall_s: float = 0.0
    words: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Move:
    engine: str
    way: Way
    step: Step


@dataclass(frozen=True, slots=True)
class End:
    """``engine``, ``step`` and ``words`` say what failed; ``new`` are engines that run the new version."""

    verdict: Verdict
    new: tuple[str, ...]
    engine: str = ""
    step: Step | None = None
    words: str = ""
    left: tuple[str, ...] = ()
    aborted: bool = False
    back_failed: str = ""  # of the way back, where that failed too


def forward(part: Part) -> tuple[Step, ...]:
    return tuple(step for step in Step if part.in_place or step not in _IN_PLACE)


def back(part: Part, log: Sequence[Entry]) -> tuple[Step, ...]:
    """An engine that was never asked to stop still runs the old version, and one whose stop failed may: neither is
    stopped again for nothing (a start makes sure that the old version is what runs)."""
    mine = [e for e in log if e.engine == part.engine and e.way is Way.FORWARD]
    begun = {e.step for e in mine if e.result is Result.BEGUN}
    stop_failed = any(e.step is Step.STOP and e.result is Result.FAILED for e in mine)
    skipped = set() if part.in_place else set(_IN_PLACE)
    if Step.STOP not in begun or stop_failed:
        skipped |= {Step.STOP, Step.VRAM}
    if Step.INSTALL not in begun:
        skipped.add(Step.INSTALL)
    return tuple(step for step in _BACK if step not in skipped)


def next_move(parts: Sequence[Part], log: Sequence[Entry]) -> Move | End:
    """The step to carry out now (again, where it was begun and has no end), or how the rollout ended."""
    new: list[str] = []
    for at, part in enumerate(parts):
        mine = [e for e in log if e.engine == part.engine]
        why = next((e for e in mine if e.result in (Result.FAILED, Result.ABORT) and e.way is Way.FORWARD), None)
        if why is not None:
            return _backward(part, mine, why, tuple(new), tuple(p.engine for p in parts[at:]))
        done = _done(mine, Way.FORWARD)
        for step in forward(part):
            if step not in done:
                return Move(part.engine, Way.FORWARD, step)
        new.append(part.engine)
    return End(Verdict.DONE, tuple(new))


def _backward(part: Part, mine: Sequence[Entry], why: Entry, new: tuple[str, ...], left: tuple[str, ...]) -> Move | End:
    ended = {
        "engine": part.engine,
        "step": why.step,
        "words": why.words,
        "left": left,
        "aborted": why.result is Result.ABORT,
    }
    if not any(e.step in _TOUCHES for e in mine if e.result is Result.BEGUN):
        return End(Verdict.UNTOUCHED, new, **ended)  # type: ignore[arg-type]  # the dictionary's values are of many types
    again = max((i for i, e in enumerate(mine) if e.result is Result.AGAIN), default=-1)
    failed = next((e for e in mine[again + 1 :] if e.way is Way.BACK and e.result is Result.FAILED), None)
    if failed is not None:
        said = f"{failed.step.value}: {failed.words}"
        return End(Verdict.STUCK, new, **ended, back_failed=said)  # type: ignore[arg-type]  # as above
    done = _done(mine, Way.BACK)
    for step in back(part, mine):
        if step not in done:
            return Move(part.engine, Way.BACK, step)
    return End(Verdict.REVERTED, new, **ended)  # type: ignore[arg-type]  # as above


def _done(mine: Sequence[Entry], way: Way) -> set[Step]:
    return {e.step for e in mine if e.way is way and e.result is Result.DONE}


def facts_of(log: Sequence[Entry], engine: str, step: Step, way: Way = Way.FORWARD) -> Mapping[str, Any]:
    """What the step learned when it was done; empty where it was not."""
    found: Mapping[str, Any] = {}
    for e in log:
        if (e.engine, e.step, e.way, e.result) == (engine, step, way, Result.DONE):
            found = e.facts
    return found


def switched(parts: Sequence[Part], log: Sequence[Entry]) -> frozenset[str]:
    """Engines whose next start is of the new version, as far as the log tells: a switch that was begun counts, one back
    that is done no longer does."""
    found = set()
    for part in parts:
        mine = [e for e in log if e.engine == part.engine and e.step is Step.SWITCH]
        went = any(e.way is Way.FORWARD and e.result is Result.BEGUN for e in mine)
        if went and not any(e.way is Way.BACK and e.result is Result.DONE for e in mine):
            found.add(part.engine)
    return frozenset(found)
