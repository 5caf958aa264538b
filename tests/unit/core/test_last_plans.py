"""What a plan does while the service ends: commands, and streams that stand still; nothing by itself."""

from dataclasses import replace

import pytest

from rotator.core.planner import plan
from rotator.core.values import (
    Action,
    Calendar,
    Command,
    CommandKind,
    Demand,
    Engine,
    Policy,
    Serves,
    Snapshot,
    State,
    Window,
)
from tests.unit.core.fleets import awake, engine, evicted, only_swap, snapshot, waiting

EAGER = Policy(prewake_chance=0.5, ladder=True, idle_sleep_s=10.0, restart_quiet_s=0.0)
CALENDAR = Calendar((Window("day", ("called",), 0.0, 9999.0),), ("default",))


def tempting() -> Snapshot:
    """Each engine has a GPU to itself, and a reason of its own to move; one is to be stopped by command."""
    return snapshot(
        engine("configured", "0", State.FAILED, preload=True),
        engine("called", "1"),
        engine("default", "2"),
        engine("likely", "3", demand=Demand(soon=0.9)),
        awake("idle", "4"),
        awake("ailing", "5", restart_why="its residue grows"),
        engine("asked", "6", demand=waiting(3)),
        engine("frozen", "7", demand=Demand(frozen=1, oldest_wait_s=1.0)),
        awake("named", "8"),
        policy=EAGER,
        calendar=CALENDAR,
        commands=(Command(CommandKind.STOP, "named"),),
    )


def moved(made: Snapshot) -> set[str]:
    steps = (step for swap in plan(made).swaps for step in (*swap.evict, swap.admit))
    return {step.engine for step in steps if step is not None}


def test_an_ordinary_plan_serves_them_all() -> None:
    every = moved(tempting())
    assert every == set(tempting().engines)


def test_where_only_commands_count_nothing_else_moves() -> None:
    assert moved(replace(tempting(), serves=Serves.COMMANDS)) == {"named"}


def test_what_clients_have_under_way_may_still_end() -> None:
    assert moved(replace(tempting(), serves=Serves.UNDER_WAY)) == {"named", "frozen", "asked"}


@pytest.mark.parametrize("serves", [Serves.COMMANDS, Serves.UNDER_WAY])
def test_the_calendar_holds_nobody_against_a_command_to_stop(serves: Serves) -> None:
    held = Calendar((Window("day", ("a",), 0.0, 9999.0),))
    commanded = snapshot(awake("a"), calendar=held, commands=(Command(CommandKind.STOP, "a"),), serves=serves)
    assert evicted(only_swap(plan(commanded))) == {"a": Action.STOP}


@pytest.mark.parametrize("state", [State.STARTING, State.WAKING, State.DRAINING, State.FALLING_ASLEEP, State.STOPPING])
def test_a_command_waits_for_the_end_of_a_transition(state: State) -> None:
    def made(now: Engine) -> Snapshot:
        return snapshot(now, commands=(Command(CommandKind.STOP, "a"),), serves=Serves.COMMANDS)

    assert plan(made(engine("a", state=state))).swaps == ()
    assert evicted(only_swap(plan(made(awake("a"))))) == {"a": Action.STOP}
