"""Who goes a rung deeper: by time, for another that is likelier wanted, for host RAM; and who is woken ahead."""

from dataclasses import replace

import pytest

from rotator.core.costs import wake_s
from rotator.core.planner import plan
from rotator.core.values import Action, Calendar, Demand, Depth, Engine, Gpu, Level, Plan, Policy, State, Step
from tests.unit.core.fleets import awake, engine, only_swap, snapshot, waiting

LADDER = Policy(ladder=True, prewake_chance=0.6)


def steps(plan: Plan) -> dict[str, Step]:
    return {step.engine: step for swap in plan.swaps for step in swap.evict}


def used(at_s: float, **more: float) -> Demand:
    return Demand(last_used_s=at_s, **more)  # type: ignore[arg-type]


# -- by time -----------------------------------------------------------------------------------------------------------


def test_an_engine_idle_for_as_long_as_is_allowed_goes_to_sleep_and_says_why() -> None:
    fleet = snapshot(awake("a", demand=used(900.0)), policy=Policy(idle_sleep_s=100.0))
    swap = only_swap(plan(fleet))
    assert swap.admit is None
    assert swap.command is None
    assert (swap.evict[0].action, swap.evict[0].level) == (Action.SLEEP, Level.HOST)
    assert "nobody has used a for 100 s" in swap.reason


def test_the_plan_says_when_the_next_engine_will_have_been_idle_long_enough() -> None:
    result = plan(snapshot(awake("a", demand=used(950.0)), policy=Policy(idle_sleep_s=100.0)))
    assert (result.swaps, result.look_again_at_s) == ((), 1050.0)


@pytest.mark.parametrize(
    "kept",
    [
        awake("a", pinned=True),
        awake("a", demand=Demand(in_flight=1)),
        awake("a", demand=Demand(waiting=1)),
        awake("a", awake_since_s=950.0),
        engine("a", state=State.STARTING),
    ],
    ids=["pinned", "busy", "waited for", "just woken", "on its way"],
)
def test_nobody_pinned_or_wanted_or_moving_goes_to_sleep_by_the_clock(kept: Engine) -> None:
    assert plan(snapshot(kept, policy=Policy(idle_sleep_s=100.0))).swaps == ()


def test_without_a_time_nobody_sinks_by_the_clock() -> None:
    assert plan(snapshot(awake("a"), engine("b"))).swaps == ()


def test_masters_of_a_long_sleeper_go_to_disk_where_its_allocator_has_one() -> None:
    sleepers = [engine("a", has_disk=True, host_bytes=50), engine("b", host_bytes=50)]
    result = steps(plan(snapshot(*sleepers, policy=Policy(idle_sink_s=100.0))))
    assert list(result) == ["a"]
    assert (result["a"].action, result["a"].depth) == (Action.SINK, Depth.DISK)
    assert "from host RAM to disk" in result["a"].reason


def test_a_sleeper_that_nobody_asks_for_is_stopped_at_last() -> None:
    policy = Policy(idle_sink_s=100.0, idle_stop_s=500.0)
    result = steps(plan(snapshot(engine("a", has_disk=True, host_bytes=50), policy=policy)))
    assert result["a"].action is Action.STOP
    fresh = engine("a", slept_at_s=800.0, has_disk=True, host_bytes=50)
    assert steps(plan(snapshot(fresh, policy=policy)))["a"].action is Action.SINK
    assert plan(snapshot(engine("a", can_stop=False), policy=policy)).swaps == ()


def test_an_engine_that_would_be_woken_again_at_once_does_not_sleep_by_the_clock() -> None:
    idle = awake("a", demand=used(0.0, soon=0.9))
    assert plan(snapshot(idle, policy=Policy(idle_sleep_s=100.0, prewake_chance=0.6))).swaps == ()


# -- for another -------------------------------------------------------------------------------------------------------


def likely(name: str = "b", chance: float = 0.9, **more: object) -> Engine:
    return engine(name, demand=Demand(soon=chance, likely_wanted=chance, likely_why="as usual"), **more)


def test_an_idle_engine_sleeps_ahead_for_one_that_is_much_likelier_wanted() -> None:
    result = plan(snapshot(awake("a", demand=used(500.0)), likely(), policy=LADDER))
    assert "b is likelier wanted (90%, as usual) than a, which is idle" in only_swap(result).reason
    assert only_swap(result).admit is None


def test_an_idle_engine_that_is_as_likely_wanted_stays() -> None:
    same = awake("a", demand=used(500.0, soon=0.8, likely_wanted=0.8))
    result = plan(snapshot(same, likely(), policy=LADDER))
    assert result.swaps == ()
    assert result.look_again_at_s is not None


def test_a_likely_sleeper_whose_room_others_hold_that_are_none_of_ours_is_looked_at_again_later() -> None:
    sleeper = engine("b", demand=used(960.0, soon=0.9))
    result = plan(snapshot(sleeper, gpus=[Gpu("0", 100, foreign_bytes=60)], policy=LADDER))
    assert (result.swaps, result.look_again_at_s) == ((), 1020.0)


def test_a_default_engine_does_not_sleep_ahead_for_another_as_it_would_come_back_at_once() -> None:
    fleet = [awake("a", demand=used(0.0)), engine("b", demand=used(0.0, soon=0.9))]
    assert "a" in steps(plan(snapshot(*fleet, policy=LADDER)))
    kept = snapshot(*fleet, policy=LADDER, calendar=Calendar(defaults=("a",)))
    assert plan(kept).swaps == ()


def test_nobody_sleeps_ahead_with_the_ladder_switched_off() -> None:
    fleet = [awake("a", demand=used(500.0)), likely()]
    assert plan(snapshot(*fleet, policy=replace(LADDER, ladder=False))).swaps == ()


# -- ahead of clients --------------------------------------------------------------------------------------------------


def test_a_sleeper_that_is_likely_wanted_is_woken_into_free_room() -> None:
    swap = only_swap(plan(snapshot(likely(), policy=LADDER)))
    assert swap.ahead
    assert swap.evict == ()
    assert swap.admit is not None
    assert "likely wanted soon (90%, as usual)" in swap.admit.reason


@pytest.mark.parametrize(
    "fleet",
    [
        (likely(), awake("a", demand=Demand(in_flight=1))),
        (likely(chance=0.5),),
        (likely(awake=30), engine("w", awake=90, demand=waiting()), awake("x", awake=50, pinned=True)),
        (likely(awake=30), awake("x", awake=50, can_freeze=False, demand=Demand(in_flight=1)),
         engine("w", awake=90, demand=waiting())),
        (likely(chance=0.7, awake=30), likely("c"), awake("x", awake=30, demand=Demand(in_flight=1))),
    ],
    ids=["no room", "not likely enough", "others wait for the GPU", "others wait for a busy engine there",
         "a likelier one does not fit there yet"],
)  # fmt: skip
def test_nobody_is_woken_ahead_at_anybodys_cost(fleet: tuple[Engine, ...]) -> None:
    assert not [s for s in plan(snapshot(*fleet, policy=LADDER)).swaps if s.admit and s.admit.engine == "b"]


def test_nobody_is_woken_ahead_with_pre_waking_switched_off() -> None:
    assert plan(snapshot(likely(), policy=replace(LADDER, prewake_chance=None))).swaps == ()


# -- host RAM ----------------------------------------------------------------------------------------------------------


def host_short(*fleet: Engine, free: int = 0, policy: Policy = LADDER) -> Plan:
    return plan(snapshot(*fleet, host_budget_bytes=200, host_used_bytes=200 - free, policy=policy))


def test_masters_that_are_least_regretted_leave_host_ram_first() -> None:
    fleet = [
        engine("a", "0", has_disk=True, host_bytes=60, demand=Demand(likely_wanted=0.9)),
        engine("b", "1", has_disk=True, host_bytes=60, demand=Demand(likely_wanted=0.1)),
        engine("c", "2", has_disk=True, host_bytes=20, demand=Demand(likely_wanted=0.1)),
    ]
    assert list(steps(host_short(*fleet))) == ["b"]  # as unlikely as c, and gives more for it


def test_masters_of_awake_engines_are_dropped_too_where_that_costs_less() -> None:
    fleet = [
        engine("sleeper", "0", has_disk=True, host_bytes=60, demand=Demand(likely_wanted=0.9)),
        awake("serving", "1", host_bytes=60, masters_bytes=60, demand=Demand(in_flight=3)),
    ]
    step = steps(host_short(*fleet))["serving"]
    assert (step.action, step.depth) == (Action.SINK, None)
    assert "drops the masters" in step.reason


def test_room_is_kept_for_the_masters_of_whoever_sleeps_next() -> None:
    fleet = [engine("sleeper", "0", has_disk=True, host_bytes=60), awake("a", "1", host_bytes=100)]
    assert list(steps(host_short(*fleet, free=60))) == ["sleeper"]
    assert host_short(*fleet, free=120).swaps == ()


def test_nobody_is_stopped_for_host_ram_that_nobody_wants_yet() -> None:
    assert host_short(engine("s", "0", host_bytes=100), awake("a", "1", host_bytes=100)).swaps == ()


def test_a_sleeper_elsewhere_gives_its_host_ram_rather_than_the_victim_is_stopped() -> None:
    fleet = [
        awake("victim", "0", host_bytes=60, demand=Demand(likely_wanted=0.9)),
        engine("wish", "0", demand=waiting(3, 20.0)),
        engine("sleeper", "1", has_disk=True, host_bytes=80, demand=Demand(likely_wanted=0.1)),
    ]
    done = steps(host_short(*fleet, free=10))
    assert {name: step.action for name, step in done.items()} == {"sleeper": Action.SINK, "victim": Action.SLEEP}
    plain = steps(host_short(*fleet, free=10, policy=Policy()))
    assert {name: step.action for name, step in plain.items()} == {"victim": Action.STOP}


# -- unified memory, and what a wake costs from where ------------------------------------------------------------------


def test_on_unified_memory_an_engine_sleeps_with_its_masters_on_disk() -> None:
    fleet = [awake("a", unified=True, has_disk=True, host_bytes=50), engine("b", demand=waiting())]
    step = steps(plan(snapshot(*fleet, host_budget_bytes=0)))["a"]
    assert (step.action, step.depth) == (Action.SLEEP, Depth.DISK)


def test_on_unified_memory_without_a_disk_it_stops() -> None:
    fleet = [awake("a", unified=True, host_bytes=50), engine("b", demand=waiting())]
    assert steps(plan(snapshot(*fleet)))["a"].action is Action.STOP


def test_a_wake_is_priced_by_its_depth_measured_or_guessed() -> None:
    measured = engine("a", wake_cost_s=2.0, wake_costs={Depth.HOST: 2.0, Depth.DISK: 9.0}, start_cost_s=60.0)
    assert wake_s(measured, Depth.DISK) == 9.0
    guessed = [wake_s(engine("a", wake_cost_s=2.0, start_cost_s=60.0), depth) for depth in Depth]
    assert guessed == sorted(guessed)  # KV cache, host RAM, disk, nowhere
    assert guessed[1] == 2.0
