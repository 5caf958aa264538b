"""Which scope each route asks for, and that the gate stands before all of them."""

from collections.abc import Callable

import pytest
from fastapi.testclient import TestClient

from tests.unit.api.conftest import key
from tests.unit.api.fakes import FakeOperations

SCOPES = {
    "infer": ["GET /engines", "GET /engines/glm", "GET /gpus", "GET /queue", "GET /plan", "GET /metrics", "GET /info"],
    "operate": [
        "POST /wake?model=glm",
        "POST /sleep?model=glm",
        "POST /swap?wake=glm",
        "POST /engines/glm/start",
        "POST /engines/glm/stop",
        "POST /engines/glm/restart",
        "POST /engines/glm/pin",
        "POST /engines/glm/unpin",
        "GET /ledger",
        "GET /ledger/check",
    ],
    "admin": [
        "POST /engines/glm/release",
        "POST /gpus/0/cordon",
        "POST /gpus/0/uncordon",
        "POST /config/reload",
        "POST /wake?model=glm&force=true",
        "POST /swap?wake=glm&force=true",
        "POST /engines/glm/stop?force=true",
    ],
}
BELOW = {"infer": None, "operate": "infer", "admin": "operate"}


@pytest.fixture
def locked(make_client: Callable[..., TestClient]) -> TestClient:
    return make_client(key("infer"), key("operate"), key("admin"))


def ask(client: TestClient, line: str, secret: str | None) -> int:
    method, path = line.split(" ")
    headers = {} if secret is None else {"authorization": f"Bearer {secret}-secret"}
    return client.request(method, path, headers=headers).status_code


@pytest.mark.parametrize(("scope", "line"), [(scope, line) for scope, lines in SCOPES.items() for line in lines])
def test_a_route_opens_to_its_scope_and_to_nothing_below(locked: TestClient, scope: str, line: str):
    below = BELOW[scope]
    assert ask(locked, line, None) == 401
    assert below is None or ask(locked, line, below) == 403
    assert ask(locked, line, scope) == 200


def test_a_force_without_the_scope_for_it_does_nothing(locked: TestClient, ops: FakeOperations):
    assert ask(locked, "POST /wake?model=glm&force=true", "operate") == 403
    assert ops.commands == []


def test_probes_need_no_key(locked: TestClient):
    assert [ask(locked, f"GET {path}", None) for path in ("/healthz", "/readyz", "/", "/docs")] == [200] * 4


def test_a_refusal_for_want_of_a_key_says_how_to_send_one(locked: TestClient):
    answer = locked.get("/engines")
    assert answer.headers["www-authenticate"] == "Bearer"
    assert "Authorization: Bearer" in answer.json()["detail"]


def test_a_foreign_page_reaches_no_route(client: TestClient, ops: FakeOperations):
    rebound = client.get("/engines", headers={"host": "evil.example"})
    posted = client.post("/wake?model=glm", headers={"origin": "https://evil.example"})
    assert (rebound.status_code, posted.status_code) == (421, 403)
    assert posted.headers["content-type"] == "application/problem+json"
    assert ops.commands == []
