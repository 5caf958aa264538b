"""What an engine's past says about its next request: gaps, hours, chains, times of service."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rotator.core.history import Chains, History, expect

HOUR_S = 3600.0
DAY_S = 86_400.0


def after(*gaps_s: float, begin_s: float = 0.0) -> tuple[History, float]:
    """A history of requests with these gaps between them, and when the last one came."""
    history, now_s = History(), begin_s
    history.arrived(now_s)
    for gap_s in gaps_s:
        now_s += gap_s
        history.arrived(now_s)
    return history, now_s


def test_a_model_that_nobody_asked_for_is_not_likely_wanted() -> None:
    assert History().chance(10.0, 60.0) == 0.0
    assert History().rate_per_s(10.0) == 0.0


def test_a_model_asked_for_every_second_is_almost_surely_wanted_within_a_minute() -> None:
    history, now_s = after(*[1.0] * 30)
    assert history.chance(now_s + 0.5, 60.0) > 0.99
    assert history.rate_per_s(now_s) == pytest.approx(1.0)


def test_silence_makes_the_next_request_less_likely() -> None:
    history, now_s = after(*[1.0] * 30)
    assert history.chance(now_s + HOUR_S, 60.0) < 0.05


def test_a_silence_between_bursts_tells_when_the_next_burst_is_due() -> None:
    """Requests come in pairs two seconds apart, a minute between the pairs: after two seconds of silence none comes for
    long, after half a minute one is near."""
    history, now_s = after(*[2.0, 60.0] * 40)
    history.arrived(now_s + 2.0)
    now_s += 2.0
    assert history.chance(now_s + 8.0, 10.0) < 0.05
    assert history.chance(now_s + 40.0, 30.0) > 0.9


def test_what_was_long_ago_is_forgotten_by_use() -> None:
    history, now_s = after(*[1.0] * 200, *[600.0] * 100)
    assert history.chance(now_s + 5.0, 10.0) < 0.2
    assert history.rate_per_s(now_s) < 1 / 300


def test_the_usual_hour_is_learned_over_days() -> None:
    """Every day at nine a dozen requests, nothing else: before nine it is expected, after noon it is not."""
    history = History()
    for day in range(7):
        for minute in range(12):
            at_s = day * DAY_S + 9 * HOUR_S + minute * 60
            history.arrived(at_s, at_s)
    week_s = 7 * DAY_S
    assert history.by_hour(week_s + 9 * HOUR_S - 60, 300.0) > 0.8
    assert history.by_hour(week_s + 13 * HOUR_S, 300.0) == 0.0
    assert expect(history, Chains(), "a", week_s + 9 * HOUR_S, 300.0, week_s + 9 * HOUR_S).why == (
        "as usual at this time of day"
    )


def test_an_hour_of_days_without_requests_is_forgotten() -> None:
    history = History()
    for day in range(7):
        at_s = day * DAY_S + 9 * HOUR_S
        history.arrived(at_s, at_s)
    fresh = history.hour_rate_per_s(7 * DAY_S + 9 * HOUR_S)
    assert 0 < history.hour_rate_per_s(20 * DAY_S + 9 * HOUR_S) < fresh / 10


def test_a_coder_is_expected_after_its_planner() -> None:
    chains, now_s = Chains(), 0.0
    for _ in range(20):
        chains.arrived("planner", now_s)
        chains.arrived("coder", now_s + 5.0)
        now_s += 1000.0
    chains.arrived("planner", now_s)
    chance, last = chains.chance("coder", now_s + 1.0)
    assert (chance > 0.9, last) == (True, "planner")
    assert chains.chance("other", now_s + 1.0) == (0.0, None)
    assert chains.chance("coder", now_s + 1000.0) == (0.0, None)
    assert expect(History(), chains, "coder", now_s + 1.0, 60.0).why == "as it often follows planner"


def test_a_chain_that_mostly_goes_elsewhere_is_worth_its_share() -> None:
    chains, dice = Chains(), random.Random(3)
    for turn in range(400):
        chains.arrived("planner", turn * 100.0)
        chains.arrived("coder" if dice.random() < 0.25 else "writer", turn * 100.0 + 5.0)
    chains.arrived("planner", 400 * 100.0)
    assert chains.chance("coder", 400 * 100.0)[0] == pytest.approx(0.25, abs=0.12)


def test_service_times_are_smoothed() -> None:
    history = History()
    assert history.service_s is None
    history.served(10.0)
    assert history.service_s == 10.0
    history.served(20.0)
    assert 10.0 < (history.service_s or 0.0) < 20.0


def test_a_history_survives_as_json() -> None:
    history, now_s = after(*[5.0, 120.0] * 30)
    history.arrived(now_s + 1.0, now_s + 1.0)
    history.served(7.0)
    again = History.of_json(history.as_json())
    assert again.as_json() == history.as_json()
    assert again.service_s == 7.0
    again.arrived(now_s + 1.0)
    assert again.chance(now_s + 2.0, 60.0) == pytest.approx(history.chance(now_s + 2.0, 60.0), abs=0.05)


@pytest.mark.parametrize("junk", [{}, {"gaps": "x"}, {"gaps": [1.0]}, {"slots": 7}])
def test_what_is_no_history_is_an_empty_one(junk: dict[str, object]) -> None:
    assert History.of_json(junk).chance(10.0, 60.0) == 0.0


@given(st.lists(st.floats(0, 1e6), max_size=60), st.floats(0, 1e6), st.floats(0, 1e6), st.none() | st.floats(0, 1e9))
def test_a_chance_is_a_chance_and_a_longer_horizon_never_makes_it_less(
    gaps_s: list[float], silence_s: float, horizon_s: float, local_s: float | None
) -> None:
    history, now_s = after(*gaps_s)
    near = expect(history, Chains(), "a", now_s + silence_s, horizon_s, local_s).chance
    far = expect(history, Chains(), "a", now_s + silence_s, horizon_s + 10.0, local_s).chance
    assert 0.0 <= near <= far + 1e-9 <= 1.0 + 1e-9


def test_weights_stay_finite_over_any_number_of_requests() -> None:
    history, now_s = after(*[0.5] * 5000)
    assert history.rate_per_s(now_s) == pytest.approx(2.0)
