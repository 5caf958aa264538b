"""Requests through an agent: as if the engine had been asked itself, also where it fails."""

import asyncio
import socket
from collections.abc import AsyncIterator

import aiohttp
import pytest
from aiohttp import web

from rotator.adapters.agents import Agents
from rotator.adapters.vllm import VllmControl
from rotator.agent import relay as relay_module
from rotator.agent.engines import Engines
from rotator.agent.run import listen
from rotator.ports import EngineUnreachable
from rotator.ports_nodes import TOKEN_HEADER
from rotator.service.channel import Lost
from rotator.service.pool import Pool, Unreachable
from tests.contract.agent.conftest import Running, engine_up

SOON_S = 5.0


@pytest.fixture
async def pool(agents: Agents) -> AsyncIterator[Pool]:
    made = Pool(2.0, agents.door)
    yield made
    made.close()


async def declared(agents: Agents, port: int, name: str = "glm/5.1") -> str:
    """The URL of an engine on that port, once the agent knows it."""
    url = agents.declare("n", name, port)
    await agents.look(deadline_s=SOON_S)
    return url


async def test_a_request_reaches_the_engine_as_it_was_sent_but_for_what_is_ours(agents: Agents, pool: Pool) -> None:
    async def echo(request: web.Request) -> web.Response:
        seen = {"path": request.path_qs, "body": (await request.read()).decode(), "headers": dict(request.headers)}
        return web.json_response(seen, headers={"X-Own": "kept"})

    async with engine_up(echo) as port:
        url = await declared(agents, port)
        assert url.endswith("/engines/glm%2F5.1")
        answer = await pool.ask(b"POST", url, b"/v1/chat?a=%20b", [(b"authorization", b"Bearer own")], b"hello")
        told = await answer.read()
    assert answer.status == 200
    assert (b"x-own", b"kept") in answer.headers
    assert b'"path": "/v1/chat?a=%20b"' in told
    assert b'"body": "hello"' in told
    assert b"bearer own" in told.lower(), "an engine's own key is for the engine"
    assert TOKEN_HEADER.encode() not in told.lower(), "the agent's is not"


def test_what_an_agent_accepts_may_send_small_answers_at_once() -> None:
    with listen("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP, "asyncio sets TCP_NODELAY on nothing else: 40 ms a request"


async def test_a_stream_comes_piece_by_piece_and_breaks_off_where_the_engine_does(agents: Agents, pool: Pool) -> None:
    go_on = asyncio.Event()

    async def stream(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await answer.prepare(request)
        await answer.write(b"data: one\n\n")
        await go_on.wait()
        assert request.transport is not None
        request.transport.abort()
        return answer

    async with engine_up(stream) as port:
        answer = await pool.ask(b"GET", await declared(agents, port), b"/", [], b"")
        async with asyncio.timeout(SOON_S):
            assert await answer.readany() == b"data: one\n\n"
            go_on.set()
            with pytest.raises(Lost):
                await answer.read()


async def test_a_client_that_leaves_is_gone_for_the_engine_too(agents: Agents, pool: Pool) -> None:
    left = asyncio.Event()

    async def wait(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse()
        await answer.prepare(request)
        await answer.write(b"x")
        try:
            while True:
                await asyncio.sleep(0.02)
                await answer.write(b"x")
        except (ConnectionError, asyncio.CancelledError):
            left.set()
            raise

    async with engine_up(wait) as port:
        answer = await pool.ask(b"GET", await declared(agents, port), b"/", [], b"")
        await answer.readany()
        answer.close()
        async with asyncio.timeout(SOON_S):
            await left.wait()


async def test_an_engine_that_is_not_there_was_sent_nothing(agents: Agents, pool: Pool) -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.Response()

    async with engine_up(answer) as port:
        url = await declared(agents, port)
    with pytest.raises(Unreachable, match="no connection to it"):
        await pool.ask(b"GET", url, b"/health", [], b"")
    with pytest.raises(Unreachable, match="knows no engine 'other'"):
        await pool.ask(b"GET", url.rpartition("/")[0] + "/other", b"/health", [], b"")
    control = VllmControl(doors=agents.door)
    with pytest.raises(EngineUnreachable, match="agent could not reach it"):
        await control.version(url, deadline_s=SOON_S)
    assert not await control.is_healthy(url, deadline_s=SOON_S)
    await control.close()


async def test_an_engine_that_closes_without_an_answer_may_have_had_it(agents: Agents, pool: Pool) -> None:
    async def close(request: web.Request) -> web.Response:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    async with engine_up(close) as port:
        with pytest.raises(Lost):
            await pool.ask(b"POST", await declared(agents, port), b"/v1/chat", [], b"{}")


async def test_a_request_that_is_too_large_is_refused_and_not_passed_on(agents: Agents, pool: Pool) -> None:
    asked = []

    async def note(request: web.Request) -> web.Response:
        asked.append(request.path)
        return web.Response()

    async with engine_up(note) as port:
        answer = await pool.ask(b"POST", await declared(agents, port), b"/", [], b"x" * (2 << 20))
        assert answer.status == 413
        assert asked == []


async def test_an_agent_that_was_restarted_is_told_of_the_engines_again(agents: Agents, agent: Running) -> None:
    await declared(agents, 8001)
    agents._nodes["n"].instance = "of before its restart"
    await agents.call("n", "DELETE", "/v1/engines", query={"engine": "glm/5.1"}, deadline_s=SOON_S)
    await agents.look(deadline_s=SOON_S)
    told = await agents.call("n", "GET", "/v1/node", deadline_s=SOON_S)
    assert told["engines"] == {"glm/5.1": 8001}


async def test_a_socket_is_carried_both_ways_until_one_side_closes_it(agents: Agents) -> None:
    async def socket(request: web.Request) -> web.WebSocketResponse:
        there = web.WebSocketResponse()
        await there.prepare(request)
        async for message in there:
            await there.send_str(f"{request.path_qs} {message.data}")
            await there.close(code=4000)
        return there

    async with engine_up(socket) as port, aiohttp.ClientSession() as session:
        url = await declared(agents, port)
        door = agents.door(url)
        assert door is not None
        tls = door.tls
        assert tls is not None
        async with session.ws_connect(f"{url}/v1/realtime?model=x", headers=door.headers, ssl=tls) as here:
            await here.send_str("hello")
            assert (await here.receive(SOON_S)).data == "/v1/realtime?model=x hello"
            assert (await here.receive(SOON_S)).type is aiohttp.WSMsgType.CLOSE
            assert here.close_code == 4000
        with pytest.raises(aiohttp.WSServerHandshakeError):
            await session.ws_connect(f"{url}/v1/realtime", ssl=tls)


async def test_a_socket_to_an_engine_that_stands_still_is_refused_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_module, "SOCKET_OPENS_S", 0.1)
    silent = await asyncio.start_server(lambda *_: asyncio.sleep(0), "127.0.0.1", 0)
    port = silent.sockets[0].getsockname()[1]
    relay = relay_module.Relay(Engines({"m": port}), bytes_max=1, requests_max=1, connect_s=1)
    scope = {"type": "websocket", "raw_path": b"/engines/m/v1/realtime", "query_string": b"", "headers": []}
    sent: list[relay_module.Message] = []

    async def receive() -> relay_module.Message:
        return {"type": "websocket.connect"}

    async def send(message: relay_module.Message) -> None:
        sent.append(message)

    async with asyncio.timeout(SOON_S):
        for _ in range(2):  # the first leaves room for the second
            await relay.serve(scope, receive, send)
    assert [m["status"] for m in sent if "status" in m] == [503, 503]
    await relay.close()
    silent.close()
