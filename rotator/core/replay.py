"""What today's planner would decide from what was seen then, beside what was decided then."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rotator.core.planner import plan
from rotator.core.values import Plan, Policy, Snapshot, Step, Swap

SAME = "same"
WAITS = "waits"  # the engine that came in would wait now
OTHERS_YIELD = "others yield"  # it would come in as well, with others making room
OTHER_FIRST = "another first"  # another engine would have its GPUs
NOTHING = "nothing"  # what was put away would stay as it is

StepKey = tuple[str, str, int | None]


@dataclass(frozen=True, slots=True)
class Verdict:
    """One recorded swap beside today's plan. ``was`` and ``now`` are steps in words, ``why_*`` the reasons given."""

    kind: str
    was: tuple[str, ...]
    now: tuple[str, ...]
    why_was: str
    why_now: str

    @property
    def is_same(self) -> bool:
        return self.kind == SAME


@dataclass(frozen=True, slots=True)
class _Recorded:
    """A swap as the journal has it: JSON values."""

    evict: frozenset[StepKey]
    admit: StepKey | None
    reason: str
    gpus: frozenset[str]
    words: tuple[str, ...] = field(default=())


def compare(recorded: Mapping[str, Any], snapshot: Snapshot, policy: Policy | None = None) -> Verdict:
    """Plan again from the snapshot (with another policy, where one is given) and judge the recorded swap by it.

    Raises KeyError or TypeError for what is no recorded swap.
    """
    then = _recorded(recorded)
    today = plan(snapshot if policy is None else replace(snapshot, policy=policy))
    same = next((s for s in today.swaps if _keys(s) == (then.evict, then.admit)), None)
    if same is not None:
        return Verdict(SAME, then.words, then.words, then.reason, same.reason)
    kind, swaps, why = _difference(then, today)
    return Verdict(kind, then.words, tuple(w for s in swaps for w in _words(s)), then.reason, why)


def summary(verdicts: Sequence[Verdict]) -> dict[str, int]:
    """How many of each kind, the most frequent first."""
    return dict(Counter(v.kind for v in verdicts).most_common())


def _difference(then: _Recorded, today: Plan) -> tuple[str, list[Swap], str]:
    """What happens instead: its kind, the swaps on the same GPUs, the reason in words."""
    engine = then.admit[1] if then.admit else None
    mine = [s for s in today.swaps if engine and s.admit is not None and s.admit.engine == engine]
    if mine:
        return OTHERS_YIELD, mine, mine[0].reason
    rivals = [s for s in today.swaps if not then.gpus.isdisjoint(s.gpus)]
    names = {engine} if engine else {key[1] for key in then.evict}
    blocked = "; ".join(f"{b.engine}: {b.reason}" for b in today.blocked if b.engine in names)
    if rivals:
        said = f"{rivals[0].reason}; {blocked}" if blocked else rivals[0].reason
        return OTHER_FIRST, rivals, said
    if engine is None:
        return NOTHING, [], blocked or "nothing asks for it"
    return WAITS, [], blocked or f"nothing brings {engine} in"


def _recorded(plain: Mapping[str, Any]) -> _Recorded:
    admit, steps = plain["admit"], [*plain["evict"], *([plain["admit"]] if plain["admit"] else [])]
    return _Recorded(
        frozenset(_plain_key(s) for s in plain["evict"]),
        _plain_key(admit) if admit else None,
        str(plain["reason"]),
        frozenset(plain["gpus"]),
        tuple(_said(*_plain_key(s)) for s in steps),
    )


def _plain_key(step: Mapping[str, Any]) -> StepKey:
    level = step.get("level")
    return str(step["action"]), str(step["engine"]), None if level is None else int(level)


def _keys(swap: Swap) -> tuple[frozenset[StepKey], StepKey | None]:
    return frozenset(_key(s) for s in swap.evict), _key(swap.admit) if swap.admit else None


def _key(step: Step) -> StepKey:
    return step.action.value, step.engine, None if step.level is None else int(step.level)


def _words(swap: Swap) -> list[str]:
    return [_said(*_key(s)) for s in (*swap.evict, *([swap.admit] if swap.admit else []))]


def _said(action: str, engine: str, level: int | None) -> str:
    return f"{action} {engine}" if level is None else f"{action} {engine} at level {level}"
