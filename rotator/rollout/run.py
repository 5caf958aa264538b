"""Drives a rollout: asks the log what is next, carries it out, writes down how it went. Nothing is decided here."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from rotator.rollout.ports import Away, Clock, StepFailed
from rotator.rollout.records import Rollout
from rotator.rollout.steps import End, Entry, Move, Result

AGAIN_S = 1.0  # between two tries to reach who is away


class Keeper(Protocol):
    def keep(self, rollout: Rollout) -> None: ...


CarryOut = Callable[[Rollout, Move], tuple[str, Mapping[str, Any]]]
"""One step, begun again where it was begun before: (what it found in words, facts). Raises StepFailed, Away."""
Say = Callable[[Move, Result, str], None]


def drive(rollout: Rollout, keeper: Keeper, carry_out: CarryOut, clock: Clock, say: Say) -> End:
    """To its end. Raises Away where somebody stayed away too long: the rollout stands still, and can be resumed."""
    while isinstance(move := rollout.next, Move):
        _note(rollout, keeper, clock, move, Result.BEGUN)
        say(move, Result.BEGUN, "")
        try:
            words, facts = _patiently(rollout, keeper, carry_out, clock, move, say)
        except StepFailed as e:
            _note(rollout, keeper, clock, move, Result.FAILED, str(e), e.facts)
            say(move, Result.FAILED, str(e))
        else:
            _note(rollout, keeper, clock, move, Result.DONE, words, facts)
            say(move, Result.DONE, words)
    return move


def _patiently(
    rollout: Rollout, keeper: Keeper, carry_out: CarryOut, clock: Clock, move: Move, say: Say
) -> tuple[str, Mapping[str, Any]]:
    """The step, tried again as long as somebody is away. For whom it waits stands in the journal."""
    away_since_s: float | None = None
    while True:
        try:
            found = carry_out(rollout, move)
        except Away as e:
            now_s = clock.now_s()
            away_since_s = now_s if away_since_s is None else away_since_s
            if rollout.waiting != str(e):
                rollout.waiting = str(e)
                keeper.keep(rollout)
                say(move, Result.BEGUN, f"waits: {e}")
            if now_s - away_since_s >= rollout.settings.away_max_s:
                raise
            clock.sleep(AGAIN_S)
        else:
            rollout.waiting = ""
            return found


def _note(
    rollout: Rollout,
    keeper: Keeper,
    clock: Clock,
    move: Move,
    result: Result,
    words: str = "",
    facts: Mapping[str, Any] | None = None,
) -> None:
    rollout.waiting = ""
    entry = Entry(move.engine, move.way, move.step, result, clock.wall_s(), words, dict(facts or {}))
    rollout.log.append(entry)
    keeper.keep(rollout)


def note_wish(rollout: Rollout, result: Result, clock: Clock, words: str) -> None:
    """An operator's abort, or another try of a way back that failed: for the step that is next, or failed last."""
    last = rollout.next
    if isinstance(last, Move):
        rollout.log.append(Entry(last.engine, last.way, last.step, result, clock.wall_s(), words))
    elif last.step is not None:
        step = rollout.log[-1]
        rollout.log.append(Entry(last.engine, step.way, step.step, result, clock.wall_s(), words))
