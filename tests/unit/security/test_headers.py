"""What browsers are told of every answer of the operators' API, and what their pages may not do there."""

import re

import pytest
from fastapi.testclient import TestClient

from rotator.config import BindConfig
from rotator.service.api import create_api
from rotator.service.events import EventBus
from rotator.service.keys import Keys
from tests.unit.api.conftest import key
from tests.unit.api.fakes import FakeOperations


def client(keys: Keys) -> TestClient:
    api = create_api(FakeOperations(), EventBus(), authorize=keys.authorize_operator, guard=keys.guard)
    return TestClient(api, base_url="http://127.0.0.1:8400")


@pytest.mark.parametrize("path", ["/", "/engines", "/nothing", "/metrics", "/docs", "/openapi.json"])
def test_every_answer_says_what_browsers_may_do_with_it(path: str):
    headers = client(Keys()).get(path).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe-eval" not in policy
    assert not re.search(r"https?:|\*|[a-z]\.[a-z]", policy)


def test_the_docs_take_nothing_from_elsewhere():
    asked = client(Keys())
    page = asked.get("/docs").text
    assert "//" not in page
    links = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert len(links) == 3
    assert all(asked.get(f"/{link}").status_code == 200 for link in links)


def test_with_keys_too_a_page_of_another_site_changes_nothing():
    asked = client(Keys([key("admin")]))
    headers = {"authorization": "Bearer admin-secret"}
    assert asked.post("/wake?model=glm", headers={**headers, "sec-fetch-site": "cross-site"}).status_code == 403
    assert asked.delete("/reservations/1", headers={**headers, "sec-fetch-site": "same-site"}).status_code == 403
    assert asked.post("/wake?model=glm", headers=headers).status_code == 200


@pytest.mark.parametrize(("host", "status"), [("evil.example", 421), ("models.example", 200), ("10.0.0.7:8400", 200)])
def test_with_names_in_bind_hosts_a_service_with_keys_answers_to_no_other_name(host: str, status: int):
    asked = client(Keys([key("admin")], BindConfig(hosts=("models.example",))))
    assert asked.get("/engines", headers={"authorization": "Bearer admin-secret", "host": host}).status_code == status
