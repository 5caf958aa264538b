"""What operators see."""

from fastapi.testclient import TestClient

from rotator.core.values import CommandKind, Plan
from rotator.service.api_models import PlanModel
from rotator.service.operations import Readiness
from tests.unit.api.fakes import FakeOperations, plan


def test_engines_gpus_and_queue_are_listed(client: TestClient):
    assert [e["name"] for e in client.get("/engines").json()] == ["dsv4-flash", "glm-5.1", "org/small"]
    assert [g["by_engine"] for g in client.get("/gpus").json()] == [{"glm-5.1": 2 << 30}] * 2
    assert client.get("/queue").json()[0]["eta_s"] == 2.5


def test_an_engine_is_found_by_its_alias(client: TestClient):
    assert client.get("/engines/glm").json()["name"] == "glm-5.1"


def test_a_plan_for_a_model_is_the_plan_of_its_wake(client: TestClient, ops: FakeOperations):
    body = client.get("/plan?model=glm").json()
    assert body["summary"][1] == "wake glm-5.1 (1.9 s): asked for"
    assert [(c.kind, c.engine) for c in ops.planned[0]] == [(CommandKind.WAKE, "glm-5.1")]


def test_a_plan_without_a_model_is_the_plan_as_things_are(client: TestClient, ops: FakeOperations):
    assert client.get("/plan").status_code == 200
    assert ops.planned == [()]


def test_ledger_rows_are_filtered_by_column_and_paged(client: TestClient, ops: FakeOperations):
    first = client.get("/ledger?table=transitions&engine=glm-5.1&limit=1").json()
    assert first == {"table": "transitions", "rows": [{"id": 7, "engine": "glm-5.1"}], "next_cursor": "next"}
    assert client.get("/ledger?cursor=next").json()["next_cursor"] is None
    assert ops.calls == [
        ("ledger", "transitions", {"engine": "glm-5.1"}, 1, None),
        ("ledger", "transitions", {}, 100, "next"),
    ]


def test_a_filter_that_the_table_does_not_know_is_refused_with_what_there_is(client: TestClient, ops: FakeOperations):
    ops.error = ValueError("no filter 'colour' for leases: there are gpu, holder")
    answer = client.get("/ledger?table=leases&colour=red")
    assert answer.status_code == 422
    assert answer.json()["errors"] == ["query: no filter 'colour' for leases: there are gpu, holder"]


def test_an_unknown_ledger_table_is_refused_with_those_there_are(client: TestClient):
    answer = client.get("/ledger?table=secrets")
    assert answer.status_code == 422
    assert "'transitions'" in answer.json()["detail"]


def test_the_ledger_check_tells_the_differences(client: TestClient):
    body = client.get("/ledger/check").json()
    assert body["matches"] is False
    assert "the device 9 GiB" in body["differences"][0]


def test_a_service_that_cannot_do_its_job_is_alive_but_not_ready(client: TestClient, ops: FakeOperations):
    assert client.get("/readyz").json() == {"ready": True, "reasons": []}
    ops.ready = Readiness(False, ("the ledger cannot be written",))
    answer = client.get("/readyz")
    assert answer.status_code == 503
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["reasons"] == ["the ledger cannot be written"]
    assert client.get("/healthz").json() == {"status": "alive"}


def test_metrics_are_prometheus_text(ops: FakeOperations):
    from prometheus_client import CollectorRegistry, Counter

    from rotator.service.api import create_api
    from rotator.service.events import EventBus
    from rotator.service.keys import allow_all

    registry = CollectorRegistry()
    Counter("rotator_swaps", "swaps", registry=registry).inc(3)
    client = TestClient(create_api(ops, EventBus(), authorize=allow_all, metrics_registry=registry))
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    assert "rotator_swaps_total 3.0" in answer.text


def test_the_index_points_to_the_documentation(client: TestClient):
    index = client.get("/").json()
    assert client.get(index["openapi"]).json()["info"]["title"] == "rotator"
    assert client.get(index["docs"]).status_code == 200
    assert client.get("/info").json()["started_wall_s"] == 1000.0


def test_times_of_a_plan_are_told_from_now_on_not_on_the_services_clock():
    shown = PlanModel.of(plan(now_s=1000.0), now_s=1001.5)
    assert (shown.look_again_in_s, shown.blocked[0].until_in_s) == (2.5, 2.5)
    assert PlanModel.of(plan(now_s=1000.0), now_s=1009.0).look_again_in_s == 0.0
    assert PlanModel.of(Plan(), now_s=1.0).look_again_in_s is None
