"""What operators order: wake, sleep, swap and one engine's life."""

import pytest
from fastapi.testclient import TestClient

from rotator.core.values import CommandKind, Level
from tests.unit.api.fakes import FakeOperations


def only_command(ops: FakeOperations):
    [(commands, wait, deadline_s)] = ops.commands
    return commands, wait, deadline_s


def test_a_wake_by_query_waits_for_its_end_and_tells_the_phases(client: TestClient, ops: FakeOperations):
    answer = client.post("/wake?model=glm")
    assert answer.status_code == 200
    [result] = answer.json()["results"]
    assert (result["engine"], result["done"], result["phases_s"]) == ("glm-5.1", True, {"wake": 1.9})
    [command], wait, deadline_s = only_command(ops)
    assert (command.kind, command.engine, command.force, wait, deadline_s) == (
        CommandKind.WAKE,
        "glm-5.1",
        False,
        True,
        600.0,
    )


def test_a_wake_by_body_that_does_not_wait_is_accepted(client: TestClient, ops: FakeOperations):
    answer = client.post("/wake", json={"model": "glm-5.1", "wait": False, "deadline_s": 5})
    assert answer.status_code == 202
    assert answer.json()["done"] is False
    assert only_command(ops)[1:] == (False, 5.0)


def test_a_dry_run_shows_the_plan_with_its_reasons_and_does_nothing(client: TestClient, ops: FakeOperations):
    answer = client.post("/swap", json={"wake": "glm", "sleep": ["dsv4-flash"], "dry_run": True})
    assert answer.status_code == 200
    body = answer.json()
    assert body["dry_run"] is True
    assert body["plan"]["swaps"][0]["evict"][0]["reason"] == "cheapest to bring back"
    assert body["plan"]["blocked"][0]["kind"] == "stay"
    assert ops.commands == []
    assert [c.kind for c in ops.planned[0]] == [CommandKind.SLEEP, CommandKind.WAKE]


def test_a_swap_is_its_sleeps_and_its_wake_given_together(client: TestClient, ops: FakeOperations):
    answer = client.post("/swap?wake=glm&sleep=dsv4-flash&sleep=org/small&level=2")
    assert answer.status_code == 200
    commands, _, _ = only_command(ops)
    assert [(c.kind, c.engine, c.level) for c in commands] == [
        (CommandKind.SLEEP, "dsv4-flash", Level.DISCARD),
        (CommandKind.SLEEP, "org/small", Level.DISCARD),
        (CommandKind.WAKE, "glm-5.1", None),
    ]


def test_a_swap_cannot_name_one_engine_on_both_sides(client: TestClient, ops: FakeOperations):
    answer = client.post("/swap", json={"wake": "glm", "sleep": ["glm-5.1"]})
    assert answer.status_code == 422
    assert "cannot both wake and sleep" in answer.json()["detail"]
    assert ops.commands == []


@pytest.mark.parametrize("given", ["1", "2"])
def test_the_sleep_level_may_come_in_the_query(client: TestClient, ops: FakeOperations, given: str):
    assert client.post(f"/sleep?model=glm&level={given}").status_code == 200
    [command], _, _ = only_command(ops)
    assert (command.kind, command.level) == (CommandKind.SLEEP, Level(int(given)))


def test_query_and_body_may_share_the_fields_between_them(client: TestClient, ops: FakeOperations):
    assert client.post("/sleep?model=glm", json={"level": 2, "model": "glm"}).status_code == 200
    assert only_command(ops)[0][0].level is Level.DISCARD


def test_a_field_that_query_and_body_give_differently_is_refused(client: TestClient, ops: FakeOperations):
    answer = client.post("/sleep?model=glm&level=1", json={"level": 2})
    assert answer.status_code == 422
    assert answer.json()["errors"] == ["query.level: the body gives it another value: give it once"]
    assert ops.commands == []


@pytest.mark.parametrize("path", ["/wake", "/sleep"])
def test_a_command_without_a_model_says_what_is_missing(client: TestClient, path: str):
    answer = client.post(path)
    assert answer.status_code == 422
    assert answer.json()["errors"][0].startswith("model: is missing")


def test_a_swap_without_a_model_to_wake_says_what_is_missing(client: TestClient):
    assert client.post("/swap", json={"sleep": ["glm"]}).json()["errors"] == [
        "wake: is missing: say which model takes its turn"
    ]


@pytest.mark.parametrize(("action", "kind"), [("start", CommandKind.START), ("stop", CommandKind.STOP)])
def test_an_engine_is_started_and_stopped_by_name(
    client: TestClient, ops: FakeOperations, action: str, kind: CommandKind
):
    assert client.post(f"/engines/glm/{action}", json={"deadline_s": 9}).status_code == 200
    [command], _, deadline_s = only_command(ops)
    assert (command.kind, command.engine, deadline_s) == (kind, "glm-5.1", 9.0)


def test_an_engine_whose_name_has_a_slash_is_reached(client: TestClient, ops: FakeOperations):
    assert client.get("/engines/org/small").json()["name"] == "org/small"
    assert client.post("/engines/org/small/start").status_code == 200
    assert only_command(ops)[0][0].engine == "org/small"


def test_a_restart_waits_as_asked(client: TestClient, ops: FakeOperations):
    assert client.post("/engines/glm/restart?wait=false&deadline_s=30").status_code == 202
    assert ops.calls == [("restart", "glm-5.1", False, 30.0)]


def test_a_dry_run_of_a_restart_restarts_nothing(client: TestClient, ops: FakeOperations):
    assert client.post("/engines/glm/restart?dry_run=true").json()["dry_run"] is True
    assert ops.calls == []


def test_a_quarantined_engine_is_released(client: TestClient, ops: FakeOperations):
    assert client.post("/engines/glm/release").json()["name"] == "glm-5.1"
    assert ops.calls == [("release", "glm-5.1")]


def test_pin_and_unpin_are_shown_in_the_answer(client: TestClient):
    assert client.post("/engines/glm/pin").json()["pinned"] is True
    assert client.post("/engines/glm/unpin").json()["pinned"] is False


def test_a_gpu_is_cordoned_by_index_with_a_reason(client: TestClient):
    answer = client.post("/gpus/1/cordon", json={"reason": "riser"}).json()
    assert (answer["id"], answer["health"], answer["reason"]) == ("GPU-b", "cordoned", "riser")
    assert client.post("/gpus/GPU-b/uncordon").json()["health"] == "ok"


def test_a_reload_tells_what_changed(client: TestClient):
    assert client.post("/config/reload").json() == {"changes": ["policies.min_stay_s: 2.0 -> 5.0 (applied)"]}
