"""Windows and reservations while things fail."""

import pytest

from rotator.core import calendar
from rotator.sim.faults.judge_calendar import KEPT
from rotator.sim.faults.run import run_script
from rotator.sim.faults.script import Die, Event, Jump, Kill, Reserve
from rotator.sim.faults.shape import WindowShape
from tests.simulation.faults.stories import ask, played, story

WANTED = [ask(3 + 4 * i, "b", deadline_s=60.0) for i in range(8)]
WINDOW = {"windows": (WindowShape("w", ("a",), 1, 20.0),), "begins_s": 50.0}  # from 10 s on, for 20 s


@pytest.mark.parametrize(
    "event", [Kill(15), Die(15, "a"), Jump(15, -30.0), Jump(15, 7200.0)], ids=lambda e: type(e).__name__
)
def test_a_window_keeps_its_engine_awake_and_others_come_back_after_it(event: Event) -> None:
    outcome = played(ask(1, "a"), *WANTED, event, faults_end_s=45.0, **WINDOW)
    assert outcome.checks[KEPT] > 0
    assert outcome.requests["whole"] >= 5


def test_a_reservation_outlives_the_service() -> None:
    made = (ask(1, "b"), Reserve(3.5, "a", 12.0, 15.0), Kill(8), Kill(10, "commit", 1))
    assert played(*made, *WANTED, faults_end_s=45.0).checks[KEPT] > 0


def test_an_engine_that_is_put_away_in_its_window_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calendar, "applied", lambda snapshot, schedule: snapshot)
    outcome = run_script(story(ask(1, "a"), *WANTED, faults_end_s=45.0, **WINDOW))
    assert outcome.failure is not None
    assert outcome.failure[0] == KEPT
