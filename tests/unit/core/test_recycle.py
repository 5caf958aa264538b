"""Planned restarts: only in a quiet moment, with the reason in the plan."""

from dataclasses import replace
from typing import Any

from rotator.core.planner import plan
from rotator.core.values import Action, Calendar, Demand, Engine, Plan, Policy, State, Window
from tests.unit.core.fleets import awake, engine, evicted, only_swap, snapshot, waiting

WHY = "what it keeps asleep grew from 13.0 GiB to 41.0 GiB on a GPU in 2 cycles"
QUIET = Policy(restart_quiet_s=100)
NOW_S = 1000.0


def due(name: str = "a", **more: Any) -> Engine:
    return awake(name, restart_why=WHY, **more)


def planned(*engines: Engine, **more: Any) -> Plan:
    return plan(replace(snapshot(*engines, now_s=NOW_S, policy=QUIET), **more))


def test_an_engine_that_only_a_launch_mends_is_stopped_in_a_quiet_moment_with_the_reason() -> None:
    swap = only_swap(planned(due()))
    assert evicted(swap) == {"a": Action.STOP}
    assert f"planned restart: {WHY}" in swap.reason


def test_a_sleeper_is_restarted_too() -> None:
    assert evicted(only_swap(planned(engine("a", restart_why=WHY)))) == {"a": Action.STOP}


def test_it_waits_for_quiet_and_says_when_to_look_again() -> None:
    used = Demand(last_used_s=NOW_S - 40)
    for engines in ((due(demand=used),), (due(), engine("b", demand=used))):
        made = planned(*engines)
        assert made.swaps == ()
        assert made.look_again_at_s == NOW_S + 60


def test_nobody_who_is_busy_wanted_or_pinned_is_disturbed() -> None:
    for engines in (
        (due(demand=Demand(in_flight=1)),),
        (due(), engine("b", demand=waiting())),
        (due(), engine("b", state=State.FAILED, retry_at_s=NOW_S + 50, demand=waiting())),
        (due(pinned=True),),
        (due(can_stop=False),),
        (engine("a", restart_why=WHY, demand=Demand(frozen=1)),),
    ):
        assert all(step.action is not Action.STOP for swap in planned(*engines).swaps for step in swap.evict)


def test_work_on_other_gpus_does_not_keep_it_from_its_restart() -> None:
    busy = awake("b", gpus="1", demand=Demand(in_flight=3))
    assert evicted(only_swap(planned(due(), busy))) == {"a": Action.STOP}


def test_who_is_likely_wanted_soon_is_not_restarted_now() -> None:
    policy = replace(QUIET, prewake_chance=0.6)
    assert planned(due(demand=Demand(soon=0.7)), policy=policy).swaps == ()


def test_an_engine_that_the_calendar_keeps_awake_stays() -> None:
    window = Window("night", ("a",), NOW_S - 10, NOW_S + 500)
    assert planned(due(), calendar=Calendar((window,))).swaps == ()
    sleeper = engine("b", restart_why=WHY)
    assert planned(awake("a"), sleeper, calendar=Calendar((window,))).swaps == (), "its start could not follow"
