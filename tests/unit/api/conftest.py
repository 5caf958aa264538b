from collections.abc import Callable, Iterator

import pytest
from fastapi.testclient import TestClient

from rotator.config import BindConfig, KeyConfig
from rotator.service.api import create_api
from rotator.service.events import EventBus
from rotator.service.keys import Keys, digest
from tests.unit.api.fakes import FakeOperations


@pytest.fixture
def ops() -> FakeOperations:
    return FakeOperations()


@pytest.fixture
def bus() -> EventBus:
    return EventBus(wall=lambda: 1000.0)


@pytest.fixture
def make_client(ops: FakeOperations, bus: EventBus) -> Callable[..., TestClient]:
    def make(*keys: KeyConfig, bind: BindConfig | None = None) -> TestClient:
        checked = Keys(keys, bind)
        app = create_api(ops, bus, authorize=checked.authorize, guard=checked.guard)
        return TestClient(app, base_url="http://127.0.0.1:8400", raise_server_exceptions=False)

    return make


@pytest.fixture
def client(make_client: Callable[..., TestClient]) -> Iterator[TestClient]:
    with make_client() as made:
        yield made


def key(scope: str) -> KeyConfig:
    """The key ``<scope>-secret``, with that scope."""
    return KeyConfig.model_validate({"name": f"a {scope}", "sha256": digest(f"{scope}-secret"), "scopes": [scope]})
