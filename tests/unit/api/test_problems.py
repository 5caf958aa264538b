"""Errors: RFC 9457 problem details, each with what to do, never a traceback."""

import pytest
from fastapi.testclient import TestClient

from rotator.config import ConfigError
from rotator.ports import DeviceTimeout, EngineRefused, EngineTimeout, LaunchError, LedgerError
from rotator.service.operations import CommandFailed, CommandRefused, CommandTimeout
from tests.unit.api.fakes import FakeOperations, Unheard


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (CommandRefused("glm-5.1 is pinned: unpin it first"), 409, "refused"),
        (CommandFailed("rank 2 ran out of memory"), 502, "failed"),
        (CommandTimeout("still waking after 5 s; it goes on"), 504, "timeout"),
        (EngineTimeout("no answer in 3 s"), 504, "engine-timeout"),
        (EngineRefused("bad level", 400), 502, "engine-error"),
        (LaunchError("no such program: vllm"), 502, "launch-error"),
        (DeviceTimeout("GPU-a hangs"), 504, "device-timeout"),
        (LedgerError("no space left on device"), 503, "ledger-error"),
        (Unheard("something else"), 500, "error"),
    ],
)
def test_an_error_of_the_tree_is_a_problem_with_its_words(
    client: TestClient, ops: FakeOperations, error: Exception, status: int, kind: str
):
    ops.error = error
    answer = client.post("/wake?model=glm")
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    assert (body["type"], body["status"], body["detail"], body["instance"]) == (
        f"urn:rotator:problem:{kind}",
        status,
        str(error),
        "/wake",
    )


def test_an_unforeseen_error_shows_nothing_of_the_inside(client: TestClient, ops: FakeOperations):
    ops.error = KeyError("secret/path.py")
    answer = client.post("/wake?model=glm")
    assert (answer.status_code, answer.headers["content-type"]) == (500, "application/problem+json")
    assert "secret" not in answer.text
    assert "Traceback" not in answer.text


@pytest.mark.parametrize(
    ("wrong", "near"), [("glm-5", ["glm-5.1", "glm"]), ("DSV4", ["dsv4-flash"]), ("small", ["org/small"])]
)
def test_an_unknown_engine_brings_close_names(client: TestClient, wrong: str, near: list[str]):
    answer = client.post(f"/wake?model={wrong}")
    assert answer.status_code == 404
    assert answer.json()["close_names"] == near
    assert near[0] in answer.json()["detail"]


def test_an_engine_like_no_other_brings_those_that_there_are(client: TestClient):
    answer = client.get("/engines/zzz")
    assert answer.status_code == 404
    assert answer.json()["detail"] == "there is no engine 'zzz'; there are dsv4-flash, glm-5.1, org/small"
    assert "close_names" not in answer.json()


def test_an_unknown_gpu_is_not_found(client: TestClient):
    answer = client.post("/gpus/7/cordon")
    assert (answer.status_code, answer.json()["type"]) == (404, "urn:rotator:problem:unknown-gpu")


def test_a_wrong_configuration_file_is_explained_line_by_line(client: TestClient, ops: FakeOperations):
    ops.error = ConfigError(["engine 'a'.port: change it", "keys: add one"])
    answer = client.post("/config/reload")
    assert answer.status_code == 422
    assert answer.json()["errors"] == ["engine 'a'.port: change it", "keys: add one"]


def test_each_wrong_field_gets_one_line(client: TestClient):
    answer = client.post("/sleep", json={"model": "glm", "level": 3, "deadline_s": 0, "levle": 1})
    assert answer.status_code == 422
    assert answer.json()["errors"] == [
        "body.deadline_s: Input should be greater than 0",
        "body.level: Input should be less than or equal to 2",
        "body.levle: unknown field: remove it or check its spelling",
    ]


def test_an_unknown_query_parameter_is_not_taken_silently(client: TestClient):
    answer = client.post("/sleep?model=glm&lvl=2")
    assert answer.status_code == 422
    assert answer.json()["errors"] == ["query.lvl: unknown field: remove it or check its spelling"]


def test_a_body_that_is_no_json_says_where_it_breaks(client: TestClient):
    answer = client.post("/wake", content=b'{"model": }', headers={"content-type": "application/json"})
    assert answer.status_code == 422
    assert answer.json()["errors"][0].startswith("body: not valid JSON")


def test_an_unknown_path_and_a_wrong_method_are_problems_too(client: TestClient):
    nowhere, wrong = client.get("/nowhere"), client.get("/wake")
    assert (nowhere.status_code, nowhere.headers["content-type"]) == (404, "application/problem+json")
    assert (wrong.status_code, wrong.json()["type"], wrong.headers["allow"]) == (405, "about:blank", "POST")


def test_a_form_is_refused_with_the_header_to_send(client: TestClient, ops: FakeOperations):
    answer = client.post("/wake", data={"model": "glm"})
    assert answer.status_code == 415
    assert "content-type: application/json" in answer.json()["detail"]
    assert ops.commands == []


def test_an_endless_or_huge_body_is_not_read(client: TestClient):
    huge = client.post("/wake", content=b" " * 70_000, headers={"content-type": "application/json"})
    endless = client.post("/wake", content=iter([b"{}"]), headers={"content-type": "application/json"})
    assert (huge.status_code, endless.status_code) == (413, 411)
