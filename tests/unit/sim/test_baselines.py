"""What makes each baseline the policy that it is named after. A sleep takes 1 s and a wake 2 s here."""

from collections.abc import Sequence

import pytest

from rotator.core.values import State
from rotator.sim.baselines import FirstCome, FixedSlices, KeepAlive, LeastRecent
from rotator.sim.box import Box
from tests.unit.sim.machines import Scripted, box, machine, spec

A_AND_B = machine(spec("a"), spec("b"))


def begun(requests: Sequence[tuple[float, int, float]], policy: object, awake: Sequence[int] = (0,)) -> list[float]:
    one = box(A_AND_B, requests, policy, awake)
    one.run()
    assert one.unserved() == 0
    return [round(float(t), 2) for t in one.first_s]


def test_first_come_serves_the_loaded_model_past_older_requests_for_others():
    assert begun([(0, 0, 10), (1, 1, 1), (2, 0, 10), (9, 0, 10)], FirstCome()) == [0, 22, 2, 9]


def test_first_come_never_stops_a_model_that_is_busy():
    one = box(A_AND_B, [(0, 0, 100), (1, 1, 1)], FirstCome(), [0])
    one.run()
    assert float(one.first_s[1]) == 103
    assert one.counts.freezes == 0


def test_first_come_loads_in_order_of_arrival_when_the_gpu_is_free():
    three = machine(spec("a"), spec("b"), spec("c"))
    one = box(three, [(0, 0, 10), (1, 2, 5), (2, 1, 5)], FirstCome(), [0])
    one.run()
    assert float(one.first_s[1]) < float(one.first_s[2])


def test_first_come_unloads_a_model_that_nobody_used_for_its_timeout():
    one = box(A_AND_B, [(0, 0, 10)], FirstCome(30), [0])
    one.run()
    assert one.state[0] is State.ASLEEP
    assert one.now == 10 + 30 + 1


def test_without_a_timeout_a_loaded_model_stays():
    one = box(A_AND_B, [(0, 0, 10)], FirstCome(), [0])
    one.run()
    assert one.state[0] is State.AWAKE


def test_the_cache_closes_its_victim_and_lets_nobody_overtake():
    # unlike first-come: the request at 2 finds its model draining for the older one, and waits a turn
    assert begun([(0, 0, 10), (1, 1, 1), (2, 0, 10)], LeastRecent()) == [0, 13, 17]


def test_the_cache_evicts_who_was_not_used_for_longest():
    half = [spec(name, awake=40, residue=5) for name in "abc"]
    one = box(machine(*half), [(0, 0, 1), (5, 1, 1), (9, 0, 1), (20, 2, 1)], LeastRecent(), [0, 1])
    one.run()
    assert one.state == [State.AWAKE, State.ASLEEP, State.AWAKE]


def test_slices_end_on_time_by_freezing_who_is_served():
    one = box(A_AND_B, [(0, 0, 100), (1, 1, 4)], FixedSlices(30), [0])
    one.run()
    assert float(one.first_s[1]) == pytest.approx(30 + 1 + 2)
    assert one.counts.freezes == 1
    assert one.unserved() == 0


def test_a_slice_ends_early_when_its_engine_has_nothing_to_do():
    assert begun([(0, 0, 3), (1, 1, 4)], FixedSlices(30)) == [0, 6]


def test_a_slice_goes_on_while_nobody_else_wants_in():
    one = box(A_AND_B, [(0, 0, 100)], FixedSlices(30), [0])
    one.run()
    assert one.counts.swaps == 0


def _idle_every(minutes: float, times: int) -> list[tuple[float, int, float]]:
    return [(i * (minutes * 60 + 1), 0, 1.0) for i in range(times)]


def test_a_model_that_comes_back_like_clockwork_is_put_away_and_woken_before():
    one = box(machine(spec("a")), _idle_every(30, 12), KeepAlive(1), [0])
    one.run()
    waits = [float(f - at) for f, at in zip(one.first_s, one.at, strict=True)]
    assert waits[-1] == 0  # it was there
    assert one.counts.sleeps >= 5  # and did not stay there


def test_a_model_without_a_pattern_is_kept_for_the_whole_range():
    one = box(machine(spec("a")), [(0, 0, 1), (3000, 0, 1), (3500, 0, 1)], KeepAlive(1), [0])
    one.run()
    assert one.now == pytest.approx(3501 + 240 * 60 + 1)  # then it sleeps


def test_a_model_that_is_away_for_longer_than_the_range_is_forecast():
    one = box(machine(spec("a")), _idle_every(600, 9), KeepAlive(1), [0])
    one.run()
    waits = [float(f - at) for f, at in zip(one.first_s, one.at, strict=True)]
    assert waits[1] > 0  # nothing was known yet
    assert waits[-1] == 0


def test_keep_alive_gives_way_to_a_request_for_another_model():
    assert begun([(0, 0, 10), (20, 1, 1)], KeepAlive(2)) == [0, 23]


def test_short_host_ram_stops_the_sleeper_that_was_used_longest_ago():
    small = machine(spec("a"), spec("b"), spec("c"), host=50)
    one = box(small, [(0, 0, 1), (10, 1, 1), (200, 2, 1)], LeastRecent())
    one.run()
    assert one.unserved() == 0
    assert one.state == [State.STOPPED, State.ASLEEP, State.AWAKE]
    assert one.host_used == 50


def test_no_baseline_decides_by_what_it_cannot_know():
    """The same arrivals with other service times of requests to come give the same decisions until they end."""
    for policy in (FirstCome, LeastRecent, lambda: FixedSlices(30)):
        first: list[Box] = []
        for last in (5.0, 500.0):
            one = box(A_AND_B, [(0, 0, 10), (1, 1, 4), (40, 0, last)], policy(), [0])
            one.run(40.0)
            first.append(one)
        assert list(first[0].first_s[:2]) == list(first[1].first_s[:2])


def test_a_policy_that_does_nothing_serves_only_who_is_awake():
    one = box(A_AND_B, [(0, 0, 1), (0, 1, 1)], Scripted(), [0])
    one.run()
    assert one.unserved() == 1
