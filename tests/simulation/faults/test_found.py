"""What soaking found, as stories: each broke an invariant once."""

import pytest

from rotator.sim.faults.generate import make_script
from rotator.sim.faults.run import run_script
from rotator.sim.faults.script import Arm, Away, Die, Disk, Edit, Foreign, Kill, Nvml, Order, Undying
from tests.simulation.faults.stories import ask, engine, played


def test_an_engine_that_its_launcher_cannot_stop_keeps_its_bytes_in_the_books() -> None:
    played(ask(1, "a"), Away(5, "refuse", 20), Order(6, "stop", "a"), ask(7, "b", deadline_s=60.0), ask(8, "a"))


def test_a_process_that_will_not_die_is_not_doubled_by_the_next_start() -> None:
    played(
        ask(1, "a"), Undying(5, "a", 30), Arm(5, "a", "sleep", "rank_fails"), ask(6, "b"), ask(10, "a"), ask(20, "a")
    )


def test_a_launch_whose_answer_was_lost_is_found_and_ended() -> None:
    played(Arm(0.5, "a", "launch", "lost"), ask(1, "a"), ask(2, "b"), ask(8, "a"))


def test_a_lost_launch_is_found_although_an_earlier_life_knew_another_process() -> None:
    played(ask(1, "a"), Kill(6), Die(6.5, "a"), Away(7.5, "lost", 5), ask(9, "a"), ask(10, "b"), ask(11, "b"))


def test_nothing_begins_beside_an_engine_that_the_launcher_could_not_look_for() -> None:
    small = engine("a", awake_gib=40.0, planned_gib=41.0)
    played(ask(1, "a"), Away(5, "refuse", 8.5), Kill(6), ask(14, "a"), ask(20, "b"), engines=(small, engine("b")))


def test_outcomes_that_a_full_disk_refused_are_written_once_there_is_room() -> None:
    played(ask(1, "a"), Disk(2, "full", 10), ask(20, "b"))


def test_an_engine_is_not_brought_in_over_a_larger_rest_than_was_planned() -> None:
    heavy = engine("a", awake_gib=93.0, planned_gib=93.0, residue_gib=3.0, planned_residue_gib=0.2)
    wide = engine("b", awake_gib=93.0, planned_gib=93.0)
    played(ask(1, "a"), ask(6, "b"), engines=(heavy, wide))


def test_the_first_plan_of_a_life_knows_what_others_hold() -> None:
    played(
        Foreign(3, "GPU-0", 40.0, 39.0), Kill(14.3, down_s=2.0), engines=(engine("a", preload=True),), faults_end_s=58.0
    )


def test_what_others_hold_does_not_shrink_by_what_a_starting_engine_will_hold() -> None:
    small = engine("b", awake_gib=24.9, planned_gib=26.3, boot_s=3.2)
    large = engine("c", awake_gib=66.1, planned_gib=68.6, boot_s=4.6)
    played(
        ask(1.1, "c", 12, 0.8, deadline_s=76.4),
        Foreign(5.0, "GPU-0", 39.7, 28.0),
        ask(8.85, "b", 1),
        engines=(small, large),
        faults_end_s=45.0,
    )


def test_a_wake_that_hung_when_the_service_died_runs_beside_no_other() -> None:
    played(
        ask(1, "a"),
        ask(6, "b"),
        Arm(10, "a", "wake", "hang"),
        Kill(10, "wake", 13, down_s=3.5),
        ask(11, "a"),
        ask(17, "b", deadline_s=60.0),
    )


def test_a_slow_wake_that_the_next_life_does_not_see_yet_runs_beside_no_other() -> None:
    played(
        ask(1, "a"),
        ask(6, "b"),
        Arm(10, "a", "wake", "slow", 40.0),
        Kill(10, "wake", 13, down_s=1.0),
        ask(11, "a"),
        ask(14, "b", deadline_s=60.0),
        faults_end_s=60.0,
    )


def test_a_quarantined_engine_that_an_operator_stopped_serves_again() -> None:
    outcome = played(
        ask(1, "a"), ask(6, "b"), Arm(10, "a", "wake", "garbage"), ask(11, "a"), Order(18, "stop", "a"), ask(22, "a")
    )
    assert outcome.requests["whole"] >= 3


def test_streams_are_not_lost_to_a_level_that_cannot_keep_them() -> None:
    old = engine("a", version="0.23.0", levels=(2,))
    outcome = played(ask(1, "a", 60, 0.5), Order(8, "wake", "b"), engines=(old, engine("b")))
    assert outcome.requests["broken"] == 0


def test_bytes_that_could_not_be_measured_at_a_start_reach_the_ledger_later() -> None:
    outcome = played(ask(4.9, "a"), Nvml(6.4, "GPU-0", "fail", 28.0), engines=(engine("a", planned_gib=86.0),))
    assert outcome.checks["the ledger equals the devices"]


def test_an_engine_is_not_taken_for_smaller_because_others_left_while_it_started_unseen() -> None:
    small = engine("a", awake_gib=62.0, planned_gib=66.0)
    played(
        ask(1, "a"),
        Foreign(6, "GPU-0", 30.0, 13.5),
        Die(15.5, "a"),
        Nvml(16, "GPU-0", "blind", 24.0),
        engines=(small, engine("b", awake_gib=60.0, planned_gib=60.0)),
        faults_end_s=45.0,
    )


def test_two_engines_that_sleep_at_once_are_not_promised_the_same_host_ram() -> None:
    outcome = run_script(make_script(300, more=False))
    assert outcome.failure is None, outcome.failure


def test_what_an_engine_holds_counts_on_the_gpus_that_tell_it_where_another_one_does_not() -> None:
    pair = (engine("a", gpus=(0, 1), awake_gib=66.0, planned_gib=66.0), engine("b", gpus=(0, 1), awake_gib=74.0))
    played(
        ask(1, "a"),
        ask(6, "b"),
        Nvml(12, "GPU-1", "blind", 20.0),
        Arm(12, "b", "sleep", "lie_one_rank"),
        Kill(12.5, "sleep", 1),
        ask(13, "a"),
        ask(16, "a"),
        engines=pair,
        gpus=2,
    )


def test_an_engine_that_was_taken_out_while_the_service_was_down_is_in_no_book_any_more() -> None:
    out = (Kill(6, down_s=3.0), Edit(7, "a", "remove"), Edit(34, "a", "add"))
    assert played(ask(1, "a"), *out).checks["the ledger equals the devices"] >= 3


@pytest.mark.parametrize("seed", [51683, 52565, 54077])
def test_a_plan_knows_what_came_to_a_gpu_while_an_engine_started_or_ended_there_unseen(seed: int) -> None:
    outcome = run_script(make_script(seed, more=False))
    assert outcome.failure is None, outcome.failure


def test_an_engine_whose_wake_hung_is_ended_also_if_the_service_dies_before_it_could() -> None:
    outcome = played(
        ask(1, "a"),
        ask(6, "b"),
        Arm(10, "a", "wake", "hang"),
        ask(11, "a"),
        Kill(23.8, down_s=1.0),
        ask(26, "b"),
        ask(30, "a"),
    )
    assert outcome.injected["kill"] == 1


def test_one_that_was_taken_out_and_would_not_die_is_ended_later_or_taken_over_when_it_is_back() -> None:
    out = (Undying(5, "a", 40.0), Kill(6, down_s=3.0), Edit(7, "a", "remove"))
    played(ask(1, "a"), *out, faults_end_s=60.0)
    played(ask(1, "a"), *out, Edit(27, "a", "add"), ask(28, "a"), ask(29, "b"), faults_end_s=60.0)


def test_rows_that_a_full_disk_kept_are_emptied_once_there_is_room() -> None:
    out = (Kill(6, down_s=3.0), Edit(7, "a", "remove"), Disk(9.2, "full", 8.0), ask(20, "b"), Edit(50, "a", "add"))
    played(ask(1, "a"), *out, engines=(engine("a"), engine("b", pin=True)), faults_end_s=55.0)


def test_an_engine_that_cannot_free_as_much_as_was_planned_of_it_is_no_liar() -> None:
    wide = engine("a", awake_gib=75.0, planned_gib=75.0, residue_gib=3.0, planned_residue_gib=0.2, elastic=True)
    outcome = played(ask(1, "a"), ask(6, "b"), engines=(wide, engine("b", awake_gib=93.0, planned_gib=93.0)))
    assert outcome.injected["evidence collected"] == 0


def test_what_an_engine_keeps_that_freed_some_of_its_bytes_is_known_after_a_restart_that_cannot_measure_it() -> None:
    outcome = run_script(make_script(63523))
    assert outcome.failure is None, outcome.failure


def test_one_that_comes_back_to_the_fleet_leaves_its_old_port_to_whoever_was_given_it_meanwhile() -> None:
    three = (engine("a", awake_gib=20.0), engine("b", awake_gib=20.0), engine("c", awake_gib=20.0))
    out = (Kill(2, down_s=0.5), Edit(4, "a", "remove"), Edit(6, "b", "remove"), Edit(8, "b", "add"))
    back = (Kill(14, down_s=3.0), Edit(15, "a", "add"))
    outcome = played(*out, ask(9, "b"), *back, ask(24, "b"), ask(26, "a"), engines=three, faults_end_s=60.0)
    assert outcome.requests["whole"] >= 3


@pytest.mark.parametrize("seed", [301213, 301678, 304490, 307712, 308618, 308794, 308842, 320401])
def test_what_the_first_ten_thousand_seeds_of_one_commit_found(seed: int) -> None:
    """A freeing by bytes that runs on beside the next life; one that can free no more, asked for ever; one that is put
    back while it is being ended; one that died while another started unseen; a wake without bytes; a wake that hung,
    forgotten by a life that ended while it was looking."""
    outcome = run_script(make_script(seed))
    assert outcome.failure is None, outcome.failure
