"""Bytes and values that nobody would send. `make fuzz` tries many more of them."""

import asyncio
import os
import re
from typing import Any

import pytest
import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rotator.config import HttpConfig
from rotator.service.api import create_api
from rotator.service.events import EventBus
from rotator.service.keys import Keys
from tests.contract.security.front import HOST, Door, front, statuses
from tests.unit.api.fakes import FakeOperations

EXAMPLES = int(os.environ.get("ROTATOR_FUZZ", "0"))
FEW = settings(
    max_examples=EXAMPLES or 60,
    deadline=None,
    database=None,
    derandomize=not EXAMPLES,
    suppress_health_check=list(HealthCheck),
)
LEAKS = re.compile(rb"Traceback|File \"/|/site-packages/|0x[0-9a-f]{8,}|\.py\b")
OWN_REFUSALS = {501, 503, 505}  # told of what the service does not do, not of a failure in it
HTTP = HttpConfig(head_deadline_s=0.3, body_deadline_s=0.3)

words = st.sampled_from(
    [
        *(
            b"GET",
            b"POST",
            b"PUT",
            b"OPTIONS",
            b"HEAD",
            b"\xff",
            b"get",
            b"CONNECT",
            b" ",
            b"\t",
            b"/",
            b"*",
            b"//",
            b"%2e%2e/",
        ),
        *(
            b"/v1/chat/completions",
            b"/v1/models/%00",
            b"/engines/..%2f..",
            b"/events",
            b"/wake?model=glm",
            b"/docs",
            b"/healthz",
        ),
        *(
            b" HTTP/1.1\r\n",
            b" HTTP/1.0\r\n",
            b" HTTP/1.2\r\n",
            b"\r\n",
            b"\n",
            b"\r",
            b"\0",
            b": ",
            b":",
            HOST,
            b"\r\n\r\n",
        ),
        *(
            b"content-length: 3\r\n",
            b"content-length: 0\r\n",
            b"transfer-encoding: chunked\r\n",
            b"connection: close\r\n",
        ),
        *(
            b"connection: upgrade\r\nupgrade: websocket\r\n",
            b"connection: upgrade\r\nupgrade: h2c\r\n",
            b"expect: 100-continue\r\n",
        ),
        *(
            b"content-type: application/json\r\n",
            b'{"model":"a"}',
            b"{}",
            b"[" * 2000,
            b"3\r\n{} \r\n",
            b"0\r\n\r\n",
            b"ffffffff\r\n",
        ),
        *(
            b"authorization: Bearer \xff\r\n",
            b"sec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n",
            b"sec-websocket-version: 13\r\n",
        ),
        *(
            b"x-rotator-deadline-s: nan\r\n",
            b"x-rotator-deadline-s: 1e999\r\n",
            b"host: \xe9\r\n",
            b"a" * 70000,
            b"range: bytes=0-\r\n",
        ),
    ]
)
requests = st.lists(st.one_of(words, st.binary(max_size=12)), min_size=1, max_size=14).map(b"".join)
begun = st.sampled_from([b"", b"POST /v1/chat/completions HTTP/1.1\r\n" + HOST, b"GET /engines HTTP/1.1\r\n" + HOST])


@given(data=st.data())
@settings(FEW, max_examples=max(2, EXAMPLES // 40))
def test_no_bytes_make_it_fail_tell_of_its_inside_or_stop_serving_others(data: st.DataObject):
    async def try_them() -> None:
        async with front(HTTP) as door:
            for _ in range(40):
                await _try(door, data.draw(begun) + data.draw(requests))
            assert await door.is_well()

    asyncio.run(try_them())


async def _try(door: Door, sent: bytes) -> None:
    said = await door.say(sent, within_s=3.0)
    assert not LEAKS.search(said), (sent, said)
    if not said.startswith(b"HTTP/1.1 101"):
        for status in re.findall(rb"HTTP/1\.1 (\d+) ", said):
            assert int(status) < 500 or int(status) in OWN_REFUSALS or b"cannot be reached" in said, (sent, said)
    if said and not said.startswith(b"HTTP/1.1 101") and b"text/event-stream" not in said:
        statuses(said)


def make_api() -> Any:
    return create_api(FakeOperations(), EventBus(), authorize=Keys().authorize_operator)


_SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", make_api()).exclude(path="/events")


@_SCHEMA.parametrize()
@settings(FEW, max_examples=EXAMPLES or 2)
def test_no_values_make_the_operators_api_fail(case: schemathesis.Case):
    answer = case.call(headers={"host": "127.0.0.1"})
    assert answer.status_code < 500 or answer.status_code == 502, answer.text
    assert not LEAKS.search(answer.content), answer.text


EVIL = [
    *(
        "../../../../etc/passwd",
        "..%2f..%2fetc%2fpasswd",
        "%2e%2e/%2e%2e/etc/passwd",
        "/etc/passwd",
        "a/../../b",
        "~root",
    ),
    *("; touch /tmp/owned", "$(touch /tmp/owned)", "`id`", "| id", "--config=/etc/passwd", "-rf", "..\\..\\windows"),
    *(
        "' OR '1'='1",
        "1; DROP TABLE engines",
        "{{7*7}}",
        "${jndi:ldap://x}",
        "<script>alert(1)</script>",
        "{port}",
        "*",
    ),
    *(
        "http://169.254.169.254/",
        "file:///etc/passwd",
        "\u202egpj",
        "a" * 5000,
        "a\x00b",
        "%00",
        "a\r\nx: y",
        "%(port)s",
    ),
]


@pytest.fixture(scope="module")
def operator() -> tuple[TestClient, FakeOperations]:
    ops, keys = FakeOperations(), Keys()
    api = create_api(ops, EventBus(), authorize=keys.authorize_operator, guard=keys.guard)
    return TestClient(api, base_url="http://127.0.0.1:8400", raise_server_exceptions=False), ops


def places() -> list[tuple[str, str, str]]:
    """Every parameter that a client fills in, from the description itself: method, path, its name."""
    return [
        (method, path, parameter["name"])
        for path, methods in make_api().openapi()["paths"].items()
        for method, operation in methods.items()
        for parameter in operation.get("parameters", ())
        if parameter["in"] != "header" and path != "/events"
    ]


def test_no_name_leads_out_of_what_is_configured(operator: tuple[TestClient, FakeOperations]):
    """Engines, GPUs, incidents, reservations, tables, cursors: a name that is not known is refused, never used."""
    client, ops = operator
    for at, (method, path, name) in enumerate(places()):
        for evil in EVIL if EXAMPLES else EVIL[at % 5 :: 5]:
            filled = re.sub(r"\{.*?\}", lambda _, word=evil: word.replace("?", "").replace("#", ""), path)
            query = {} if f"{{{name}" in path else {name: evil}
            try:
                answer = client.request(method, filled, params=query)
            except Exception as e:  # the client itself refuses some addresses
                assert type(e).__name__ in ("InvalidURL", "UnsupportedProtocol", "LocalProtocolError"), e  # noqa: PT017
                continue
            assert answer.status_code < 500, (method, filled, query, answer.text)
            assert "root:" not in answer.text
            assert not LEAKS.search(answer.content.replace(evil.encode("utf-8", "replace"), b"")), answer.text
    used = {c.engine for c in ops.commands}
    assert used <= {"glm", "deepseek", "glm-5.1", "deepseek-v4-flash"}, used


async def test_no_model_name_leads_anywhere_but_to_its_engine():
    async with front() as door:
        for evil in EVIL:
            response, said = await door.rig.posted("/v1/chat/completions", {"model": evil, "messages": []})
            assert response.status in (400, 404), said
            assert not LEAKS.search(said.replace(evil.encode(), b""))
            async with door.rig.client.get(f"{door.rig.url}/v1/responses/{evil[:60].replace('#', '')}") as answer:
                assert answer.status in (200, 400, 404, 405)
        asked = [seen.path for engine in door.rig.engines.values() for seen in engine.seen]
        assert asked
        assert all(re.fullmatch(r"/v1/responses/[A-Za-z0-9_-]+", path) for path in asked), asked
