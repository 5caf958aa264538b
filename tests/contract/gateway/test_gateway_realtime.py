"""WebSockets: each is one request that waits, stands still and is cut like any other."""

import asyncio
import json
from typing import Any

import aiohttp
import pytest
from aiohttp import WSMsgType, web
from yarl import URL

from rotator.service import inbox
from tests.contract.gateway.rig import Rig, rig_up, until


class Socket:
    """An engine's realtime endpoint: greets, echoes, and closes when told to."""

    def __init__(self) -> None:
        self.opened: list[web.WebSocketResponse] = []
        self.texts: list[str] = []
        self.ended = 0

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse(protocols=("realtime",))
        await socket.prepare(request)
        self.opened.append(socket)
        await socket.send_json({"type": "session.created", "id": "sess-engine", "model": "org/real"})
        try:
            async for message in socket:
                if message.type is WSMsgType.TEXT:
                    self.texts.append(message.data)
                    await socket.send_str(message.data)
                elif message.type is WSMsgType.BINARY:
                    await socket.send_bytes(message.data)
        finally:
            self.ended += 1
        return socket


def ws(rig: Rig, path: str = "/v1/realtime?model=a", **options: Any) -> Any:
    return rig.client.ws_connect(rig.url.replace("http", "ws") + path, **options)


async def test_messages_pass_both_ways_unchanged() -> None:
    async with rig_up() as rig:
        engine = rig.engines["a"].answer = Socket()
        async with ws(rig) as socket:
            assert (await socket.receive_json())["id"] == "sess-engine"
            await socket.send_str('{"type": "x",  "model":"a"}')
            assert (await socket.receive()).data == '{"type": "x",  "model":"a"}'
            await socket.send_bytes(b"\x00\xff")
            assert (await socket.receive()).data == b"\x00\xff"
            assert rig.traffic.in_flight("a") == 1
        await until(lambda: rig.traffic.in_flight("a") == 0)
        await until(lambda: engine.ended == 1)
        assert rig.ends == [("a", "ok")]
        assert rig.engines["a"].seen[0].path == "/v1/realtime?model=a"


async def test_a_socket_waits_for_its_engine_and_keeps_what_the_client_said() -> None:
    async with rig_up(is_open=False) as rig:
        engine = rig.engines["a"].answer = Socket()
        async with ws(rig) as socket:
            await socket.send_str("one")
            await socket.send_str("two")
            await until(lambda: rig.traffic.waiting("a") == 1)
            rig.traffic.open("a")
            assert (await socket.receive_json())["type"] == "session.created"
            assert [(await socket.receive()).data for _ in range(2)] == ["one", "two"]
            assert engine.texts == ["one", "two"]


async def test_a_client_that_leaves_while_it_waits_is_forgotten() -> None:
    async with rig_up(is_open=False) as rig:
        async with ws(rig) as socket:
            await socket.send_str("hello")
            await until(lambda: rig.traffic.waiting("a") == 1)
        await until(lambda: rig.traffic.waiting("a") == 0)
        assert rig.ends == [("a", "client_left")]


async def test_the_model_may_come_in_the_first_message_after_a_greeting() -> None:
    async with rig_up() as rig:
        engine = rig.engines["a"].answer = Socket()
        async with ws(rig, "/v1/realtime") as socket:
            assert (await socket.receive_json())["type"] == "session.created"
            await socket.send_json({"type": "session.update"})
            assert (await socket.receive_json())["error"]["code"] == "missing_model"
            await socket.send_json({"type": "session.update", "model": "a"})
            assert await socket.receive_json() == {"type": "session.update", "model": "a"}
            assert len(engine.texts) == 1


async def test_an_alias_is_renamed_in_the_url_in_messages_and_in_answers() -> None:
    async with rig_up(aliases={"nick": "a"}, served={"a": "org/real"}) as rig:
        engine = rig.engines["a"].answer = Socket()
        async with ws(rig, "/v1/realtime?model=nick&x=1") as socket:
            assert (await socket.receive_json())["model"] == "nick"
            await socket.send_json({"session": {"model": "nick"}})
            assert await socket.receive_json() == {"session": {"model": "nick"}}
            assert json.loads(engine.texts[0]) == {"session": {"model": "org/real"}}
        assert rig.engines["a"].seen[0].path == "/v1/realtime?model=org%2Freal&x=1"


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v1/realtime?model=nobody", 404),
        ("/sleep", 404),
        ("/v1/%72ealtime", 404),
        ("//v1/realtime", 404),
        ("/ws", 404),
    ],
)
async def test_other_sockets_and_unknown_models_are_refused_at_the_handshake(path: str, status: int) -> None:
    async with rig_up() as rig:
        with pytest.raises(aiohttp.WSServerHandshakeError) as e:
            await rig.client.ws_connect(URL(rig.url.replace("http", "ws") + path, encoded=True))
        assert e.value.status == status
        assert rig.engines["a"].seen == []


async def test_a_failing_engine_is_told_as_an_error_event_before_the_socket_closes() -> None:
    async with rig_up() as rig:
        rig.traffic.fail("a", "a is failing")
        async with ws(rig) as socket:
            said = await socket.receive_json()
            assert (said["type"], said["error"]["message"]) == ("error", "a is failing")
            assert (await socket.receive()).type is WSMsgType.CLOSE
            assert socket.close_code == 1013


async def test_a_held_socket_says_nothing_until_released() -> None:
    async with rig_up() as rig:
        rig.engines["a"].answer = Socket()
        async with ws(rig) as socket:
            await socket.receive()
            rig.traffic.hold("a")
            await socket.send_str("x")
            with pytest.raises(TimeoutError):
                await socket.receive(timeout=0.1)
        async with ws(rig, "/v1/realtime?model=a") as socket:
            rig.traffic.release_hold("a")
            assert (await socket.receive_json())["type"] == "session.created"


async def test_a_cut_socket_hears_why_and_the_engines_side_is_closed() -> None:
    async with rig_up() as rig:
        engine = rig.engines["a"].answer = Socket()
        async with ws(rig) as socket:
            await socket.receive()
            rig.traffic.abort("a", "an operator forced a to sleep")
            said = await socket.receive_json()
            assert "an operator forced a to sleep" in said["error"]["message"]
            assert (await socket.receive()).type is WSMsgType.CLOSE
        await until(lambda: engine.ended == 1)
        assert rig.ends == [("a", "aborted")]


async def test_an_engine_that_breaks_the_socket_is_an_error_not_an_end() -> None:
    async with rig_up() as rig:
        engine = rig.engines["a"].answer = Socket()
        async with ws(rig) as socket:
            await socket.receive()
            transport = engine.opened[0]._req.transport  # type: ignore[union-attr] # it is connected
            transport.abort()  # type: ignore[union-attr] # as above
            assert (await socket.receive_json())["error"]["code"] == "engine_failed"
            assert (await socket.receive()).type is WSMsgType.CLOSE
            assert socket.close_code == 1011
        assert rig.ends == [("a", "failed")]


async def test_an_engine_that_closes_the_socket_closes_it_for_the_client_with_its_code() -> None:
    async with rig_up() as rig:
        engine = rig.engines["a"].answer = Socket()
        async with ws(rig) as socket:
            await socket.receive()
            await engine.opened[0].close(code=4001)
            assert (await socket.receive()).type is WSMsgType.CLOSE
            assert socket.close_code == 4001


async def test_an_engine_without_sockets_is_said_to_refuse_it() -> None:
    async with rig_up() as rig, ws(rig) as socket:
        assert (await socket.receive_json())["error"]["code"] == "engine_refused"
        await asyncio.wait_for(rig.traffic.drained("a"), 1)


async def test_an_engine_that_is_not_there_alarms_the_loop() -> None:
    async with rig_up() as rig:
        await rig.engines["a"].stop()
        async with ws(rig) as socket:
            assert (await socket.receive_json())["error"]["code"] == "engine_unavailable"
        assert [e["engine"] for e in rig.events("engine.unreachable")] == ["a"]


async def test_what_a_client_may_say_before_its_engine_is_awake_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox, "INBOX_BYTES_MAX", 1000)
    async with rig_up(is_open=False) as rig, ws(rig) as socket:
        for _ in range(20):
            await socket.send_str("x" * 100)
        assert (await socket.receive_json())["error"]["code"] == "too_much_waiting"
        await until(lambda: rig.traffic.waiting("a") == 0)
