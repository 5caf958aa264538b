"""What holds for every plan of every fleet, whatever state it is in."""

import os
from dataclasses import replace

from hypothesis import given, settings

from rotator.core.lifecycle import is_moving
from rotator.core.placement import charge
from rotator.core.planner import plan
from rotator.core.values import (
    Action,
    BlockKind,
    CommandKind,
    Engine,
    Health,
    Level,
    Plan,
    Snapshot,
    State,
    Step,
    Swap,
)
from tests.unit.core.fleets import snapshots, used

# `make test-long` asks for more: the suite as a whole has to stay short.
many = settings(max_examples=int(os.environ.get("ROTATOR_EXAMPLES", "150")), deadline=None)
_AFTER = {
    Action.SLEEP: State.ASLEEP,
    Action.STOP: State.STOPPED,
    Action.WAKE: State.WAKING,
    Action.START: State.STARTING,
}


def steps(swap: Swap) -> tuple[Step, ...]:
    return (*swap.evict, swap.admit) if swap.admit else swap.evict


def carried_out(snapshot: Snapshot, swaps: tuple[Swap, ...]) -> Snapshot:
    """The fleet when all evictions of these swaps are done and all admissions have begun."""
    engines = dict(snapshot.engines)
    for step in [step for swap in swaps for step in steps(swap)]:
        engine = engines[step.engine]
        held = engine.held_bytes if step.action in (Action.WAKE, Action.START) else None
        engines[step.engine] = replace(engine, state=_AFTER[step.action], depth=None, held_bytes=held)
    return replace(snapshot, engines=engines)


def forced(snapshot: Snapshot, swap: Swap) -> bool:
    return any(command.force for command in snapshot.commands)


@many
@given(snapshots())
def test_no_plan_overcommits_a_gpu_or_makes_an_overcommitted_one_worse(snapshot: Snapshot) -> None:
    result = plan(snapshot)
    for swaps in ((swap,) for swap in result.swaps):  # alone, and all together
        check_bytes(snapshot, swaps)
    check_bytes(snapshot, result.swaps)


def check_bytes(snapshot: Snapshot, swaps: tuple[Swap, ...]) -> None:
    after = carried_out(snapshot, swaps)
    for swap in swaps:
        for gpu in swap.gpus:
            total, before, then = snapshot.gpus[gpu].total_bytes, used(snapshot, gpu), used(after, gpu)
            takes = swap.admit is not None and gpu in snapshot.engines[swap.admit.engine].gpus
            assert then <= total or then <= before, (gpu, swap)
            if takes and then > before:
                assert then <= total, (gpu, swap)


@many
@given(snapshots())
def test_only_an_operator_who_names_it_puts_a_pinned_engine_away(snapshot: Snapshot) -> None:
    named = {c.engine for c in snapshot.commands if c.kind in (CommandKind.SLEEP, CommandKind.STOP)}
    for step in [s for swap in plan(snapshot).swaps for s in swap.evict]:
        assert not snapshot.engines[step.engine].pinned or step.engine in named


@many
@given(snapshots(with_commands=False))
def test_nobody_busy_yields_within_its_minimum_stay_and_no_streams_are_cut(snapshot: Snapshot) -> None:
    for step in [s for swap in plan(snapshot).swaps for s in swap.evict]:
        engine = snapshot.engines[step.engine]
        demand = engine.demand
        assert not step.force
        if engine.state is State.AWAKE and (demand.in_flight or demand.waiting):
            assert engine.awake_since_s + snapshot.policy.min_stay_s <= snapshot.now_s
        assert not demand.in_flight or (engine.can_freeze and step.drain_bound_s == snapshot.policy.drain_bound_s)
        assert not demand.frozen or engine.state is State.AWAKE


@many
@given(snapshots())
def test_streams_that_cannot_freeze_are_touched_only_by_force_or_by_a_stop_that_waits_for_them(
    snapshot: Snapshot,
) -> None:
    stops = {c.engine for c in snapshot.commands if c.kind is CommandKind.STOP}
    for step in [s for swap in plan(snapshot).swaps for s in swap.evict]:
        engine = snapshot.engines[step.engine]
        if engine.demand.in_flight and not engine.can_freeze:
            assert step.force or (step.action is Action.STOP and step.engine in stops and step.drain_bound_s > 0)


@many
@given(snapshots())
def test_force_comes_only_from_a_command_that_says_so(snapshot: Snapshot) -> None:
    for swap in plan(snapshot).swaps:
        if any(step.force for step in swap.evict):
            assert any(c.force for c in snapshot.commands)


@many
@given(snapshots())
def test_swaps_keep_to_disjoint_gpus_that_are_readable_and_at_rest(snapshot: Snapshot) -> None:
    result = plan(snapshot)
    moving = {gpu for e in snapshot.engines.values() if is_moving(e.state) for gpu in e.gpus}
    taken: set[str] = set()
    for swap in result.swaps:
        assert swap.gpus == {gpu for step in steps(swap) for gpu in snapshot.engines[step.engine].gpus}
        assert swap.gpus.isdisjoint(taken | moving | snapshot.claimed)
        taken |= swap.gpus
        assert all(snapshot.gpus[gpu].health is not Health.UNKNOWN for gpu in swap.gpus)
        if swap.admit:
            comes = snapshot.engines[swap.admit.engine]
            assert all(snapshot.gpus[gpu].health is Health.OK for gpu in comes.gpus)


@many
@given(snapshots())
def test_host_ram_for_masters_is_never_exceeded(snapshot: Snapshot) -> None:
    takes = [
        snapshot.engines[step.engine].host_bytes
        for swap in plan(snapshot).swaps
        for step in swap.evict
        if step.level is Level.HOST
    ]
    if any(takes):
        assert snapshot.host_used_bytes + sum(takes) <= snapshot.host_budget_bytes


@many
@given(snapshots())
def test_the_same_snapshot_gives_the_same_plan_in_whatever_order_its_engines_are(snapshot: Snapshot) -> None:
    result = plan(snapshot)
    assert plan(snapshot) == result
    backwards = replace(snapshot, engines={name: snapshot.engines[name] for name in reversed(list(snapshot.engines))})
    assert plan(backwards).swaps == result.swaps


@many
@given(snapshots())
def test_every_step_is_one_that_its_engine_can_take(snapshot: Snapshot) -> None:
    rests = {
        Action.SLEEP: (State.AWAKE,),
        Action.WAKE: (State.ASLEEP,),
        Action.START: (State.STOPPED, State.FAILED),
        Action.STOP: (State.AWAKE, State.ASLEEP, State.FAILED, State.QUARANTINED),
    }
    seen: set[str] = set()
    for step in [step for swap in plan(snapshot).swaps for step in steps(swap)]:
        engine: Engine = snapshot.engines[step.engine]
        assert step.engine not in seen
        seen.add(step.engine)
        assert engine.state in rests[step.action]
        assert step.action is not Action.SLEEP or step.level in engine.levels
        assert step.action is not Action.STOP or engine.can_stop
        assert tuple(gpu for gpu, _ in step.bytes_per_gpu) == engine.gpus


@many
@given(snapshots())
def test_every_swap_step_and_block_says_why(snapshot: Snapshot) -> None:
    result: Plan = plan(snapshot)
    for swap in result.swaps:
        assert swap.reason
        assert swap.expected_s >= max(step.expected_s for step in steps(swap))
        assert all(step.reason for step in steps(swap))
    assert all(blocked.reason for blocked in result.blocked)
    untils = [b.until_s for b in result.blocked if b.until_s is not None]
    assert result.look_again_at_s == (min(untils) if untils else None)
    assert all(until > snapshot.now_s for until in untils)


@many
@given(snapshots())
def test_whoever_is_wanted_is_in_a_swap_or_told_why_not(snapshot: Snapshot) -> None:
    result = plan(snapshot)
    answered = {step.engine for swap in result.swaps for step in steps(swap)} | {b.engine for b in result.blocked}
    for engine in snapshot.engines.values():
        wanted = engine.demand.waiting or engine.demand.frozen
        if wanted and engine.state is not State.AWAKE and not is_moving(engine.state):
            assert engine.name in answered


@many
@given(snapshots())
def test_every_command_is_in_a_swap_or_told_why_not(snapshot: Snapshot) -> None:
    result = plan(snapshot)
    told = [b.command for b in result.blocked] + [s.command for s in result.swaps]
    named = {step.engine for swap in result.swaps for step in steps(swap)}
    for command in snapshot.commands:
        assert command in told or command.engine in named


@many
@given(snapshots(with_commands=False))
def test_nobody_who_is_asked_to_yield_could_have_been_left_alone(snapshot: Snapshot) -> None:
    for swap in plan(snapshot).swaps:
        for spared in swap.evict:
            rest = replace(swap, evict=tuple(s for s in swap.evict if s is not spared))
            after = carried_out(snapshot, (rest,))
            admitted = snapshot.engines[swap.admit.engine] if swap.admit else None
            assert admitted is not None
            start = swap.admit is not None and swap.admit.action is Action.START
            leftover = charge(admitted) if start else (0,) * len(admitted.gpus)
            assert any(
                used(after, gpu) + left > snapshot.gpus[gpu].total_bytes
                for gpu, left in zip(admitted.gpus, leftover, strict=True)
            )


@many
@given(snapshots(with_commands=False))
def test_what_waiting_cannot_help_has_no_time_to_look_again(snapshot: Snapshot) -> None:
    timed = {BlockKind.STAY, BlockKind.BACKOFF}
    assert all((b.kind in timed) == (b.until_s is not None) for b in plan(snapshot).blocked)
