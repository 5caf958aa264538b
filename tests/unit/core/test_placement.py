"""What engines are charged with, what they need, and what can never fit."""

import pytest

from rotator.core.placement import GIB, Room, charge, gib, need, never_fits
from rotator.core.values import BlockKind, Depth, Gpu, State
from tests.unit.core.fleets import MOVING, awake, engine


@pytest.mark.parametrize("state", [State.AWAKE, *(s for s in MOVING if s is not State.STOPPING)])
def test_an_engine_that_is_or_may_be_awake_is_charged_its_awake_footprint(state: State) -> None:
    assert charge(engine("a", "01", state)) == (80, 80)


def test_whoever_holds_more_than_it_should_is_charged_what_it_holds() -> None:
    assert charge(awake("a", "01", held_bytes=(90, 10))) == (90, 80)
    assert charge(engine("a", "01", held_bytes=(9, 1))) == (9, 5)


def test_a_sleeper_is_charged_its_residue() -> None:
    assert charge(engine("a", "01")) == (5, 5)


def test_a_sleeper_that_kept_its_weights_is_charged_what_it_is_seen_to_hold() -> None:
    assert charge(engine("a", depth=Depth.KV, held_bytes=(60,))) == (60,)


def test_a_sleeper_that_kept_its_weights_and_was_never_read_is_charged_as_if_awake() -> None:
    assert charge(engine("a", depth=Depth.KV)) == (80,)


@pytest.mark.parametrize("state", [State.STOPPING, State.QUARANTINED, State.FAILED, State.STOPPED])
def test_an_engine_without_running_processes_is_charged_only_what_is_seen_to_be_held(state: State) -> None:
    assert charge(engine("a", "01", state)) == (0, 0)
    assert charge(engine("a", "01", state, held_bytes=(7, 0))) == (7, 0)


def test_a_wake_needs_what_its_residue_does_not_cover() -> None:
    sleeper = engine("a")
    assert need(sleeper, charge(sleeper)) == (75,)


def test_a_start_needs_its_whole_footprint_beside_what_old_processes_still_hold() -> None:
    stopped = engine("a", state=State.STOPPED, held_bytes=(10,))
    assert need(stopped, charge(stopped)) == (80,)


def test_a_gpu_has_free_what_reserve_foreign_processes_and_engines_leave() -> None:
    room = Room({"0": Gpu("0", 100, foreign_bytes=7, reserve_bytes=3)}, [awake("a", awake=50), engine("b")])
    assert room.free["0"] == 100 - 7 - 3 - 50 - 5


def test_a_gpu_that_engines_name_and_nobody_reads_is_missing() -> None:
    assert Room({"0": Gpu("0", 100)}, [awake("a", "01")]).missing == {"1"}


def test_an_engine_larger_than_its_gpu_is_hopeless() -> None:
    big = engine("a", awake=101)
    assert Room({"0": Gpu("0", 100)}, [big]).hopeless(big, 0) == (BlockKind.NEVER_FITS, 100)


def test_an_engine_beside_a_pinned_one_that_leaves_too_little_is_hopeless_because_of_the_pin() -> None:
    wanted = engine("a")
    room = Room({"0": Gpu("0", 100)}, [wanted, awake("p", awake=30, pinned=True)])
    assert room.hopeless(wanted, 0) == (BlockKind.PINNED, 70)


def test_the_residue_of_an_engine_we_may_not_stop_stands() -> None:
    wanted = engine("a", awake=96)
    room = Room({"0": Gpu("0", 100)}, [wanted, awake("attached", awake=30, can_stop=False)])
    assert room.hopeless(wanted, 0) == (BlockKind.NEVER_FITS, 95)


def test_what_an_engine_holds_itself_is_never_in_its_own_way() -> None:
    attached = engine("a", awake=98, residue=5, can_stop=False)
    pinned = engine("b", awake=98, residue=5, pinned=True)
    for sleeper in (attached, pinned):
        assert Room({"0": Gpu("0", 100)}, [sleeper]).hopeless(sleeper, 0) is None


def test_bytes_read_like_people_read_them() -> None:
    assert gib(88 * GIB) == "88.0 GiB"


def test_check_finds_nothing_wrong_with_a_fleet_that_can_take_turns() -> None:
    assert never_fits({"0": Gpu("0", 100)}, [engine("a"), engine("b"), engine("p", pinned=True)]) == ()


def test_check_names_the_engine_that_is_too_large_the_gpu_and_the_way_out() -> None:
    gpus = {"0": Gpu("0", 100 * GIB, foreign_bytes=4 * GIB, reserve_bytes=GIB)}
    (line,) = never_fits(gpus, [engine("a", awake=96 * GIB)])
    assert "engine 'a' needs 96.0 GiB on 0" in line
    assert "95.0 GiB" in line
    assert "lower its memory utilization" in line


def test_check_counts_the_residue_of_attached_engines() -> None:
    (line,) = never_fits({"0": Gpu("0", 100)}, [engine("a", awake=96), engine("b", can_stop=False)])
    assert "engine 'a'" in line


def test_check_finds_pinned_engines_that_cannot_be_awake_together() -> None:
    (line,) = never_fits({"0": Gpu("0", 100)}, [engine("a", pinned=True), engine("b", pinned=True)])
    assert "the pinned engines a, b" in line
    assert "unpin one" in line


def test_check_finds_a_gpu_that_is_not_there() -> None:
    (line,) = never_fits({"0": Gpu("0", 100)}, [engine("a", "7")])
    assert line == "engine 'a': 7 is no GPU here: name one of 0"
