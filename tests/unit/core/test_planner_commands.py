"""What a plan does for operators' commands."""

import pytest

from rotator.core.planner import plan
from rotator.core.values import (
    Action,
    Blocked,
    BlockKind,
    Command,
    CommandKind,
    Demand,
    Engine,
    Gpu,
    Health,
    Level,
    State,
)
from tests.unit.core.fleets import MOVING, awake, engine, evicted, only_swap, snapshot, waiting


def wake(name: str, **more: object) -> Command:
    return Command(CommandKind.WAKE, name, **more)  # type: ignore[arg-type]


def sleep(name: str, **more: object) -> Command:
    return Command(CommandKind.SLEEP, name, **more)  # type: ignore[arg-type]


def start(name: str, **more: object) -> Command:
    return Command(CommandKind.START, name, **more)  # type: ignore[arg-type]


def stop(name: str, **more: object) -> Command:
    return Command(CommandKind.STOP, name, **more)  # type: ignore[arg-type]


def blocked(command: Command, *engines: Engine, **more: object) -> Blocked:
    """The one thing that blocks the command."""
    result = plan(snapshot(*engines, commands=(command,), **more))
    assert result.swaps == ()
    (only,) = result.blocked
    assert only.command == command
    return only


def test_a_command_goes_before_any_client() -> None:
    fleet = [engine("loved", demand=waiting(99, 99.0), priority=9), engine("named")]
    swap = only_swap(plan(snapshot(*fleet, commands=(wake("named"),))))
    assert swap.admit is not None
    assert swap.admit.engine == "named"
    assert swap.command == wake("named")
    assert swap.reason.startswith("an operator asked to wake named; needs")


def test_older_commands_go_first() -> None:
    commands = (wake("late", issued_at_s=2.0), wake("early", issued_at_s=1.0))
    swap = only_swap(plan(snapshot(engine("late"), engine("early"), commands=commands)))
    assert swap.command == commands[1]


@pytest.mark.parametrize(
    ("command", "target", "words"),
    [
        (wake("a"), awake("a"), "already awake"),
        (start("a"), awake("a"), "already awake"),
        (start("a"), engine("a"), "wake it"),
        (sleep("a"), engine("a"), "already asleep"),
        (sleep("a"), engine("a", state=State.STOPPED), "wake it first"),
        (sleep("a"), engine("a", state=State.FAILED), "wake it first"),
        (sleep("a", level=Level.DISCARD), awake("a"), "its levels are 1"),
        (sleep("a", level=Level.PAUSE), awake("a", levels=(Level.PAUSE, Level.HOST)), "its levels are 1"),
        (sleep("a"), awake("a", levels=(Level.PAUSE,)), "stop it"),
        (stop("a"), engine("a", state=State.STOPPED), "already stopped"),
        (stop("a"), awake("a", can_stop=False), "attached"),
        (wake("nobody"), awake("a"), "no engine nobody"),
    ],
)
def test_a_command_that_makes_no_sense_is_refused_with_what_would(command: Command, target: Engine, words: str) -> None:
    only = blocked(command, target)
    assert only.kind is BlockKind.REFUSED
    assert words in only.reason


@pytest.mark.parametrize("kind", CommandKind)
@pytest.mark.parametrize("state", MOVING)
def test_a_command_to_a_moving_engine_waits(kind: CommandKind, state: State) -> None:
    assert blocked(Command(kind, "a"), engine("a", state=state)).kind is BlockKind.BUSY


def test_a_command_that_was_refused_does_not_keep_clients_waiting() -> None:
    swap = only_swap(plan(snapshot(engine("a", demand=waiting()), commands=(start("a"),))))
    assert swap.admit is not None
    assert (swap.admit.action, swap.command) == (Action.WAKE, None)


# -- sleep -------------------------------------------------------------------------------------------------------------


def test_a_sleep_is_a_swap_without_anybody_coming_in() -> None:
    swap = only_swap(plan(snapshot(awake("a", "01"), commands=(sleep("a"),))))
    assert swap.admit is None
    assert evicted(swap) == {"a": Action.SLEEP}
    assert swap.gpus == {"0", "1"}
    assert swap.reason.startswith("an operator asked to sleep a: sleeps at level 1")


def test_even_a_pinned_engine_sleeps_when_it_is_named() -> None:
    assert evicted(only_swap(plan(snapshot(awake("a", pinned=True), commands=(sleep("a"),))))) == {"a": Action.SLEEP}


def test_a_named_engine_sleeps_within_its_minimum_stay() -> None:
    busy = awake("a", awake_since_s=1000.0, demand=Demand(in_flight=1))
    assert only_swap(plan(snapshot(busy, commands=(sleep("a"),)))).evict[0].drain_bound_s == 5.0


def test_the_level_asked_for_is_the_level_used() -> None:
    target = awake("a", levels=(Level.HOST, Level.DISCARD))
    (step,) = only_swap(plan(snapshot(target, commands=(sleep("a", level=Level.DISCARD),)))).evict
    assert step.level is Level.DISCARD


def test_a_level_asked_for_without_host_ram_for_it_is_not_replaced_by_another() -> None:
    target = awake("a", host_bytes=50, levels=(Level.HOST, Level.DISCARD))
    assert blocked(sleep("a", level=Level.HOST), target, host_budget_bytes=49).kind is BlockKind.HOST_RAM
    (step,) = only_swap(plan(snapshot(target, commands=(sleep("a"),), host_budget_bytes=49))).evict
    assert step.level is Level.DISCARD


def test_a_sleep_never_turns_into_a_stop() -> None:
    assert blocked(sleep("a"), awake("a", host_bytes=50), host_budget_bytes=49).kind is BlockKind.HOST_RAM


def test_streams_that_may_not_be_frozen_are_only_aborted_by_force_which_says_whose() -> None:
    rigid = awake("a", can_freeze=False, demand=Demand(in_flight=3))
    assert blocked(sleep("a"), rigid).kind is BlockKind.UNFREEZABLE
    (step,) = only_swap(plan(snapshot(rigid, commands=(sleep("a", force=True),)))).evict
    assert (step.force, step.drain_bound_s) == (True, 0.0)
    assert "force aborts 3 streams of a" in step.reason


def test_nothing_sleeps_on_an_unreadable_gpu_but_on_a_cordoned_one_it_may() -> None:
    def on(health: Health) -> list[Gpu]:
        return [Gpu("0", 100, health=health)]

    assert blocked(sleep("a"), awake("a"), gpus=on(Health.UNKNOWN)).kind is BlockKind.GPU_UNKNOWN
    assert only_swap(plan(snapshot(awake("a"), commands=(sleep("a"),), gpus=on(Health.CORDONED)))).evict


# -- stop and start ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [State.AWAKE, State.ASLEEP, State.FAILED, State.QUARANTINED])
def test_whatever_rests_can_be_stopped(state: State) -> None:
    swap = only_swap(plan(snapshot(engine("a", state=state), commands=(stop("a"),))))
    assert (evicted(swap), swap.admit) == ({"a": Action.STOP}, None)


def test_a_stop_lets_streams_finish_and_says_that_it_may_be_given_up() -> None:
    (step,) = only_swap(plan(snapshot(awake("a", demand=Demand(in_flight=2)), commands=(stop("a"),)))).evict
    assert step.drain_bound_s == 5.0
    assert "then it keeps its turn" in step.reason


def test_a_stop_never_cuts_frozen_streams_but_by_force() -> None:
    frozen = engine("a", demand=Demand(frozen=2))
    result = plan(snapshot(frozen, commands=(stop("a"),)))
    assert BlockKind.UNFREEZABLE in [b.kind for b in result.blocked]
    forced = plan(snapshot(frozen, commands=(stop("a", force=True),)))
    assert evicted(only_swap(forced)) == {"a": Action.STOP}


def test_a_start_does_not_wait_for_the_backoff() -> None:
    failed = engine("a", state=State.FAILED, retry_at_s=2000.0)
    swap = only_swap(plan(snapshot(failed, commands=(start("a"),))))
    assert swap.admit is not None
    assert swap.admit.action is Action.START


def test_a_wake_of_a_stopped_engine_starts_it() -> None:
    swap = only_swap(plan(snapshot(engine("a", state=State.STOPPED), commands=(wake("a"),))))
    assert swap.admit is not None
    assert swap.admit.action is Action.START


@pytest.mark.parametrize("command", [wake("a"), start("a")])
def test_a_quarantined_engine_is_released_not_started(command: Command) -> None:
    assert blocked(command, engine("a", state=State.QUARANTINED)).kind is BlockKind.QUARANTINED


# -- wake, and the sleep given with it ---------------------------------------------------------------------------------


def test_a_forced_wake_overrides_stays_and_streams_but_no_pin() -> None:
    busy = awake("busy", awake_since_s=1000.0, can_freeze=False, demand=Demand(in_flight=1))
    (step,) = only_swap(plan(snapshot(busy, engine("w"), commands=(wake("w", force=True),)))).evict
    assert step.force
    assert blocked(wake("w", force=True), awake("p", pinned=True), engine("w")).kind is BlockKind.PINNED


def test_a_wake_without_force_respects_the_minimum_stay() -> None:
    busy = awake("busy", awake_since_s=1000.0, demand=Demand(in_flight=1))
    only = blocked(wake("w"), busy, engine("w"))
    assert (only.kind, only.until_s) == (BlockKind.STAY, 1002.0)


def test_a_sleep_and_a_wake_given_together_are_one_swap() -> None:
    for commands in ((sleep("a"), wake("b")), (wake("b"), sleep("a"))):
        swap = only_swap(plan(snapshot(awake("a", pinned=True), engine("b"), commands=commands)))
        assert evicted(swap) == {"a": Action.SLEEP}
        assert swap.admit is not None
        assert (swap.admit.engine, swap.command) == ("b", wake("b"))


def test_a_swap_takes_more_engines_where_the_named_one_frees_too_little() -> None:
    fleet = [awake("a", awake=30), awake("c", awake=50), engine("b")]
    swap = only_swap(plan(snapshot(*fleet, commands=(sleep("a"), wake("b")))))
    assert evicted(swap) == {"a": Action.SLEEP, "c": Action.SLEEP}


def test_the_named_engine_sleeps_even_where_there_was_room() -> None:
    fleet = [awake("a", awake=30), engine("b", awake=30)]
    assert evicted(only_swap(plan(snapshot(*fleet, commands=(sleep("a"), wake("b")))))) == {"a": Action.SLEEP}


def test_force_on_the_sleep_aborts_only_the_named_engine() -> None:
    busy = Demand(in_flight=1)
    fleet = [awake("a", awake=30, demand=busy), awake("c", awake=50, demand=busy), engine("b")]
    swap = only_swap(plan(snapshot(*fleet, commands=(sleep("a", force=True), wake("b")))))
    assert {s.engine: s.force for s in swap.evict} == {"a": True, "c": False}


def test_where_the_wake_is_blocked_its_partner_stays_awake() -> None:
    fleet = [awake("a", "0"), awake("p", "1", pinned=True), engine("b", "01")]
    result = plan(snapshot(*fleet, commands=(sleep("a"), wake("b"))))
    assert result.swaps == ()
    assert [(b.engine, b.kind) for b in result.blocked] == [("b", BlockKind.PINNED), ("a", BlockKind.PINNED)]


def test_where_the_sleep_is_blocked_its_partner_does_not_push_out_another() -> None:
    fleet = [awake("a", host_bytes=50, awake=40), awake("c", awake=40), engine("b", awake=50)]
    result = plan(snapshot(*fleet, commands=(sleep("a"), wake("b")), host_budget_bytes=10))
    assert result.swaps == ()
    assert [(b.engine, b.kind) for b in result.blocked] == [("a", BlockKind.HOST_RAM), ("b", BlockKind.HOST_RAM)]


def test_a_sleep_beside_a_wake_that_is_done_already_is_carried_out() -> None:
    fleet = [awake("a", awake=30), awake("b", awake=30)]
    result = plan(snapshot(*fleet, commands=(sleep("a"), wake("b"))))
    assert evicted(only_swap(result)) == {"a": Action.SLEEP}
    assert [b.kind for b in result.blocked] == [BlockKind.REFUSED]


def test_a_sleep_and_a_wake_on_different_gpus_are_two_swaps() -> None:
    fleet = [awake("a", "0"), engine("b", "1")]
    assert len(plan(snapshot(*fleet, commands=(sleep("a"), wake("b")))).swaps) == 2


def test_commands_of_different_times_do_not_depend_on_each_other() -> None:
    fleet = [awake("a", "0"), awake("p", "1", pinned=True), engine("b", "01")]
    commands = (sleep("a", issued_at_s=1.0), wake("b", issued_at_s=2.0))
    result = plan(snapshot(*fleet, commands=commands))
    assert evicted(only_swap(result)) == {"a": Action.SLEEP}
    assert [(b.engine, b.kind) for b in result.blocked] == [("b", BlockKind.PINNED)]
