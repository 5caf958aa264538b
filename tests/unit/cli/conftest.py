from collections.abc import Callable

import pytest
from fastapi.testclient import TestClient

from rotator.config import KeyConfig
from rotator.service.api import create_api
from rotator.service.events import EventBus
from rotator.service.keys import Keys
from tests.unit.api.fakes import FakeOperations
from tests.unit.cli.transport import ApiTransport


@pytest.fixture(autouse=True)
def _wide_and_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables do not fold, and no variable of the developer's own leaks in."""
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.delenv("ROTATOR_URL", raising=False)
    monkeypatch.delenv("ROTATOR_KEY", raising=False)


@pytest.fixture
def ops() -> FakeOperations:
    return FakeOperations()


@pytest.fixture
def service(ops: FakeOperations) -> Callable[..., ApiTransport]:
    """The real API over the fake operations; its keys are the arguments."""

    def make(*keys: KeyConfig) -> ApiTransport:
        checked = Keys(keys)
        api = create_api(ops, EventBus(), authorize=checked.authorize, guard=checked.guard)
        return ApiTransport(TestClient(api, raise_server_exceptions=False))

    return make
