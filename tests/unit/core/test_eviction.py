"""The cheapest set of engines to yield, against brute force, and what yielding costs."""

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rotator.core.eviction import EXACT_MAX, Option, cheapest, sleep_options, stop_option
from rotator.core.placement import charge
from rotator.core.values import Action, Demand, Engine, Level, Policy
from tests.unit.core.fleets import awake, engine

POLICY = Policy(drain_bound_s=5.0)


def option(name: str, cost_s: float, host_bytes: int = 0, **frees: int) -> Option:
    return Option(engine(name), Action.SLEEP, Level.HOST, frees, cost_s, host_bytes)


def cost_s(options: Sequence[Option]) -> float:
    return sum(o.cost_s for o in options)


def covered(deficits: dict[str, int], options: Sequence[Option]) -> bool:
    return all(sum(o.frees.get(gpu, 0) for o in options) >= size for gpu, size in deficits.items())


def brute_force(deficits: dict[str, int], offers: list[list[Option]], host_free: int) -> float | None:
    """The least cost over every combination there is."""
    costs = []
    for picks in itertools.product(*[[None, *options] for options in offers]):
        chosen = [o for o in picks if o is not None]
        if covered(deficits, chosen) and sum(o.host_bytes for o in chosen) <= host_free:
            costs.append(cost_s(chosen))
    return min(costs, default=None)


@st.composite
def problems(draw: st.DrawFn, most: int) -> tuple[dict[str, int], list[list[Option]], int]:
    gpus = "abc"[: draw(st.integers(1, 3))]
    deficits = {gpu: draw(st.integers(1, 100)) for gpu in gpus}
    offers = []
    for i in range(draw(st.integers(0, most))):
        options: list[Option] = []
        for _ in range(draw(st.integers(1, 2))):
            cost = draw(st.floats(0, 10)) + (options[-1].cost_s if options else 0.0)
            frees = {gpu: draw(st.integers(0, 60)) for gpu in gpus}
            options.append(option(f"e{i}", cost, draw(st.sampled_from((0, 0, 30, 60))), **frees))
        offers.append(options)
    return deficits, offers, draw(st.sampled_from((0, 50, 100, 1000)))


@settings(max_examples=300, deadline=None)
@given(problems(most=6))
def test_the_exact_search_is_as_cheap_as_trying_everything(
    problem: tuple[dict[str, int], list[list[Option]], int],
) -> None:
    deficits, offers, host_free = problem
    expected, found = brute_force(deficits, offers, host_free), cheapest(deficits, offers, host_free)
    if expected is None:
        assert found is None
    else:
        assert found is not None
        assert cost_s(found) == pytest.approx(expected, abs=1e-6)


@settings(max_examples=200, deadline=None)
@given(problems(most=EXACT_MAX + 8))
def test_whatever_is_chosen_covers_within_host_ram_and_holds_nobody_superfluous(
    problem: tuple[dict[str, int], list[list[Option]], int],
) -> None:
    deficits, offers, host_free = problem
    found = cheapest(deficits, offers, host_free)
    if found is not None:
        assert covered(deficits, found)
        assert sum(o.host_bytes for o in found) <= host_free
        assert len({o.engine.name for o in found}) == len(found)
        for left_out in found:
            assert not covered(deficits, [o for o in found if o is not left_out])


def test_a_crowd_too_large_for_exact_search_still_yields_enough() -> None:
    offers = [[option(f"e{i}", 1.0 + i % 7, a=5)] for i in range(40)]
    found = cheapest({"a": 100}, offers, 0)
    assert found is not None
    assert len(found) == 20
    assert cost_s(found) < cost_s([o for (o,) in offers[:20]])


def test_a_crowd_with_little_host_ram_uses_levels_that_need_none() -> None:
    offers = [[option(f"e{i}", 1.0, 10, a=5), option(f"e{i}", 2.0, 0, a=5)] for i in range(20)]
    found = cheapest({"a": 100}, offers, 35)
    assert found is not None
    assert sum(o.host_bytes for o in found) <= 35


def test_the_larger_of_two_is_asked_when_two_small_ones_would_cost_more() -> None:
    offers = [[option("small", 2.0, a=50)], [option("other", 2.0, a=50)], [option("large", 3.0, a=100)]]
    found = cheapest({"a": 100}, offers, 0)
    assert [o.engine.name for o in found or ()] == ["large"]


def sleep_cost_s(target: Engine) -> float:
    return sleep_options(target, charge(target), POLICY)[0].cost_s


def test_who_is_likely_wanted_back_costs_more() -> None:
    idle, likely = awake("a", wake_cost_s=4.0), awake("b", wake_cost_s=4.0, demand=Demand(likely_wanted=0.5))
    assert sleep_cost_s(likely) == pytest.approx(sleep_cost_s(idle) + 2.0)


def test_who_is_waited_for_counts_as_surely_wanted_back() -> None:
    idle, waited = awake("a", wake_cost_s=4.0), awake("b", wake_cost_s=4.0, demand=Demand(waiting=1))
    assert sleep_cost_s(waited) == pytest.approx(sleep_cost_s(idle) + 4.0)


def test_every_stream_that_would_stand_still_adds_to_the_cost() -> None:
    one, three = awake("a", demand=Demand(in_flight=1)), awake("b", demand=Demand(in_flight=3))
    assert sleep_cost_s(awake("c")) + POLICY.drain_bound_s < sleep_cost_s(one) < sleep_cost_s(three)


def test_a_sleep_frees_all_but_the_residue_and_a_stop_frees_that_too() -> None:
    target = awake("a", "01")
    assert sleep_options(target, charge(target), POLICY)[0].frees == {"0": 75, "1": 75}
    assert stop_option(target, charge(target), POLICY).frees == {"0": 80, "1": 80}


def test_no_later_way_to_yield_is_cheaper_than_an_earlier_one() -> None:
    target = awake("a", levels=(Level.DISCARD, Level.HOST), wake_cost_s=9.0, start_cost_s=1.0, demand=Demand(waiting=1))
    sleeps = sleep_options(target, charge(target), POLICY)
    stop = stop_option(target, charge(target), POLICY, sleeps[-1].cost_s)
    costs = [o.cost_s for o in (*sleeps, stop)]
    assert [o.level for o in sleeps] == [Level.DISCARD, Level.HOST]
    assert costs == sorted(costs)


def test_a_pause_frees_nothing_and_is_no_way_to_yield() -> None:
    target = awake("a", levels=(Level.PAUSE,))
    assert sleep_options(target, charge(target), POLICY) == []


def test_only_level_one_takes_host_ram() -> None:
    target = awake("a", levels=(Level.HOST, Level.DISCARD), host_bytes=70)
    assert [o.host_bytes for o in sleep_options(target, charge(target), POLICY)] == [70, 0]
