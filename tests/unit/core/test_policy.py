"""Turns, waits, backoff: the judgements around a plan."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rotator.core.policy import (
    backoff_s,
    by_turn,
    eta_s,
    smooth,
)
from rotator.core.values import Demand, Gpu, Policy, State
from tests.unit.core.fleets import awake, engine, snapshot, waiting

# -- turns -------------------------------------------------------------------------------------------------------------


def test_turns_go_by_waiting_and_priority_and_then_by_name() -> None:
    policy = Policy(priority_worth_s=30.0)
    fleet = [
        engine("c", demand=waiting(1, 5.0)),
        engine("b", demand=waiting(1, 5.0)),
        engine("high", priority=1, demand=waiting(1, 0.0)),
        engine("old", demand=waiting(1, 40.0)),
        engine("nobody"),
        awake("served", demand=waiting(1, 99.0)),
    ]
    assert [e.name for e in by_turn(snapshot(*fleet, policy=policy))] == ["old", "high", "b", "c"]


# -- waits -------------------------------------------------------------------------------------------------------------


def test_an_awake_engine_can_serve_now() -> None:
    assert eta_s(snapshot(awake("a")), "a") == 0.0


def test_a_sleeper_with_room_takes_its_wake() -> None:
    assert eta_s(snapshot(engine("a", wake_cost_s=2.5)), "a") == 2.5


def test_a_sleeper_without_room_also_takes_the_sleep_of_who_is_in_its_way() -> None:
    assert eta_s(snapshot(engine("a", wake_cost_s=2.5), awake("b", sleep_cost_s=1.5)), "a") == 4.0


def test_streams_in_the_way_are_drained_first() -> None:
    busy = awake("b", sleep_cost_s=1.5, demand=Demand(in_flight=1))
    assert eta_s(snapshot(engine("a", wake_cost_s=2.5), busy), "a") == 9.0


def test_every_earlier_turn_on_its_gpus_adds_to_the_wait() -> None:
    policy = Policy(min_stay_s=2.0)
    mine = engine("mine", "01", wake_cost_s=2.5)
    before = engine("before", "1", demand=waiting(1, 9.0), wake_cost_s=3.0, sleep_cost_s=1.0)
    elsewhere = engine("elsewhere", "2", demand=waiting(1, 9.0))
    assert eta_s(snapshot(mine, before, elsewhere, policy=policy), "mine") == 3.0 + 1.0 + 2.0 + 2.5


def test_later_turns_do_not_count() -> None:
    mine = engine("mine", demand=waiting(1, 9.0), wake_cost_s=2.5)
    assert eta_s(snapshot(mine, engine("later", demand=waiting(1, 1.0))), "mine") == 2.5


@pytest.mark.parametrize(
    ("state", "expected_s"),
    [
        (State.WAKING, 2.0),
        (State.STARTING, 70.0),
        (State.STOPPED, 70.0),
        (State.FALLING_ASLEEP, 3.0),
        (State.STOPPING, 71.0),
        (State.QUARANTINED, None),
    ],
)
def test_what_an_engine_is_doing_decides_its_wait(state: State, expected_s: float | None) -> None:
    target = engine("a", state=state, wake_cost_s=2.0, sleep_cost_s=1.0, start_cost_s=70.0)
    assert eta_s(snapshot(target), "a") == expected_s


def test_a_failed_engine_waits_for_its_backoff_and_its_start() -> None:
    failed = engine("a", state=State.FAILED, retry_at_s=1010.0, start_cost_s=70.0)
    assert eta_s(snapshot(failed), "a") == 80.0
    assert eta_s(snapshot(replace(failed, retry_at_s=0.0)), "a") == 70.0


def test_anothers_transition_on_its_gpus_is_waited_for() -> None:
    starting = engine("other", state=State.STARTING, awake=5, start_cost_s=70.0)
    assert eta_s(snapshot(engine("a", wake_cost_s=2.0), starting), "a") == 72.0


def test_nobody_can_say_when_an_engine_that_never_fits_will_serve() -> None:
    assert eta_s(snapshot(engine("a", awake=101)), "a") is None
    assert eta_s(snapshot(engine("a", "9"), gpus=[Gpu("0", 100)]), "a") is None


# -- backoff and costs -------------------------------------------------------------------------------------------------


def test_backoff_doubles_up_to_its_maximum() -> None:
    assert [backoff_s(n, 5.0, 60.0) for n in range(6)] == [0.0, 5.0, 10.0, 20.0, 40.0, 60.0]


def test_backoff_stays_finite_after_any_number_of_failures() -> None:
    assert backoff_s(10**6, 5.0, 600.0) == 600.0


def test_a_first_measurement_is_believed_and_later_ones_by_their_weight() -> None:
    assert smooth(None, 4.0) == 4.0
    assert smooth(4.0, 8.0, weight=0.25) == 5.0


@given(st.floats(0, 100), st.floats(0, 100))
def test_a_smoothed_cost_lies_between_the_old_and_the_new(old: float, new: float) -> None:
    assert min(old, new) - 1e-9 <= smooth(old, new) <= max(old, new) + 1e-9
