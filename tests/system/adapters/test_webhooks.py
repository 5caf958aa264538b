"""Webhooks against a real receiver that answers as receivers do."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from rotator.adapters import webhooks
from rotator.adapters.webhooks import WAITING_MAX, Webhooks, sign
from rotator.config_watchdog import WebhookConfig

INCIDENT = {"kind": "wedged", "reason": "it stands"}


class Receiver:
    """Answers with each status in turn, then 200; ``hangs`` until it is let go."""

    def __init__(self) -> None:
        self.statuses: list[int] = []
        self.got: list[tuple[dict[str, str], Any]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        app = web.Application()
        app.router.add_post("/", self._take)
        app.router.add_route("*", "/elsewhere", self._take_elsewhere)
        self.elsewhere = 0
        self.server = TestServer(app)

    async def _take_elsewhere(self, request: web.Request) -> web.Response:
        self.elsewhere += 1
        return web.Response()

    async def _take(self, request: web.Request) -> web.Response:
        self.got.append((dict(request.headers), json.loads(await request.read())))
        await self.gate.wait()
        status = self.statuses.pop(0) if self.statuses else 200
        return web.Response(status=status, headers={"Location": "/elsewhere"} if status == 302 else {})


@pytest.fixture
async def receiver(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Receiver]:
    monkeypatch.setattr(webhooks, "_PAUSE_FIRST_S", 0.01)
    made = Receiver()
    await made.server.start_server()
    yield made
    made.gate.set()
    await made.server.close()


def hooks(receiver: Receiver, **settings: Any) -> Webhooks:
    config = WebhookConfig.model_validate({"url": str(receiver.server.make_url("/")), **settings})
    return Webhooks([config], {"SECRET": "s"}, wall=lambda: 1000.0)


async def settled(hooks: Webhooks) -> None:
    await asyncio.gather(*(line.task for line in hooks._lines if line.task is not None))


async def test_a_message_is_signed_and_tried_again_with_the_same_id(receiver: Receiver) -> None:
    receiver.statuses = [500, 429]
    told = hooks(receiver, secret_env="SECRET")
    told.tell("incident.opened", "i1/opened", "glm", INCIDENT)
    await settled(told)
    assert [body["id"] for _, body in receiver.got] == ["i1/opened"] * 3
    headers, body = receiver.got[-1]
    assert body["incident"] == INCIDENT
    assert headers["X-Rotator-Signature"] == sign("s", 1000, json.dumps(body, separators=(",", ":")).encode())
    assert told.dropped == 0
    await told.close()


async def test_refusals_and_redirects_are_not_tried_again_and_attempts_end(receiver: Receiver) -> None:
    receiver.statuses = [404, 302, 500, 500]
    told = hooks(receiver, attempts_max=2)
    for number in range(3):
        told.tell("incident.opened", f"i{number}", None, INCIDENT)
    await settled(told)
    assert [body["id"] for _, body in receiver.got] == ["i0", "i1", "i2", "i2"]
    assert (told.dropped, receiver.elsewhere) == (3, 0)
    await told.close()


async def test_a_receiver_that_hangs_holds_up_nobody_and_bounds_what_waits(receiver: Receiver) -> None:
    receiver.gate.clear()
    told = hooks(receiver, events=["incident.opened"])
    for number in range(WAITING_MAX + 10):
        told.tell("incident.opened", str(number), None, INCIDENT)
    told.tell("incident.closed", "closed", None, INCIDENT)
    assert (len(told._lines[0].waiting), told.dropped) == (WAITING_MAX, 10)
    async with asyncio.timeout(2):
        await told.close()
