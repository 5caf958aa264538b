"""Host RAM of several machines: masters count where their engine's GPUs are, and nowhere else."""

from dataclasses import replace
from typing import Any

from rotator.core.hostram import NodeBytes, fits, spread
from rotator.core.planner import plan
from rotator.core.values import Action, Engine, Level, Policy
from tests.unit.core.fleets import awake, engine, evicted, only_swap, snapshot, waiting

BOTH = (Level.HOST, Level.DISCARD)


def on(nodes: str, made: Engine) -> Engine:
    """The engine with its GPUs on these machines, one letter each."""
    return replace(made, nodes=tuple(nodes))


def levels(made: Any) -> dict[str, Level | None]:
    return {step.engine: step.level for step in made.evict}


def test_masters_on_one_machine_leave_another_ones_budget_alone() -> None:
    victim = on("b", awake("victim", "1", host_bytes=70, levels=BOTH))
    wished = on("b", engine("wished", "1", demand=waiting()))
    full_a = snapshot(victim, wished, node_budgets={"a": 100, "b": 100}, node_used={"a": 100}, host_budget_bytes=0)
    assert levels(only_swap(plan(full_a))) == {"victim": Level.HOST}
    full_b = snapshot(victim, wished, node_budgets={"a": 100, "b": 100}, node_used={"b": 40}, host_budget_bytes=0)
    assert levels(only_swap(plan(full_b))) == {"victim": Level.DISCARD}


def test_engines_that_yield_on_different_machines_do_not_share_a_budget() -> None:
    one = on("a", awake("one", "0", host_bytes=70))
    two = on("b", awake("two", "1", host_bytes=70))
    wide = on("ab", engine("wide", "01", demand=waiting()))
    seen = snapshot(one, two, wide, node_budgets={"a": 80, "b": 80}, host_budget_bytes=0)
    assert evicted(only_swap(plan(seen))) == {"one": Action.SLEEP, "two": Action.SLEEP}


def test_an_engine_that_spans_machines_needs_its_share_on_each() -> None:
    wide = on("ab", awake("wide", "01", host_bytes=100, levels=BOTH))
    wished = on("a", engine("wished", "0", demand=waiting()))
    roomy = snapshot(wide, wished, node_budgets={"a": 50, "b": 50}, host_budget_bytes=0)
    assert levels(only_swap(plan(roomy))) == {"wide": Level.HOST}
    tight = snapshot(wide, wished, node_budgets={"a": 200, "b": 49}, host_budget_bytes=0)
    assert levels(only_swap(plan(tight))) == {"wide": Level.DISCARD}


def test_when_one_machine_runs_short_only_masters_there_go() -> None:
    here = on("a", engine("here", "0", host_bytes=60, has_disk=True, masters_bytes=60))
    there = on("b", engine("there", "1", host_bytes=60, has_disk=True, masters_bytes=60))
    seen = snapshot(
        here,
        there,
        node_budgets={"a": 100, "b": 65},
        node_used={"a": 60, "b": 60},
        host_budget_bytes=0,
        policy=Policy(ladder=True, host_high=0.9),
    )
    assert evicted(only_swap(plan(seen))) == {"there": Action.SINK}


def test_a_number_stands_for_so_much_on_every_machine() -> None:
    size = NodeBytes({"a": 3, "b": 5})
    assert fits(size, 5)
    assert not fits(size, 4)
    assert fits(size + 1 - size, 1)
    made = on("aab", engine("wide", "012"))
    parts = spread(made, 100)
    assert isinstance(parts, NodeBytes)
    assert (parts.on("a"), parts.on("b"), parts.on("")) == (67, 33, 0)
