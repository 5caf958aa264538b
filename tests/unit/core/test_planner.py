"""What a plan does for engines that clients or the configuration want, one behaviour a test."""

from dataclasses import replace

import pytest

from rotator.core.planner import plan
from rotator.core.values import Action, BlockKind, Demand, Gpu, Health, Level, Policy, State
from tests.unit.core.fleets import MOVING, awake, engine, evicted, only_swap, snapshot, waiting

# -- who gets in -------------------------------------------------------------------------------------------------------


def test_nothing_is_planned_when_nobody_wants_anything() -> None:
    result = plan(snapshot(awake("a"), engine("b"), engine("c", state=State.STOPPED)))
    assert (result.swaps, result.blocked, result.look_again_at_s) == ((), (), None)


def test_a_sleeper_that_is_waited_for_wakes_where_it_fits() -> None:
    swap = only_swap(plan(snapshot(engine("a", "01", demand=waiting(3, 4.2), wake_cost_s=2.5))))
    assert swap.evict == ()
    assert swap.admit is not None
    assert (swap.admit.action, swap.admit.engine) == (Action.WAKE, "a")
    assert swap.admit.bytes_per_gpu == (("0", 75), ("1", 75))
    assert swap.gpus == {"0", "1"}
    assert swap.expected_s == 2.5


def test_a_reason_says_who_waits_how_long_and_what_is_needed() -> None:
    gib = 1 << 30
    sleeper = engine("glm", demand=waiting(3, 4.2), awake=90 * gib, residue=2 * gib)
    holder = awake("dsv4", awake=80 * gib, residue=gib, demand=Demand(in_flight=2))
    swap = only_swap(plan(snapshot(sleeper, holder, gpus=[Gpu("0", 96 * gib)])))
    assert swap.reason == (
        "3 requests wait for glm, the oldest 4.2 s; needs 88.0 GiB on 0 where 14.0 GiB are free; dsv4 must make room"
    )
    assert swap.evict[0].reason == (
        "makes room for glm: sleeps at level 1, frees 79.0 GiB on 0; "
        "2 streams in flight may finish for 5.0 s, then freeze"
    )


def test_streams_that_stand_still_are_demand() -> None:
    swap = only_swap(plan(snapshot(engine("a", demand=Demand(frozen=1, oldest_wait_s=7.0)))))
    assert swap.reason.startswith("1 stream of a stands still, the oldest 7.0 s")


def test_a_stopped_engine_is_started_with_its_whole_footprint() -> None:
    swap = only_swap(plan(snapshot(engine("a", state=State.STOPPED, demand=waiting(), start_cost_s=70.0))))
    assert swap.admit is not None
    assert (swap.admit.action, swap.admit.bytes_per_gpu) == (Action.START, (("0", 80),))
    assert swap.expected_s == 70.0


def test_a_start_gets_no_credit_for_what_old_processes_still_hold() -> None:
    leftover = engine("a", state=State.STOPPED, held_bytes=(30,), demand=waiting())
    assert plan(snapshot(leftover)).blocked[0].kind is BlockKind.NEVER_FITS


def test_an_engine_that_failed_is_not_started_before_its_time() -> None:
    failed = engine("a", state=State.FAILED, retry_at_s=1003.0, demand=waiting())
    result = plan(snapshot(failed))
    assert result.swaps == ()
    assert (result.blocked[0].kind, result.blocked[0].until_s, result.look_again_at_s) == (
        BlockKind.BACKOFF,
        1003.0,
        1003.0,
    )
    assert only_swap(plan(snapshot(failed, now_s=1003.0))).admit is not None


@pytest.mark.parametrize("state", MOVING)
def test_an_engine_on_its_way_is_left_alone_and_so_are_its_gpus(state: State) -> None:
    result = plan(snapshot(engine("m", "01", state, demand=waiting(), awake=10), engine("w", "1", demand=waiting())))
    assert result.swaps == ()
    assert [(b.engine, b.kind) for b in result.blocked] == [("w", BlockKind.BUSY)]


def test_a_quarantined_engine_is_not_started() -> None:
    (blocked,) = plan(snapshot(engine("a", state=State.QUARANTINED, demand=waiting()))).blocked
    assert blocked.kind is BlockKind.QUARANTINED
    assert "release" in blocked.reason


def test_claimed_gpus_are_left_alone() -> None:
    (blocked,) = plan(snapshot(engine("a", "01", demand=waiting()), claimed=frozenset("1"))).blocked
    assert blocked.kind is BlockKind.BUSY
    assert blocked.reason == "1: a transition is under way"


@pytest.mark.parametrize(
    ("health", "kind"), [(Health.UNKNOWN, BlockKind.GPU_UNKNOWN), (Health.CORDONED, BlockKind.CORDONED)]
)
def test_nothing_wakes_on_a_gpu_that_is_unreadable_or_cordoned(health: Health, kind: BlockKind) -> None:
    gpus = [Gpu("0", 100), Gpu("1", 100, health=health)]
    assert plan(snapshot(engine("a", "01", demand=waiting()), gpus=gpus)).blocked[0].kind is kind


def test_a_gpu_that_nobody_has_read_yet_is_unknown() -> None:
    assert plan(snapshot(engine("a", "01", demand=waiting()), gpus=[Gpu("0", 100)])).blocked[0].kind is (
        BlockKind.GPU_UNKNOWN
    )


def test_foreign_bytes_and_the_reserve_are_never_used() -> None:
    sleeper = engine("a", demand=waiting())
    assert only_swap(plan(snapshot(sleeper, gpus=[Gpu("0", 100, 10, 10)])))
    (blocked,) = plan(snapshot(sleeper, gpus=[Gpu("0", 100, 10, 11)])).blocked
    assert blocked.kind is BlockKind.NEVER_FITS


def test_a_gpu_that_is_overcommitted_already_takes_no_more() -> None:
    small = engine("a", awake=10, demand=waiting())
    crowd = [awake("b", awake=60, pinned=True), awake("c", awake=60, pinned=True)]
    assert plan(snapshot(small, *crowd)).blocked[0].kind is BlockKind.PINNED


# -- whose turn --------------------------------------------------------------------------------------------------------


def test_who_has_waited_longer_goes_first() -> None:
    result = plan(snapshot(engine("new", demand=waiting(9, 1.0)), engine("old", demand=waiting(1, 2.0))))
    assert only_swap(result).reason.startswith("1 request waits for old")
    assert [(b.engine, b.kind) for b in result.blocked] == [("new", BlockKind.BUSY)]


def test_priority_counts_as_waiting_and_is_outgrown_by_it() -> None:
    policy = Policy(priority_worth_s=30.0)
    high = engine("high", priority=1, demand=waiting(1, 0.0))
    for waited_s, first in ((29.0, "high"), (31.0, "low")):
        result = plan(snapshot(high, engine("low", demand=waiting(1, waited_s)), policy=policy))
        admit = only_swap(result).admit
        assert admit is not None
        assert admit.engine == first


def test_engines_on_disjoint_gpus_swap_at_once() -> None:
    fleet = [
        awake("a", "01"),
        engine("b", "01", demand=waiting()),
        awake("c", "23"),
        engine("d", "23", demand=waiting()),
    ]
    swaps = plan(snapshot(*fleet)).swaps
    assert [sorted(s.gpus) for s in swaps] == [["0", "1"], ["2", "3"]]


def test_two_that_would_fit_together_still_go_one_after_the_other_on_one_gpu() -> None:
    result = plan(snapshot(engine("a", awake=30, demand=waiting()), engine("b", awake=30, demand=waiting())))
    assert len(result.swaps) == 1
    assert result.blocked[0].reason == "0: a swap for a begins"


# -- who yields --------------------------------------------------------------------------------------------------------


def test_an_idle_engine_sleeps_for_one_that_is_waited_for() -> None:
    swap = only_swap(plan(snapshot(awake("a"), engine("b", demand=waiting()))))
    (step,) = swap.evict
    assert (step.action, step.engine, step.level) == (Action.SLEEP, "a", Level.HOST)
    assert step.bytes_per_gpu == (("0", -75),)
    assert (step.drain_bound_s, step.force) == (5.0, False)


def test_a_pinned_engine_never_yields() -> None:
    (blocked,) = plan(snapshot(awake("a", pinned=True), engine("b", demand=waiting()))).blocked
    assert blocked.kind is BlockKind.PINNED


def test_a_busy_engine_keeps_its_turn_for_the_minimum_stay() -> None:
    busy = awake("a", awake_since_s=999.0, demand=Demand(in_flight=1))
    result = plan(snapshot(busy, engine("b", demand=waiting())))
    assert result.swaps == ()
    assert (result.blocked[0].kind, result.look_again_at_s) == (BlockKind.STAY, 1001.0)
    assert evicted(only_swap(plan(snapshot(busy, engine("b", demand=waiting()), now_s=1001.0)))) == {"a": Action.SLEEP}


def test_an_idle_engine_has_no_minimum_stay() -> None:
    assert only_swap(plan(snapshot(awake("a", awake_since_s=1000.0), engine("b", demand=waiting())))).evict


def test_the_time_to_look_again_is_when_enough_engines_have_had_their_turn() -> None:
    busy = Demand(in_flight=1)
    fleet = [
        awake("a", awake=30, awake_since_s=999.0, demand=busy),
        awake("b", awake=30, awake_since_s=999.5, demand=busy),
        awake("c", awake=30, awake_since_s=999.9, demand=busy),
        engine("w", awake=60, demand=waiting()),
    ]
    assert plan(snapshot(*fleet)).look_again_at_s == 1001.5


def test_an_engine_whose_streams_may_not_be_frozen_keeps_its_turn() -> None:
    rigid = awake("a", can_freeze=False, demand=Demand(in_flight=1))
    assert plan(snapshot(rigid, engine("b", demand=waiting()))).blocked[0].kind is BlockKind.UNFREEZABLE
    idle = replace(rigid, demand=Demand())
    assert only_swap(plan(snapshot(idle, engine("b", demand=waiting())))).evict


def test_the_engine_least_likely_to_be_wanted_back_yields() -> None:
    fleet = [
        awake("hot", awake=45, demand=Demand(likely_wanted=0.9)),
        awake("cold", awake=45, demand=Demand(likely_wanted=0.1)),
        engine("w", awake=50, demand=waiting()),
    ]
    assert evicted(only_swap(plan(snapshot(*fleet)))) == {"cold": Action.SLEEP}


def test_one_engine_across_two_gpus_yields_rather_than_two_dearer_ones() -> None:
    fleet = [
        awake("wide", "01", awake=45),
        awake("left", "0", awake=45, demand=Demand(likely_wanted=1.0)),
        awake("right", "1", awake=45, demand=Demand(likely_wanted=1.0)),
        engine("w", "01", awake=45, demand=waiting()),
    ]
    assert evicted(only_swap(plan(snapshot(*fleet)))) == {"wide": Action.SLEEP}


def test_an_engine_partly_on_a_claimed_gpu_is_not_asked_and_its_gpus_are_kept_free_meanwhile() -> None:
    fleet = [awake("wide", "01"), engine("w", "0", demand=waiting(1, 9.0)), engine("late", "2", demand=waiting())]
    result = plan(snapshot(*fleet, claimed=frozenset("1")))
    assert [(b.engine, b.kind) for b in result.blocked] == [("w", BlockKind.BUSY)]
    assert [s.admit.engine for s in result.swaps if s.admit] == ["late"]


def test_an_engine_partly_on_an_unreadable_gpu_is_not_asked() -> None:
    gpus = [Gpu("0", 100), Gpu("1", 100, health=Health.UNKNOWN)]
    result = plan(snapshot(awake("wide", "01"), engine("w", "0", demand=waiting()), gpus=gpus))
    assert result.blocked[0].kind is BlockKind.GPU_UNKNOWN


def test_an_engine_on_a_cordoned_gpu_may_still_make_room_elsewhere() -> None:
    gpus = [Gpu("0", 100), Gpu("1", 100, health=Health.CORDONED)]
    result = plan(snapshot(awake("wide", "01"), engine("w", "0", demand=waiting()), gpus=gpus))
    assert evicted(only_swap(result)) == {"wide": Action.SLEEP}


def test_drain_sleep_and_wake_add_up_to_what_a_swap_is_expected_to_take() -> None:
    fleet = [
        awake("a", awake=45, sleep_cost_s=3.0, demand=Demand(in_flight=1)),
        awake("b", awake=45, sleep_cost_s=1.0),
        engine("w", awake=85, wake_cost_s=2.0, demand=waiting()),
    ]
    assert only_swap(plan(snapshot(*fleet))).expected_s == 5.0 + 3.0 + 2.0


# -- how it yields -----------------------------------------------------------------------------------------------------


def test_without_host_ram_for_level_one_the_next_level_is_used() -> None:
    holder = awake("a", host_bytes=50, levels=(Level.HOST, Level.DISCARD))
    (step,) = only_swap(plan(snapshot(holder, engine("b", demand=waiting()), host_budget_bytes=49))).evict
    assert (step.action, step.level) == (Action.SLEEP, Level.DISCARD)
    assert "host RAM has" in step.reason


def test_without_host_ram_and_another_level_the_engine_stops() -> None:
    holder = awake("a", host_bytes=50)
    fleet = snapshot(holder, engine("b", demand=waiting()), host_budget_bytes=80, host_used_bytes=40)
    (step,) = only_swap(plan(fleet)).evict
    assert (step.action, step.level) == (Action.STOP, None)
    assert "host RAM has" in step.reason


def test_without_host_ram_another_level_or_a_stop_it_is_blocked() -> None:
    holder = awake("a", host_bytes=50, can_stop=False)
    (blocked,) = plan(snapshot(holder, engine("b", demand=waiting()), host_budget_bytes=49)).blocked
    assert blocked.kind is BlockKind.HOST_RAM


def test_host_ram_is_counted_over_all_swaps_of_a_plan() -> None:
    fleet = [
        awake("a", "0", host_bytes=50),
        engine("b", "0", demand=waiting()),
        awake("c", "1", host_bytes=50),
        engine("d", "1", demand=waiting()),
    ]
    swaps = plan(snapshot(*fleet, host_budget_bytes=99)).swaps
    assert [evicted(s) for s in swaps] == [{"a": Action.SLEEP}, {"c": Action.STOP}]


def test_the_host_ram_that_a_wake_will_give_back_is_not_counted_on() -> None:
    fleet = [awake("a", host_bytes=50), engine("b", host_bytes=50, demand=waiting())]
    assert evicted(only_swap(plan(snapshot(*fleet, host_budget_bytes=60, host_used_bytes=50)))) == {"a": Action.STOP}


def test_a_sleeper_is_stopped_only_when_all_sleeping_would_not_be_enough() -> None:
    holder = awake("a", demand=Demand(likely_wanted=0.5))
    sleeper, wanted = engine("s", residue=15), engine("w", demand=waiting())
    assert evicted(only_swap(plan(snapshot(holder, sleeper, wanted)))) == {"a": Action.SLEEP}
    wide = engine("s", residue=20)
    assert evicted(only_swap(plan(snapshot(holder, wide, wanted)))) == {"a": Action.SLEEP, "s": Action.STOP}


def test_the_cheapest_sleeper_is_stopped() -> None:
    fleet = [
        engine("liked", residue=15, demand=Demand(likely_wanted=1.0)),
        engine("forgotten", residue=15),
        engine("w", awake=80, demand=waiting()),
    ]
    assert evicted(only_swap(plan(snapshot(*fleet)))) == {"forgotten": Action.STOP}


def test_a_sleeper_with_frozen_streams_is_not_stopped() -> None:
    fleet = [engine("s", residue=25, demand=Demand(frozen=2)), engine("w", awake=80, demand=waiting(1, 99.0))]
    blocked = plan(snapshot(*fleet)).blocked
    assert ("w", BlockKind.UNFREEZABLE) in [(b.engine, b.kind) for b in blocked]


def test_rather_than_stop_a_sleeper_a_wish_waits_for_a_turn_to_end() -> None:
    busy = awake("busy", awake=40, awake_since_s=999.5, demand=Demand(in_flight=1))
    fleet = [busy, engine("s", residue=40), engine("w", awake=55, demand=waiting())]
    result = plan(snapshot(*fleet))
    assert result.swaps == ()
    assert result.blocked[0].kind is BlockKind.STAY


def test_a_pinned_sleeper_is_not_stopped() -> None:
    fleet = [engine("s", residue=25, pinned=True), engine("w", awake=80, demand=waiting())]
    assert plan(snapshot(*fleet)).blocked[0].kind is BlockKind.PINNED


def test_an_attached_engine_sleeps_but_its_residue_stands() -> None:
    attached = awake("a", residue=25, can_stop=False)
    assert plan(snapshot(attached, engine("w", demand=waiting()))).blocked[0].kind is BlockKind.NEVER_FITS
    assert evicted(only_swap(plan(snapshot(attached, engine("w", awake=70, demand=waiting()))))) == {"a": Action.SLEEP}


# -- reservations ------------------------------------------------------------------------------------------------------


def test_a_wish_that_only_has_to_wait_keeps_its_gpus_closed_to_later_ones() -> None:
    busy = awake("busy", "0", awake_since_s=999.5, demand=Demand(in_flight=1))
    fleet = [busy, engine("first", "01", demand=waiting(1, 9.0)), engine("later", "1", demand=waiting(1, 1.0))]
    result = plan(snapshot(*fleet))
    assert result.swaps == ()
    assert [(b.engine, b.kind) for b in result.blocked] == [("first", BlockKind.STAY), ("later", BlockKind.BUSY)]
    assert result.blocked[1].reason == "1: kept for first, whose turn comes first"


def test_the_gpus_of_an_engine_that_must_yield_soon_are_kept_closed_too() -> None:
    busy = awake("busy", "01", awake_since_s=999.5, demand=Demand(in_flight=1))
    fleet = [busy, engine("first", "0", demand=waiting(1, 9.0)), engine("later", "1", awake=15, demand=waiting(1, 1.0))]
    result = plan(snapshot(*fleet))
    assert [(b.engine, b.kind) for b in result.blocked] == [("first", BlockKind.STAY), ("later", BlockKind.BUSY)]


@pytest.mark.parametrize(
    ("hopeless", "gpus"),
    [
        (engine("h", "01", awake=101, demand=waiting(1, 99.0)), None),
        (engine("h", "01", State.QUARANTINED, demand=waiting(1, 99.0)), None),
        (engine("h", "01", State.FAILED, retry_at_s=2000.0, demand=waiting(1, 99.0)), None),
        (engine("h", "01", demand=waiting(1, 99.0)), [Gpu("0", 100), Gpu("1", 100, health=Health.CORDONED)]),
        (engine("h", "01", demand=waiting(1, 99.0)), [Gpu("0", 100), Gpu("1", 100, health=Health.UNKNOWN)]),
    ],
    ids=["never fits", "quarantined", "in backoff", "cordoned", "unreadable"],
)
def test_a_wish_that_waiting_does_not_help_holds_up_nobody(hopeless: object, gpus: list[Gpu] | None) -> None:
    result = plan(snapshot(hopeless, engine("later", "0", demand=waiting()), gpus=gpus))  # type: ignore[arg-type]
    assert [s.admit.engine for s in result.swaps if s.admit] == ["later"]


# -- preload -----------------------------------------------------------------------------------------------------------


def test_an_engine_to_be_preloaded_is_started_when_nobody_else_wants_the_gpu() -> None:
    preload = engine("p", state=State.STOPPED, preload=True)
    assert only_swap(plan(snapshot(preload))).reason.startswith("p is to be loaded at the service's start")
    back = only_swap(plan(snapshot(engine("p", state=State.FAILED, preload=True))))
    assert back.reason.startswith("p failed, its backoff is over")
    result = plan(snapshot(preload, engine("w", demand=waiting())))
    assert [s.admit.engine for s in result.swaps if s.admit] == ["w"]


def test_preloads_take_turns_by_putting_idle_ones_to_sleep_but_never_busy_ones() -> None:
    second = engine("p", state=State.STOPPED, preload=True)
    assert evicted(only_swap(plan(snapshot(awake("a"), second)))) == {"a": Action.SLEEP}
    assert plan(snapshot(awake("a", demand=Demand(in_flight=1)), second)).blocked[0].kind is BlockKind.BUSY


def test_an_engine_that_runs_already_is_not_preloaded_again() -> None:
    assert plan(snapshot(engine("p", preload=True), awake("q", "1", preload=True))).swaps == ()
