"""reserve, reservations, unreserve and the calendar in status."""

import json
from collections.abc import Callable

import pytest

from rotator.cli.main import run
from rotator.service.operations import ReservationConflict
from tests.unit.api.fakes import FakeOperations
from tests.unit.cli.transport import ApiTransport

Service = Callable[..., ApiTransport]


def test_reserve_sends_hours_as_seconds_and_says_what_was_made(
    service: Service, ops: FakeOperations, capsys: pytest.CaptureFixture[str]
):
    assert run(["reserve", "glm", "dsv4-flash", "--hours", "2", "--note", "x"], service()) == 0
    assert ops.calls[0][1] == ("glm-5.1", "dsv4-flash")
    assert ops.calls[0][2]["duration_s"] == 7200
    assert capsys.readouterr().out.startswith("reservation 3: glm-5.1, dsv4-flash from Thu 1970-01-01 01:16 CET until")


def test_reserve_needs_an_end(service: Service):
    assert run(["reserve", "glm"], service()) == 2
    assert run(["reserve", "glm", "--hours", "1", "--end", "2026-11-22T10:00"], service()) == 2


def test_a_conflict_is_a_refusal_with_its_reason(
    service: Service, ops: FakeOperations, capsys: pytest.CaptureFixture[str]
):
    ops.error = ReservationConflict("a is kept awake by reservation 2")
    assert run(["reserve", "glm", "--hours", "1"], service()) == 4
    assert "a is kept awake by reservation 2" in capsys.readouterr().err


def test_reservations_are_shown_as_a_table_or_as_json(service: Service, capsys: pytest.CaptureFixture[str]):
    assert run(["reservations"], service()) == 0
    shown = capsys.readouterr().out
    assert "reservation 3 (evaluation)" in shown
    assert "window office" in shown
    assert "returns to dsv4-flash after a window, or 900 s without use" in shown
    assert run(["reservations", "--json"], service()) == 0
    assert [r["id"] for r in json.loads(capsys.readouterr().out)] == [3]


def test_unreserve_says_what_it_dropped(service: Service, capsys: pytest.CaptureFixture[str]):
    assert run(["unreserve", "3"], service()) == 0
    assert "reservation 3 is dropped: glm-5.1" in capsys.readouterr().out
    assert run(["unreserve", "9"], service()) == 1


def test_status_shows_the_calendar(service: Service, capsys: pytest.CaptureFixture[str]):
    assert run(["status"], service()) == 0
    assert "in force" in capsys.readouterr().out
    assert run(["status", "--json"], service()) == 0
    assert json.loads(capsys.readouterr().out)["calendar"]["timezone"] == "Europe/Berlin"
