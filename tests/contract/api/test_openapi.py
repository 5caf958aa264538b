"""The description that clients are generated from: complete, with examples that are true to its schemas."""

from typing import Any

import pytest
from pydantic import TypeAdapter

from rotator.service import api_examples
from rotator.service.api import create_api
from rotator.service.api_models import PlanModel
from rotator.service.events import EventBus
from rotator.service.keys import allow_all
from rotator.service.operations import EngineView, GpuView, QueueEntry
from tests.unit.api.fakes import FakeOperations

PATHS = {
    "GET /",
    "GET /info",
    "GET /healthz",
    "GET /readyz",
    "GET /metrics",
    "GET /metrics/engines",
    "POST /wake",
    "POST /sleep",
    "POST /swap",
    "GET /engines",
    "GET /engines/{name}",
    "POST /engines/{name}/start",
    "POST /engines/{name}/stop",
    "POST /engines/{name}/restart",
    "POST /engines/{name}/release",
    "POST /engines/{name}/pin",
    "POST /engines/{name}/unpin",
    "GET /gpus",
    "POST /gpus/{gpu}/cordon",
    "POST /gpus/{gpu}/uncordon",
    "GET /plan",
    "GET /queue",
    "GET /calendar",
    "GET /reservations",
    "POST /reservations",
    "DELETE /reservations/{id}",
    "GET /ledger",
    "GET /ledger/check",
    "GET /events",
    "GET /incidents",
    "GET /incidents/{id}",
    "GET /incidents/{id}/bundle",
    "POST /config/reload",
}
DESCRIPTION = create_api(FakeOperations(), EventBus(), authorize=allow_all).openapi()
OPERATIONS: dict[str, dict[str, Any]] = {
    f"{method.upper()} {path}": operation
    for path, methods in DESCRIPTION["paths"].items()
    for method, operation in methods.items()
}


def has_example(content: dict[str, Any]) -> bool:
    """Whether a body has an example of its own or one in its schema."""
    schema = content.get("schema", {})
    name = schema.get("$ref", "").rpartition("/")[2]
    return "example" in content or "examples" in DESCRIPTION["components"]["schemas"].get(name, {})


def test_every_route_of_the_operators_is_described():
    assert set(OPERATIONS) == PATHS


@pytest.mark.parametrize("name", sorted(PATHS))
def test_an_operation_has_a_summary_a_known_tag_and_an_example_of_its_answer(name: str):
    operation = OPERATIONS[name]
    assert operation["summary"]
    assert set(operation["tags"]) <= {tag["name"] for tag in DESCRIPTION["tags"]}
    [content] = operation["responses"]["200"]["content"].values()
    assert has_example(content)


@pytest.mark.parametrize("name", sorted(PATHS))
def test_every_error_of_an_operation_is_described_as_a_problem_with_an_example(name: str):
    errors = {status: r for status, r in OPERATIONS[name]["responses"].items() if int(status) >= 400}
    assert {"401", "403", "500"} <= set(errors)
    for answer in errors.values():
        problem = answer["content"]["application/problem+json"]
        assert problem["schema"] == {"$ref": "#/components/schemas/Problem"}
        assert problem["example"]["detail"]


@pytest.mark.parametrize("name", sorted(n for n in PATHS if "requestBody" in OPERATIONS.get(n, {})))
def test_a_body_has_an_example_and_is_optional_beside_the_query(name: str):
    body = OPERATIONS[name]["requestBody"]
    assert not body.get("required", False)
    variants = body["content"]["application/json"]["schema"]["anyOf"]
    assert any(has_example({"schema": variant}) for variant in variants)


def test_guarded_routes_name_the_bearer_scheme_and_probes_do_not():
    guarded = {name for name, operation in OPERATIONS.items() if operation.get("security")}
    assert PATHS - guarded == {"GET /", "GET /healthz", "GET /readyz"}


def test_every_reference_leads_somewhere():
    def references(node: Any) -> list[str]:
        if isinstance(node, dict):
            own = [node["$ref"]] if isinstance(node.get("$ref"), str) else []
            return own + [r for value in node.values() for r in references(value)]
        return [r for value in node for r in references(value)] if isinstance(node, list) else []

    found = references(DESCRIPTION)
    known = {f"#/components/schemas/{name}" for name in DESCRIPTION["components"]["schemas"]}
    assert found
    assert set(found) <= known


@pytest.mark.parametrize(
    ("example", "shape"),
    [
        (api_examples.ENGINES, list[EngineView]),
        (api_examples.GPUS, list[GpuView]),
        (api_examples.QUEUE, list[QueueEntry]),
        (api_examples.PLAN, PlanModel),
    ],
)
def test_the_examples_are_true_to_the_views(example: Any, shape: Any):
    adapter = TypeAdapter(shape)
    assert adapter.dump_python(adapter.validate_python(example), mode="json") == example
