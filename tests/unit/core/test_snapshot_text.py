"""A snapshot that was written down is the same when it is read, and gives the same plan."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings

from rotator.core.planner import plan
from rotator.core.snapshot_text import SnapshotError, of_plain, snapshot_of, to_plain
from rotator.core.values import Calendar, Demand, Depth, Engine, Policy, Snapshot, State, Window
from tests.unit.core.fleets import awake, engine, snapshot, snapshots, waiting


def through_json(value: Any) -> Any:
    return json.loads(json.dumps(to_plain(value), allow_nan=False))


@settings(max_examples=25, deadline=None)
@given(snapshots())
def test_any_snapshot_comes_back_whole_and_plans_the_same(seen: Snapshot):
    back = snapshot_of(through_json(seen))
    assert back == seen
    assert plan(back) == plan(seen)


def test_calendars_mappings_and_infinities_come_back():
    days = Calendar((Window("w", ("a",), 1.0, 2.0, 3, "soon"),), ("a",), 5.0, {"a": 2.5})
    one = engine("a", wake_costs={Depth.HOST: 1.5}, kv_bytes=(7,), demand=Demand(oldest_wait_s=math.inf))
    seen = snapshot(one, calendar=days, claimed=frozenset({"0"}))
    assert snapshot_of(through_json(seen)) == seen


def test_what_has_its_default_is_left_out():
    assert to_plain(Policy()) == {}
    assert "levels" not in to_plain(awake("a"))
    assert to_plain(awake("a"))["state"] == "awake"


def test_names_of_another_release_are_ignored_and_missing_ones_get_their_default():
    plain = through_json(snapshot(awake("a", demand=waiting(2))))
    plain["invented"] = 1
    plain["engines"]["a"]["invented"] = {"x": 1}
    del plain["engines"]["a"]["demand"]
    back = snapshot_of(plain)
    assert back.engines["a"] == replace(awake("a"), demand=Demand())


@pytest.mark.parametrize("plain", [None, [], {"now_s": 1.0}, {"now_s": "soon", "gpus": 3}, "x"])
def test_what_is_no_snapshot_is_refused(plain: Any):
    with pytest.raises(SnapshotError):
        snapshot_of(plain)


def test_a_single_value_is_read_by_its_type():
    plain = through_json(engine("a", state=State.FAILED))
    assert of_plain(Engine, plain).state is State.FAILED
