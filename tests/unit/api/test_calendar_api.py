"""Reservations over REST: who may, what is taken, how it is refused."""

from collections.abc import Callable
from datetime import UTC, datetime

import pytest
from fastapi.testclient import TestClient

from rotator.ports import LedgerError
from rotator.service.operations import ReservationConflict, ReservationWrong
from tests.unit.api.conftest import key
from tests.unit.api.fakes import FakeOperations


def test_a_reservation_is_made_with_what_was_given(client: TestClient, ops: FakeOperations):
    body = {"engines": ["glm"], "start": "2026-11-22T09:00:00+00:00", "duration_s": 60, "priority": 4, "note": "x"}
    answer = client.post("/reservations", json=body)
    assert answer.status_code == 200
    assert answer.json()["engines"] == ["glm-5.1"]
    (call,) = ops.calls
    assert call[1] == ("glm-5.1",)
    assert call[2] == {
        "start": datetime(2026, 11, 22, 9, tzinfo=UTC),
        "end": None,
        "duration_s": 60.0,
        "priority": 4,
        "note": "x",
    }


def test_reservations_are_listed_and_dropped(client: TestClient):
    assert [r["id"] for r in client.get("/reservations").json()] == [3]
    assert client.delete("/reservations/3").json()["note"] == "evaluation"
    missing = client.delete("/reservations/4")
    assert (missing.status_code, missing.json()["type"]) == (404, "urn:rotator:problem:unknown-reservation")


def test_the_calendar_shows_windows_reservations_and_defaults(client: TestClient):
    seen = client.get("/calendar").json()
    assert [w["name"] for w in seen["windows"]] == ["office"]
    assert [r["id"] for r in seen["reservations"]] == [3]
    assert seen["default_engines"] == ["dsv4-flash"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"engines": ["glm"]}, "exactly one of 'end' and 'duration_s'"),
        ({"engines": ["glm"], "duration_s": 5, "end": "2026-11-22T09:00:00Z"}, "exactly one of"),
        ({"engines": [], "duration_s": 5}, "engines"),
        ({"engines": ["glm"], "duration_s": -1}, "duration_s"),
        ({"engines": ["glm"], "duration_s": 5, "start": "tomorrow"}, "start"),
        ({"engines": ["glm"], "duration_s": 5, "who": "me"}, "who"),
    ],
)
def test_a_wrong_reservation_is_told_where(client: TestClient, body: dict[str, object], said: str):
    answer = client.post("/reservations", json=body)
    assert answer.status_code == 422
    assert said in answer.text


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ReservationConflict("a is kept awake by reservation 2"), 409),
        (ReservationWrong("start: it is past"), 422),
        (LedgerError("disk full"), 503),
    ],
)
def test_a_refusal_says_why(client: TestClient, ops: FakeOperations, error: Exception, status: int):
    ops.error = error
    answer = client.post("/reservations", json={"engines": ["glm"], "duration_s": 5})
    assert (answer.status_code, answer.json()["detail"]) == (status, str(error))


def test_an_unknown_engine_is_told_with_near_names(client: TestClient):
    answer = client.post("/reservations", json={"engines": ["glm-5"], "duration_s": 5})
    assert (answer.status_code, answer.json()["close_names"]) == (404, ["glm-5.1", "glm"])


def test_clients_may_look_and_only_operators_may_reserve(make_client: Callable[..., TestClient]):
    client = make_client(key("infer"), key("operate"))
    infer, operate = ({"Authorization": f"Bearer {s}-secret"} for s in ("infer", "operate"))
    body = {"engines": ["glm"], "duration_s": 5}
    assert client.get("/calendar", headers=infer).status_code == 200
    assert client.post("/reservations", json=body, headers=infer).status_code == 403
    assert client.delete("/reservations/3", headers=infer).status_code == 403
    assert client.post("/reservations", json=body, headers=operate).status_code == 200
    assert client.delete("/reservations/3", headers=operate).status_code == 200
