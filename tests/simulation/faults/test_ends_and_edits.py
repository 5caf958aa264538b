"""The service is told to end, or to take another fleet file, while things fail around it."""

import pytest

from rotator.core.values import Serves
from rotator.service import shutdown
from rotator.service.loop import Loop
from rotator.sim.faults.judge_end import AWAY
from rotator.sim.faults.run import run_script
from rotator.sim.faults.script import Arm, Away, Die, Edit, Event, Kill, Term
from tests.simulation.faults.stories import ask, engine, played, story

LONG = ask(1, "a", tokens=30, token_s=0.5)


@pytest.mark.parametrize("on_shutdown", ["leave", "sleep", "stop"])
def test_a_service_that_ends_lets_work_finish_and_leaves_its_engines_as_it_was_told_to(on_shutdown: str) -> None:
    short = ask(4.5, "a", tokens=12, token_s=0.4)
    outcome = played(
        ask(0.5, "a"), short, Term(6, 60.0), ask(7, "b"), ask(14, "a"), ask(16, "b"), on_shutdown=on_shutdown
    )
    assert (outcome.checks[AWAY] > 0) is (on_shutdown != "leave")
    assert (outcome.requests["broken"], outcome.requests["refused"]) == (0, 1)
    assert outcome.requests["whole"] >= 3


@pytest.mark.parametrize(
    "event",
    [
        Arm(5, "a", "sleep", "hang"),
        Arm(5, "a", "sleep", "rank_fails"),
        Away(5, "refuse", 12.0),
        Kill(8, "sleep", 3),
        Die(6.5, "a"),
    ],
    ids=["hangs", "fails on a rank", "launcher away", "killed meanwhile", "dies"],
)
def test_an_end_that_goes_wrong_doubles_and_leaks_nothing(event: Event) -> None:
    outcome = played(LONG, event, Term(6, 25.0), ask(40, "a"), on_shutdown="sleep", faults_end_s=60.0)
    assert outcome.injected["term"] == 1


def test_a_service_that_left_its_engines_awake_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def forgets(*_: object) -> None: ...

    monkeypatch.setattr(shutdown, "put_away", forgets)
    outcome = run_script(story(ask(1, "a"), Term(40, 60.0), on_shutdown="stop", faults_end_s=120.0))
    assert outcome.failure is not None
    assert outcome.failure[0] == AWAY


def test_an_engine_that_came_in_while_the_service_ends_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Loop, "serve_commands_alone", lambda loop: setattr(loop, "serves", Serves.ALL))
    failed = (ask(1, "b"), Arm(3, "a", "boot", "crash"), ask(6, "a"))
    outcome = run_script(story(*failed, Term(10, 60.0), on_shutdown="stop", faults_end_s=60.0))
    assert outcome.failure is not None
    assert outcome.failure[0] == "nothing comes in while a service ends"


def test_an_engine_is_taken_out_while_clients_want_it_and_serves_again_once_it_is_back() -> None:
    busy = [ask(1 + 2 * i, "ab"[i % 2]) for i in range(10)]
    outcome = played(*busy, Edit(7, "a", "remove"), Edit(25, "a", "add"), ask(28, "a"))
    assert outcome.checks["every model is found"] > 0


def test_two_edits_at_once_leave_the_newer_file_in_force() -> None:
    out = (Edit(6, "a", "remove"), Edit(6.2, "a", "add"))
    assert played(LONG, *out, ask(12, "a"), faults_end_s=30.0).checks["a file that is right is taken"] == 1


def test_a_broken_file_ends_nothing_that_runs_and_keeps_a_service_down_until_it_is_mended() -> None:
    outcome = played(LONG, Edit(5, "a", "break"), ask(8, "a"), Kill(20), ask(24, "a"), faults_end_s=30.0)
    assert outcome.requests["whole"] >= 2
    assert outcome.requests["down"] == 1


def test_an_engine_that_was_taken_out_while_the_service_was_down_is_ended_at_its_start() -> None:
    gone = (Kill(6, down_s=3.0), Edit(7, "a", "remove"), ask(10, "b"), Edit(20, "a", "add"), ask(22, "a"))
    played(ask(1, "a"), *gone, engines=(engine("a"), engine("b")))


def test_who_cannot_wait_is_served_by_the_fallback_and_told_so() -> None:
    held = (ask(1, "b", tokens=60, token_s=0.5), ask(3, "a", deadline_s=2.0), ask(6, "a", deadline_s=2.0))
    outcome = played(*held, engines=(engine("a", fallback="b"), engine("b")))
    assert outcome.checks["a request goes elsewhere only by its fallback"] >= 1
