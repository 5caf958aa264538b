"""What the calendar asks the planner for, and what others are told who must wait for it."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rotator.core.calendar import Bookings, collisions, in_force, resolve
from rotator.core.planner import plan
from rotator.core.values import (
    Action,
    BlockKind,
    Calendar,
    Command,
    CommandKind,
    Demand,
    Gpu,
    Policy,
    Snapshot,
    State,
    Window,
)
from tests.unit.core.fleets import awake, engine, evicted, only_swap, snapshot, snapshots, used, waiting

NOW_S = 1000.0


def window(name: str, *engines: str, begins_s: float = 900.0, ends_s: float = 4600.0, priority: int = 0) -> Window:
    return Window(f"window '{name}'", engines, begins_s, ends_s, priority, until="17:00")


def calendar(*windows: Window, **more: object) -> Calendar:
    return Calendar(windows, **more)  # type: ignore[arg-type]


def test_a_window_wakes_its_engine_and_says_so():
    swap = only_swap(plan(snapshot(engine("a"), awake("b"), calendar=calendar(window("office", "a")))))
    assert swap.admit is not None
    assert swap.admit.action is Action.WAKE
    assert evicted(swap) == {"b": Action.SLEEP}
    assert swap.reason.startswith("window 'office' (until 17:00) keeps a awake")


def test_a_window_never_forces_and_gives_streams_the_longest_time_to_finish():
    busy = awake("b", demand=Demand(in_flight=2))
    swap = only_swap(plan(snapshot(engine("a"), busy, calendar=calendar(window("office", "a")))))
    assert [step.force for step in swap.evict] == [False]
    assert swap.evict[0].drain_bound_s == Policy().drain_max_s


def test_a_window_waits_for_streams_that_may_not_be_frozen():
    busy = awake("b", demand=Demand(in_flight=2), can_freeze=False)
    made = plan(snapshot(engine("a"), busy, calendar=calendar(window("office", "a"))))
    assert made.swaps == ()
    assert [(b.engine, b.kind) for b in made.blocked] == [("a", BlockKind.UNFREEZABLE)]


def test_who_wants_the_gpu_of_a_held_engine_is_told_until_when():
    made = plan(snapshot(awake("a"), engine("b", demand=waiting()), calendar=calendar(window("office", "a"))))
    assert made.swaps == ()
    (blocked,) = made.blocked
    assert (blocked.engine, blocked.kind, blocked.until_s) == ("b", BlockKind.HELD, 4600.0)
    assert "a is kept awake by window 'office' (until 17:00)" in blocked.reason


def test_a_window_goes_before_clients_and_after_operators():
    fleet = (engine("a"), engine("b", demand=waiting(9, 500.0)), awake("c"))
    assert only_swap(plan(snapshot(*fleet, calendar=calendar(window("w", "a"))))).admit.engine == "a"  # type: ignore[union-attr]
    operator = (Command(CommandKind.SLEEP, "c"),)
    made = plan(snapshot(*fleet, calendar=calendar(window("w", "a")), commands=operator))
    assert only_swap(made).admit is None
    assert evicted(only_swap(made)) == {"c": Action.SLEEP}


@pytest.mark.parametrize(("now_s", "held"), [(899.9, False), (900.0, True), (4599.9, True), (4600.0, False)])
def test_a_window_lasts_from_its_begin_to_just_before_its_end(now_s: float, held: bool):
    schedule = resolve(snapshot(engine("a"), now_s=now_s, calendar=calendar(window("w", "a"))))
    assert ("a" in schedule.held) is held


def test_the_planner_looks_again_when_a_window_begins_or_ends():
    coming = window("w", "a", begins_s=1500.0)
    assert plan(snapshot(engine("a"), calendar=calendar(coming))).look_again_at_s == 1500.0
    assert plan(snapshot(awake("a"), calendar=calendar(window("w", "a")))).look_again_at_s == 4600.0


def test_of_two_windows_that_do_not_fit_the_higher_priority_holds_and_the_other_is_told_why():
    low, high = window("low", "b"), window("high", "a", priority=5, ends_s=2000.0)
    made = plan(snapshot(engine("a"), awake("b"), calendar=calendar(low, high)))
    assert only_swap(made).admit.engine == "a"  # type: ignore[union-attr]
    (told,) = [b for b in made.blocked if b.engine == "b"]
    assert told.kind is BlockKind.HELD
    assert told.until_s == 2000.0
    assert "window 'low'" in told.reason
    assert "a is kept awake by window 'high'" in told.reason


def test_of_equal_priorities_the_window_that_began_first_goes_on():
    first, second = window("z", "a", begins_s=100.0), window("a", "b", begins_s=200.0)
    assert [w.name for w in in_force((second, first), NOW_S)] == ["window 'z'", "window 'a'"]
    assert set(resolve(snapshot(awake("a"), engine("b"), calendar=calendar(second, first))).held) == {"a"}


def test_engines_of_a_window_that_fit_together_are_all_held():
    pair = (engine("a", awake=40), engine("b", awake=40))
    assert set(resolve(snapshot(*pair, calendar=calendar(window("pair", "a", "b")))).held) == {"a", "b"}


def test_a_window_yields_to_an_operators_pin():
    made = resolve(snapshot(engine("a"), awake("p", pinned=True), calendar=calendar(window("w", "a"))))
    assert made.held == {}
    assert "p is pinned" in made.overruled[0].reason


def test_an_engine_in_two_windows_is_held_until_the_later_end():
    both = calendar(window("one", "a", ends_s=2000.0), window("two", "a", ends_s=3000.0))
    assert resolve(snapshot(awake("a"), calendar=both)).held["a"].until_s == 3000.0


def test_a_window_of_an_engine_that_is_gone_changes_nothing():
    assert resolve(snapshot(awake("a"), calendar=calendar(window("w", "gone")))).held == {}


def test_collisions_are_found_with_their_times():
    engines = {e.name: e for e in (engine("a"), engine("b"), engine("c", "1"))}
    gpus = {"0": Gpu("0", 100), "1": Gpu("1", 100)}
    windows = (
        window("day", "a", begins_s=0.0, ends_s=50.0),
        window("night", "b", begins_s=40.0, ends_s=90.0),
        window("other", "c", begins_s=45.0, ends_s=60.0),
    )
    found = list(collisions(gpus, engines, windows))
    assert [(at_s, w.name, name, c.others) for at_s, w, name, c in found] == [
        (40.0, "window 'night'", "b", ("a",)),
        (45.0, "window 'night'", "b", ("a",)),
    ]


def test_booking_counts_what_an_attached_engine_keeps_asleep():
    attached = engine("x", residue=30, can_stop=False)
    bookings = Bookings({"0": Gpu("0", 100)}, [attached])
    conflict = bookings.book(engine("a", awake=80), window("w", "a"))
    assert conflict is not None
    assert conflict.others == ("x",)
    assert bookings.book(engine("a", awake=70), window("w", "a")) is None


# -- default engines -------------------------------------------------------------------------------------------------


def _default(*fleet: object, **more: object) -> Snapshot:
    return snapshot(*fleet, calendar=Calendar(defaults=("d",), **more))  # type: ignore[arg-type]


def test_the_default_engine_comes_back_where_there_is_room():
    swap = only_swap(plan(_default(engine("d"))))
    assert swap.admit is not None
    assert "d is the default engine" in swap.reason


def test_the_default_engine_comes_back_after_the_others_were_idle_for_long_enough():
    waits = plan(_default(engine("d"), awake("a", demand=Demand(last_used_s=950.0)), default_after_s=60.0))
    assert waits.swaps == ()
    assert waits.look_again_at_s == 1010.0
    now = plan(_default(engine("d"), awake("a", demand=Demand(last_used_s=940.0)), default_after_s=60.0))
    assert evicted(only_swap(now)) == {"a": Action.SLEEP}


def test_the_default_engine_comes_back_at_the_end_of_a_window_at_once():
    ended = {"a": 999.0}
    before, since = (awake("a", demand=Demand(last_used_s=used_s)) for used_s in (950.0, 999.5))
    assert evicted(only_swap(plan(_default(engine("d"), before, released_s=ended)))) == {"a": Action.SLEEP}
    assert plan(_default(engine("d"), since, released_s=ended)).swaps == ()


@pytest.mark.parametrize("demand", [Demand(waiting=1), Demand(in_flight=1)])
def test_the_default_engine_disturbs_nobody_who_is_busy(demand: Demand):
    made = plan(_default(engine("d"), awake("a", demand=demand), default_after_s=1.0, released_s={"a": 999.0}))
    assert made.swaps == ()


def test_the_default_engine_comes_after_clients():
    made = plan(_default(engine("d"), engine("b", demand=waiting()), default_after_s=1.0))
    assert only_swap(made).admit.engine == "b"  # type: ignore[union-attr]


def test_a_default_engine_that_is_awake_or_moving_is_not_called():
    assert resolve(_default(awake("d"))).defaults == ()
    assert resolve(_default(engine("d", state=State.WAKING))).defaults == ()


def test_the_default_engine_waits_for_the_end_of_a_window_in_its_way():
    held = Calendar((window("w", "a"),), ("d",), 1.0)
    made = plan(snapshot(engine("d"), awake("a"), calendar=held))
    assert made.swaps == ()
    assert [(b.engine, b.kind) for b in made.blocked] == [("d", BlockKind.HELD)]


# -- any fleet, any calendar -----------------------------------------------------------------------------------------


@st.composite
def calendars(draw: st.DrawFn) -> Calendar:
    names = st.lists(st.sampled_from(("e0", "e1", "e2", "gone")), min_size=1, max_size=2, unique=True).map(tuple)
    begins = st.sampled_from((100.0, 999.0, 1000.0, 1500.0))
    windows = [
        Window(f"w{n}", draw(names), draw(begins), draw(st.sampled_from((1000.0, 2000.0))), draw(st.integers(-1, 1)))
        for n in range(draw(st.integers(0, 4)))
    ]
    after_s = draw(st.sampled_from((None, 10.0)))
    return Calendar(tuple(windows), draw(names), after_s, {"e2": 999.0})


@settings(max_examples=40, deadline=None)
@given(snapshots(), calendars())
def test_no_calendar_overcommits_forces_or_evicts_whom_it_holds(seen: Snapshot, days: Calendar):
    seen = replace(seen, calendar=days)
    held = resolve(seen).held
    made = plan(seen)
    asked = {c.engine for c in seen.commands}
    for swap in made.swaps:
        for step in swap.evict:
            assert step.engine not in held or step.engine in asked
            assert not step.force or swap.command is not None or step.engine in asked
        if swap.admit is not None:
            for gpu, size in swap.admit.bytes_per_gpu:
                freed = -sum(dict(step.bytes_per_gpu).get(gpu, 0) for step in swap.evict)
                assert used(seen, gpu) - freed + size <= max(seen.gpus[gpu].total_bytes, used(seen, gpu) - freed)


@settings(max_examples=40, deadline=None)
@given(snapshots(), calendars())
def test_what_is_held_fits_together(seen: Snapshot, days: Calendar):
    held = resolve(replace(seen, calendar=days)).held
    for id, gpu in seen.gpus.items():
        kept = [e for e in seen.engines.values() if id in e.gpus and (e.name in held or e.pinned)]
        booked = sum(e.awake_bytes[e.gpus.index(id)] for e in kept if e.name in held)
        pinned = sum(e.awake_bytes[e.gpus.index(id)] for e in kept if e.pinned and e.name not in held)
        assert not booked or booked + pinned <= gpu.total_bytes - gpu.reserve_bytes
