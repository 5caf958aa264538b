"""Figures, charts, synthetic traces and the way from a trace to a machine."""

import xml.etree.ElementTree as ET
from array import array

import pytest

from rotator.core.values import State
from rotator.sim.generate import Shape, generate
from rotator.sim.plot import Chart, Line, svg
from rotator.sim.report import jain, percentile, result
from rotator.sim.trace import TraceError, make
from rotator.sim.workload import Workload, assign, at_load, load, occupancy_s, spread
from tests.unit.sim.machines import Scripted, box, machine, spec


def test_fairness_is_one_where_all_fare_alike_and_an_nth_where_one_bears_it_all():
    assert jain([3, 3, 3]) == pytest.approx(1)
    assert jain([9, 0, 0]) == pytest.approx(1 / 3)
    assert jain([0, 0]) == jain([]) == 1


def test_a_percentile_is_a_value_that_was_seen():
    assert [percentile([1, 2, 3, 4], share) for share in (0, 0.5, 0.51, 1)] == [1, 2, 3, 4]
    assert percentile([], 0.5) == 0


def test_a_result_tells_waits_from_stalls_and_counts_who_was_never_served():
    one = box(machine(spec("a"), spec("b")), [(0, 0, 5), (0, 1, 5)], Scripted(), [0])
    one.run()
    seen = result("x", one, deadline_s=60)
    assert (seen.requests, seen.unserved, seen.wait_mean_s, seen.within_deadline) == (2, 1, 0, 0.5)
    one.first_s[1], one.done_s[1] = 30.0, 75.0  # 30 s at the gate, then 40 s frozen
    seen = result("x", one, deadline_s=60)
    assert (seen.wait_max_s, seen.stall_max_s, seen.delay_max_s) == (30, 40, 70)
    assert (seen.delay_mean_s, seen.within_deadline, seen.unserved) == (35, 0.5, 0)


def test_a_wait_for_an_engine_to_open_is_told_from_one_for_a_slot_in_it():
    wake = Scripted(lambda box: box.swap(0) if box.waiting[0] and not box.swaps else None)
    one = box(machine(spec("a", slots=1)), [(0, 0, 10), (0, 0, 10)], wake)
    one.run()
    seen = result("x", one)
    assert (seen.gate_max_s, seen.wait_max_s) == (2, 12)


def test_a_chart_is_well_formed_and_draws_every_line():
    lines = [Line("ours <1>", [(0.1, 1), (10, 50)], True), Line("b", [(0, 0), (5, 20)])]
    for logs in (False, True):
        root = ET.fromstring(svg(Chart("A & B", "x", "y", lines, log_x=logs, log_y=logs)))
        drawn = root.findall("{http://www.w3.org/2000/svg}polyline")
        assert len(drawn) == 2
        for line in drawn:
            for point in line.attrib["points"].split():
                x, y = map(float, point.split(","))
                assert 0 <= x <= 760
                assert 0 <= y <= 420


def test_the_same_seed_makes_the_same_trace_and_another_one_another():
    shape = Shape(duration_s=3600, rate_per_s=0.2, burst=3, chain=0.5, day=0.5)
    same, other = generate(shape), generate(Shape(duration_s=3600, rate_per_s=0.2, burst=3, chain=0.5, day=0.5, seed=2))
    assert list(generate(shape).at_s) == list(same.at_s)
    assert list(other.at_s) != list(same.at_s)


def test_a_synthetic_trace_has_the_rate_and_the_skew_that_were_asked_for():
    for shape in (
        Shape(duration_s=86_400, rate_per_s=0.2, models=4, skew=1.0),
        Shape(duration_s=86_400, rate_per_s=0.2, models=4, skew=1.0, burst=5, chain=0.5, day=0.9),
    ):
        trace = generate(shape)
        assert len(trace) / shape.duration_s == pytest.approx(0.2, rel=0.1)
    counts = [list(generate(Shape(rate_per_s=0.5, models=2, skew=2.0)).model).count(i) for i in (0, 1)]
    assert max(counts) / min(counts) == pytest.approx(4, rel=0.2)


def test_a_chain_is_a_planner_and_then_its_coder():
    trace = generate(Shape(duration_s=36_000, rate_per_s=0.01, models=2, skew=0.0, chain=1.0, service_s=5, spread=0))
    after = [b - a for a, b in zip(trace.at_s, list(trace.at_s)[1:], strict=False)]
    linked = sum(1 for gap in after if 5.5 <= gap <= 7.0)
    assert linked > len(trace) / 4


def test_nights_are_quiet():
    trace = generate(Shape(duration_s=10 * 86_400, rate_per_s=0.05, day=0.9))
    noon = sum(1 for t in trace.at_s if 9 <= t % 86_400 / 3600 < 15)
    night = sum(1 for t in trace.at_s if not 3 <= t % 86_400 / 3600 < 21)
    assert noon > 4 * night


@pytest.mark.parametrize("shape", [Shape(rate_per_s=0), Shape(burst=0.5), Shape(duration_s=1e9, rate_per_s=1)])
def test_a_trace_that_cannot_be_is_refused(shape: Shape):
    with pytest.raises(TraceError):
        generate(shape)


TWO = machine(spec("heavy", [0, 1], slots=2), spec("light", [0], slots=4))


def test_the_most_wanted_model_becomes_the_first_engine_and_the_rest_is_left_out():
    trace = make([(0, "x", 1), (1, "y", 1), (2, "y", 1), (3, "z", 1), (4, "x", 1), (5, "y", 1)])
    work = assign(trace, TWO)
    assert (list(work.engine), work.left_out) == ([1, 0, 0, 1, 0], 1)
    assert (len(assign(trace, TWO, fold=True)), assign(trace, TWO, fold=True).left_out) == (6, 0)


def test_a_model_that_is_called_like_an_engine_is_that_engine():
    trace = make([(0, "other", 1), (1, "other", 1), (2, "heavy", 1)])
    assert list(assign(trace, TWO).engine) == [1, 1, 0]
    assert list(assign(trace, TWO, names={"other": "heavy"}).engine) == [0, 0, 0]


def test_load_is_service_over_slots_where_engines_exclude_each_other():
    work = Workload(array("d", [0, 50, 100]), array("l", [0, 0, 1]), array("d", [10, 10, 20]))
    assert occupancy_s(work, TWO) == 10 / 2 + 10 / 2 + 20 / 4
    assert load(work, TWO) == pytest.approx(0.15)
    assert load(at_load(work, TWO, 0.6), TWO) == pytest.approx(0.6)


def test_engines_that_fit_beside_each_other_are_taken_at_the_same_time():
    both = machine(spec("a", awake=45, residue=0, slots=1), spec("b", awake=45, residue=0, slots=1))
    work = Workload(array("d", [0, 0]), array("l", [0, 1]), array("d", [10, 10]))
    assert occupancy_s(work, both) == pytest.approx(9)


def test_a_trace_of_one_model_is_dealt_by_popularity():
    dealt = spread(make([(float(i), "m", 1.0) for i in range(3000)]), 3, 1.0, seed=1)
    counts = [list(dealt.model).count(i) for i in range(3)]
    assert counts[0] > counts[1] > counts[2] > 0
    assert list(dealt.model) == list(spread(make([(float(i), "m", 1.0) for i in range(3000)]), 3, 1.0, seed=1).model)


def test_engines_begin_asleep():
    assert box(TWO, [], Scripted()).state == [State.ASLEEP, State.ASLEEP]
