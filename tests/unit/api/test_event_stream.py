"""The event stream, read as a client's library would, without a server in between."""

import asyncio
import json
from collections.abc import AsyncGenerator

import pytest
from fastapi import FastAPI

from rotator.service.api import create_api
from rotator.service.api_events import LAST_EVENT
from rotator.service.events import EventBus
from rotator.service.keys import Keys, allow_all
from tests.unit.api.conftest import key
from tests.unit.api.fakes import FakeOperations


class Reader:
    """One ASGI request to /events; ``gone`` is the client closing its connection."""

    def __init__(
        self,
        bus: EventBus,
        query: str = "",
        last_event_id: str | None = None,
        keepalive_s: float = 5,
        app: FastAPI | None = None,
        path: str = "/events",
        secret: str = "",
    ) -> None:
        self._app = app or create_api(FakeOperations(), bus, authorize=allow_all, keepalive_s=keepalive_s)
        headers = [(b"host", b"127.0.0.1")]
        if secret:
            headers.append((b"authorization", f"Bearer {secret}".encode()))
        if last_event_id is not None:
            headers.append((b"last-event-id", last_event_id.encode()))
        self._scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "GET",
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "headers": headers,
            "scheme": "http",
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 8400),
        }
        self._chunks: asyncio.Queue[bytes] = asyncio.Queue()
        self._asked = False
        self.gone = asyncio.Event()
        self.ended = asyncio.Event()
        self.status = 0
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "Reader":
        self._task = asyncio.create_task(self.run())
        assert await self.chunk() == b": stream open\n\n"
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.gone.set()
        assert self._task is not None
        async with asyncio.timeout(5):
            await self._task

    async def run(self) -> None:
        await self._app(self._scope, self._receive, self._send)
        self.ended.set()

    async def _receive(self) -> dict[str, object]:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, object]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif message.get("body"):
            self._chunks.put_nowait(message["body"])

    async def chunk(self) -> bytes:
        async with asyncio.timeout(5):
            return await self._chunks.get()

    def left(self) -> list[bytes]:
        """What came and was not read."""
        return [self._chunks.get_nowait() for _ in range(self._chunks.qsize())]

    async def event(self) -> dict[str, object]:
        lines = (await self.chunk()).decode().split("\n")
        assert [line.split(":")[0] for line in lines[:3]] == ["id", "event", "data"]
        assert lines[3:] == ["", ""]
        data = json.loads(lines[2].removeprefix("data: "))
        assert (lines[0], lines[1]) == (f"id: {data['id']}", f"event: {data['kind']}")
        return data


async def test_events_come_as_they_happen_with_their_ids(bus: EventBus):
    bus.publish("swap.begun", "before")
    async with Reader(bus) as reader:
        bus.publish("engine.awake", "glm-5.1", seconds=1.9)
        event = await reader.event()
    assert (event["id"], event["engine"], event["data"]) == (2, "glm-5.1", {"seconds": 1.9})


async def test_a_reader_that_comes_back_goes_on_after_the_last_event_it_saw(bus: EventBus):
    for n in range(3):
        bus.publish("swap.begun", n=n)
    async with Reader(bus, last_event_id="1") as reader:
        assert [(await reader.event())["id"] for _ in range(2)] == [2, 3]


async def test_an_id_of_an_earlier_life_of_the_service_brings_everything_that_is_kept(bus: EventBus):
    bus.publish("service.started")
    async with Reader(bus, last_event_id="999") as reader:
        assert (await reader.event())["id"] == 1


async def test_what_is_kept_can_be_asked_for_without_a_header(bus: EventBus):
    bus.publish("service.started")
    async with Reader(bus, query="after=0") as reader:
        assert (await reader.event())["kind"] == "service.started"


@pytest.mark.parametrize(
    ("query", "seen"),
    [("kind=swap", [1, 3]), ("kind=swap.done", [3]), ("engine=b", [2, 3]), ("kind=swap&engine=b&kind=gpu", [3])],
)
async def test_a_reader_sees_only_the_kinds_and_engines_it_asked_for(bus: EventBus, query: str, seen: list[int]):
    bus.publish("swap.begun", "a")
    bus.publish("swapped", "b")
    bus.publish("swap.done", "b")
    async with Reader(bus, query=f"after=0&{query}") as reader:
        assert [(await reader.event())["id"] for _ in seen] == seen


async def test_a_silent_stream_is_kept_alive_with_comments_and_goes_on(bus: EventBus):
    async with Reader(bus, keepalive_s=0.01) as reader:
        assert await reader.chunk() == b": nothing new\n\n"
        assert await reader.chunk() == b": nothing new\n\n"
        bus.publish("engine.asleep", "glm-5.1")
        chunk = b":"
        while chunk.startswith(b":"):
            chunk = await reader.chunk()
    assert b"event: engine.asleep" in chunk


async def test_the_stream_ends_when_its_client_goes_and_leaves_nothing_behind(bus: EventBus):
    async with Reader(bus) as reader:
        reader.gone.set()
        async with asyncio.timeout(5):
            await reader.ended.wait()
    others = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
    assert others == []


async def test_the_stream_ends_with_the_service_even_for_a_reader_of_other_kinds(bus: EventBus):
    async with Reader(bus, query="kind=swap") as reader:
        bus.publish(LAST_EVENT)
        assert (await reader.event())["kind"] == LAST_EVENT
        async with asyncio.timeout(5):
            await reader.ended.wait()


async def test_the_stream_ends_with_the_key_that_it_was_opened_with(bus: EventBus):
    keys = Keys([key("operate"), key("admin")])
    app = create_api(FakeOperations(), bus, authorize=keys.authorize_operator, keepalive_s=0.01)
    async with Reader(bus, app=app, secret="operate-secret") as gone, Reader(bus, app=app, secret="admin-secret"):
        keys.replace([key("admin")])
        bus.publish("swap.begun", "told to nobody without a key")
        async with asyncio.timeout(5):
            await gone.ended.wait()
        assert not [c for c in gone.left() if b"swap.begun" in c]


class EndlessLog:
    """A log to which nothing is added."""

    async def read(self, path: str, *, lines: int, follow: bool) -> AsyncGenerator[tuple[str, ...]]:
        yield ("the last line",)
        while follow:
            await asyncio.sleep(0.01)
            yield ()


async def test_a_followed_log_ends_with_the_key_that_it_was_opened_with(bus: EventBus):
    keys = Keys([key("operate")])
    app = create_api(FakeOperations(), bus, authorize=keys.authorize_operator, logs=EndlessLog())
    reader = Reader(bus, "follow=true", app=app, path="/engines/glm-5.1/logs", secret="operate-secret")
    reading = asyncio.create_task(reader.run())
    assert await reader.chunk() == b"the last line\n"
    keys.replace([key("admin")])
    async with asyncio.timeout(5):
        await reading


async def test_a_value_that_is_no_json_is_shown_as_text(bus: EventBus):
    async with Reader(bus) as reader:
        bus.publish("gpu.unknown", error=ValueError("hangs"))
        assert (await reader.event())["data"] == {"error": "hangs"}


async def test_readers_are_bounded_and_a_place_is_free_again_when_one_goes(
    bus: EventBus, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("rotator.service.api_events.READERS_MAX", 1)
    app = create_api(FakeOperations(), bus, authorize=allow_all)
    async with Reader(bus, app=app):
        second = Reader(bus, app=app)
        await second.run()
        assert second.status == 503
    async with Reader(bus, app=app) as third:
        assert third.status == 200
