"""Incidents as operators are shown them: lists, one in detail, its bundle; and who may."""

from collections.abc import Callable

from fastapi.testclient import TestClient

from tests.unit.api.conftest import key
from tests.unit.api.fakes import FakeOperations


def bearer(scope: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {scope}-secret"}


def test_incidents_are_listed_by_what_is_asked_for(client: TestClient) -> None:
    everything = client.get("/incidents").json()
    assert [i["id"] for i in everything] == ["two-glm", "one-glm"]
    assert everything[0]["reason"] == "it stands"
    assert [i["id"] for i in client.get("/incidents?open=true").json()] == ["two-glm"]
    assert client.get("/incidents?engine=other").json() == []
    assert len(client.get("/incidents?limit=1").json()) == 1


def test_one_is_shown_with_what_its_bundle_holds_and_lacks(client: TestClient) -> None:
    told = client.get("/incidents/one-glm").json()
    assert told["incident"]["outcome"] == "back in service"
    assert told["items"] == [{"name": "log.txt", "bytes": 3, "cut_from_bytes": None}]
    assert told["missing"] == [{"what": "nccl", "why": "no rank listens"}]


def test_a_bundle_is_a_download_under_its_own_name(client: TestClient) -> None:
    answer = client.get("/incidents/one-glm/bundle")
    assert (answer.status_code, answer.content) == (200, b"packed evidence")
    assert 'filename="one-glm.tar.gz"' in answer.headers["content-disposition"]


def test_what_is_not_there_is_refused_before_an_answer_begins(client: TestClient) -> None:
    for path, kind in (
        ("/incidents/none", "unknown-incident"),
        ("/incidents/none/bundle", "unknown-incident"),
        ("/incidents/two-glm/bundle", "no-bundle"),
    ):
        answer = client.get(path)
        assert (answer.status_code, answer.json()["type"]) == (404, f"urn:rotator:problem:{kind}")
    assert client.get("/incidents/%2e%2e%2fledger.db/bundle").status_code in (404, 422)


def test_looking_needs_operate_and_evidence_needs_admin(
    make_client: Callable[..., TestClient], ops: FakeOperations
) -> None:
    client = make_client(key("infer"), key("operate"), key("admin"))
    for path, least in (
        ("/incidents", "operate"),
        ("/incidents/one-glm", "operate"),
        ("/incidents/one-glm/bundle", "admin"),
    ):
        allowed = ["admin"] if least == "admin" else ["operate", "admin"]
        for scope in ("infer", "operate", "admin"):
            assert client.get(path, headers=bearer(scope)).status_code == (200 if scope in allowed else 403), path
