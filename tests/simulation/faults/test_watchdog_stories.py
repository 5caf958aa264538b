"""What the watchdog promises, each as one story under virtual time."""

import pytest

from rotator.sim.faults import fleet
from rotator.sim.faults.run import run_script
from rotator.sim.faults.script import Cut, Die, Disk, Kill, Nvml, Wedge
from tests.simulation.faults.stories import ask, engine, played, story

LONG = ask(1, "a", tokens=400, token_s=0.2)


def test_a_wedge_under_work_is_noticed_and_its_engine_serves_again() -> None:
    outcome = played(LONG, Wedge(8, "a", 200.0), ask(60, "a"), faults_end_s=90.0)
    assert outcome.checks["a wedge is noticed"] > 0
    assert outcome.requests["whole"] >= 1
    assert outcome.injected["evidence collected"] >= 1


def test_without_the_watchdog_the_same_wedge_breaks_its_invariant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fleet.WATCHDOG, "enabled", False)
    outcome = run_script(story(LONG, Wedge(8, "a", 200.0), faults_end_s=90.0))
    assert outcome.failure is not None
    assert outcome.failure[0] == "a wedge is noticed"


def test_an_idle_engine_that_wedged_is_found_by_its_regular_probe() -> None:
    outcome = played(ask(1, "a"), Wedge(8, "a", 200.0), faults_end_s=80.0)
    assert outcome.injected["evidence collected"] >= 1


def test_slow_tokens_a_cut_network_and_a_short_wedge_cost_no_engine() -> None:
    slow = ask(1, "a", tokens=12, token_s=3.0)
    outcome = played(slow, Wedge(12, "a", 3.0), Cut(20, "a", 2.0), faults_end_s=50.0)
    assert outcome.injected["evidence collected"] == 0


def test_a_lost_gpu_is_cordoned_also_while_the_ledger_is_full_and_over_the_services_death() -> None:
    pair = (engine("a"), engine("b", gpus=(1,)))
    lost = (ask(1, "a"), ask(1, "b"), Disk(5, "full", 12.0), Nvml(6, "GPU-0", "lost", 40.0), ask(30, "b"))
    outcome = played(*lost, Kill(25), engines=pair, gpus=2, faults_end_s=60.0)
    assert outcome.checks["a lost GPU is cordoned"] == 1
    assert outcome.requests["whole"] >= 2


def test_one_that_dies_again_and_again_ends_in_quarantine_and_others_serve_on() -> None:
    deaths = [Die(8 + 7 * i, "a") for i in range(16)]
    asks = [ask(1 + 7 * i, "a") for i in range(17)]
    outcome = played(*deaths, *asks, ask(125, "b"), faults_end_s=130.0)
    assert outcome.injected["die"] == 16
