"""Recorded swaps beside what today's planner would do."""

from typing import Any

from rotator.core.planner import plan
from rotator.core.replay import Verdict, compare, summary
from rotator.core.values import Policy, Snapshot, Swap
from rotator.service.journal import plan_json
from tests.unit.core.fleets import awake, engine, snapshot, waiting


def recorded(swap: Swap) -> dict[str, Any]:
    return plan_json(swap)


def seen(**more: Any) -> Snapshot:
    """``a`` is asleep and wanted; ``b`` holds its GPU and is busy since a second."""
    busy = awake("b", demand=waiting(), awake_since_s=999.0)
    return snapshot(engine("a", demand=waiting(3, 9.0)), busy, policy=Policy(min_stay_s=0.0), **more)


def test_the_same_policy_decides_the_same():
    (swap,) = plan(seen()).swaps
    verdict = compare(recorded(swap), seen())
    assert verdict.is_same
    assert verdict.was == ("sleep b at level 1", "wake a")
    assert verdict.why_was == verdict.why_now == swap.reason


def test_a_longer_minimum_stay_lets_it_wait_and_says_so():
    (swap,) = plan(seen()).swaps
    verdict = compare(recorded(swap), seen(), Policy(min_stay_s=60.0))
    assert (verdict.kind, verdict.now) == ("waits", ())
    assert "waits until b has had its turn" in verdict.why_now


def test_another_order_of_turns_is_told_with_who_comes_first():
    rivals = (engine("a", demand=waiting(3, 9.0)), engine("c", demand=waiting(1, 1.0), priority=1), awake("b"))
    (swap,) = plan(snapshot(*rivals, policy=Policy(priority_worth_s=0.0))).swaps
    assert swap.admit is not None
    assert swap.admit.engine == "a"
    verdict = compare(recorded(swap), snapshot(*rivals), Policy(priority_worth_s=100.0))
    assert verdict.kind == "another first"
    assert verdict.now == ("sleep b at level 1", "wake c")
    assert "a:" in verdict.why_now


def test_other_victims_are_told():
    fleet = snapshot(engine("a", awake=40, demand=waiting()), awake("b", awake=50), awake("c", awake=40))
    (swap,) = plan(fleet).swaps
    told = recorded(swap)
    (victim,) = told["evict"]
    told["evict"] = [{**victim, "engine": "c" if victim["engine"] == "b" else "b"}]
    assert compare(told, fleet).kind == "others yield"


def test_a_swap_that_only_put_something_away_is_compared_too():
    fleet = snapshot(awake("a"))
    told = {"evict": [{"action": "sleep", "engine": "a", "level": 1}], "admit": None, "reason": "idle", "gpus": ["0"]}
    assert compare(told, fleet).kind == "nothing"


def test_kinds_are_counted():
    verdicts = [Verdict(kind, (), (), "", "") for kind in ("same", "waits", "same")]
    assert summary(verdicts) == {"same": 2, "waits": 1}
