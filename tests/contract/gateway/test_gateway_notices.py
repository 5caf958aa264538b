"""Loading notices: valid SSE from the first byte to the last, also when the wake fails."""

import asyncio
import json

import pytest
from aiohttp import web

from rotator.config import FallbackConfig
from tests.contract.gateway.rig import RawClient, Rig, Script, chat, raw_client, rig_up, until
from tests.contract.gateway.test_gateway_streams import unchunked

COMMENTS = {"x-rotator-notices": "comments"}


async def ask(rig: Rig, client: RawClient, notices: str = "comments", path: str = "/v1/chat/completions") -> bytes:
    """Begin a stream with notices; returns the answer's head."""
    body = json.dumps(chat(stream=True)).encode()
    await client.request("POST", path, body, Connection="close", X_Rotator_Notices=notices)
    return await client.until(b"\r\n\r\n")


def data_of(events: bytes) -> list[bytes]:
    """Each event's data, by the rules of the format; comments are none."""
    blocks = [block for block in events.split(b"\n\n") if block]
    lines = [[line for line in block.split(b"\n") if line.startswith(b"data: ")] for block in blocks]
    return [line[0][6:] for line in lines if line]


async def test_the_answer_begins_at_once_and_comments_say_what_is_awaited() -> None:
    async with rig_up(is_open=False, eta_s=3.0) as rig, raw_client(rig) as client:
        rig.directory.states["a"] = "waking"
        head = await ask(rig, client)
        assert b"200 OK" in head
        assert b"text/event-stream" in head
        assert b"x-rotator-eta-s: 3.0" in head
        assert b"x-rotator-engine: a" in head
        notice = await client.until(b"\n\n")
        assert b": rotator engine=a state=waking" in notice
        assert b"eta_s=3.0" in notice
        rig.directory.states["a"] = "awake"
        assert b"state=awake" in await client.until(b"state=awake")


async def test_the_engines_stream_follows_the_notices_unchanged() -> None:
    async with rig_up(is_open=False) as rig, raw_client(rig) as client:
        script = rig.engines["a"].answer = Script()
        await ask(rig, client)
        await client.until(b"\n\n\r\n")
        rig.traffic.open("a")
        script.say(b"data: 1\n\ndata: [DONE]\n\n")
        script.end()
        rest = await client.everything()
        assert rest.endswith(b"data: 1\n\ndata: [DONE]\n\n\r\n0\r\n\r\n")
        await until(lambda: rig.ends == [("a", "ok")])


async def test_a_wake_that_fails_ends_the_stream_with_an_error_event_and_no_done() -> None:
    async with rig_up(is_open=False) as rig, raw_client(rig) as client:
        await ask(rig, client)
        await client.until(b"\n\n\r\n")
        rig.traffic.fail("a", "its wake failed")
        rest = await client.everything()
        assert rest.endswith(b"0\r\n\r\n")
        (event,) = data_of(unchunked(rest))
        assert json.loads(event)["error"]["message"] == "its wake failed"
        assert b"[DONE]" not in rest


async def test_a_wait_that_expires_ends_the_stream_with_an_error_event() -> None:
    async with rig_up(is_open=False) as rig:
        headers = {**COMMENTS, "x-rotator-deadline-s": "0.05"}
        response, body = await rig.posted("/v1/chat/completions", chat(stream=True), headers=headers)
        assert response.status == 200
        assert json.loads(data_of(body)[-1])["error"]["code"] == "wait_expired"


async def test_an_error_that_the_engine_answers_becomes_an_event() -> None:
    async def refuse(_: web.Request) -> web.StreamResponse:
        return web.json_response({"error": {"message": "too long", "type": "x", "code": 400}}, status=400)

    async with rig_up(is_open=False) as rig, raw_client(rig) as client:
        rig.engines["a"].answer = refuse
        await ask(rig, client)
        await until(lambda: rig.traffic.waiting("a") == 1)
        rig.traffic.open("a")
        rest = await client.everything()
        assert rest.endswith(b"0\r\n\r\n")
        assert json.loads(data_of(unchunked(rest))[-1])["error"]["message"] == "too long"


async def test_an_engine_that_answers_no_events_becomes_an_error_event_too() -> None:
    async def plain(_: web.Request) -> web.StreamResponse:
        return web.Response(text="hello")

    async with rig_up(is_open=False) as rig, raw_client(rig) as client:
        rig.engines["a"].answer = plain
        await ask(rig, client)
        await until(lambda: rig.traffic.waiting("a") == 1)
        rig.traffic.open("a")
        rest = await client.everything()
        assert json.loads(data_of(unchunked(rest))[-1])["error"]["code"] == "engine_error"


async def test_an_engine_that_dies_after_the_notices_breaks_the_connection() -> None:
    async with rig_up(is_open=False) as rig, raw_client(rig) as client:
        script = rig.engines["a"].answer = Script()
        await ask(rig, client)
        await until(lambda: rig.traffic.waiting("a") == 1)
        rig.traffic.open("a")
        script.say(b"data: 1\n\n")
        await client.until(b"data: 1\n\n\r\n")
        script.die()
        rest = await client.everything()
        assert json.loads(data_of(unchunked(rest))[-1])["error"]["code"] == "engine_failed"
        assert not rest.endswith(b"0\r\n\r\n")


async def test_notices_as_reasoning_are_chat_chunks_of_the_asked_model() -> None:
    async with rig_up(is_open=False, aliases={"nick": "a"}) as rig:
        rig.directory.states["a"] = "starting"
        headers = {"x-rotator-notices": "reasoning", "x-rotator-deadline-s": "0.05"}
        _, body = await rig.posted("/v1/chat/completions", chat("nick", stream=True), headers=headers)
        first = json.loads(data_of(body)[0])
        assert (first["object"], first["model"]) == ("chat.completion.chunk", "nick")
        delta = first["choices"][0]["delta"]
        assert "nick is starting" in delta["reasoning_content"]
        assert "content" not in delta


async def test_reasoning_falls_back_to_comments_where_there_are_no_chat_chunks() -> None:
    async with rig_up(is_open=False) as rig, raw_client(rig) as client:
        await ask(rig, client, "reasoning", "/v1/completions")
        notice = await client.until(b"\n\n")
        assert b": rotator engine=a" in notice


async def test_notices_can_be_asked_for_in_the_query() -> None:
    async with rig_up(is_open=False) as rig:
        path = "/v1/chat/completions?x-rotator-notices=comments"
        headers = {"x-rotator-deadline-s": "0.05"}
        _, body = await rig.posted(path, chat(stream=True), headers=headers)
        assert body.startswith(b": rotator ")


async def test_nobody_who_did_not_ask_gets_notices() -> None:
    async with rig_up(is_open=False) as rig:
        headers = {"x-rotator-deadline-s": "0.05"}
        response, _ = await rig.posted("/v1/chat/completions", chat(stream=True), headers=headers)
        assert response.status == 503
        response, _ = await rig.posted("/v1/chat/completions", chat(), headers={**COMMENTS, **headers})
        assert response.status == 503


async def test_an_awake_engines_stream_has_no_notices() -> None:
    async with rig_up() as rig:
        script = rig.engines["a"].answer = Script()
        script.say(b"data: 1\n\n")
        script.end()
        _, body = await rig.posted("/v1/chat/completions", chat(stream=True), headers=COMMENTS)
        assert body == b"data: 1\n\n"


async def test_an_unknown_kind_of_notices_is_400() -> None:
    async with rig_up() as rig:
        response, _ = await rig.posted("/v1/completions", chat(), headers={"x-rotator-notices": "loud"})
        assert response.status == 400


async def test_a_client_that_leaves_while_it_reads_notices_is_forgotten() -> None:
    async with rig_up(is_open=False) as rig, raw_client(rig) as client:
        await ask(rig, client)
        await until(lambda: rig.traffic.waiting("a") == 1)
        client.leave()
        await until(lambda: rig.traffic.waiting("a") == 0)
        assert rig.ends == [("a", "client_left")]


async def test_the_wait_of_a_stream_with_notices_shows_in_the_queue() -> None:
    async with rig_up(is_open=False) as rig, raw_client(rig) as client:
        head = await ask(rig, client)
        (row,) = rig.traffic.entries()
        assert f"x-rotator-request-id: {row.id}".encode() in head


async def test_a_fallback_after_notices_is_told_in_a_comment() -> None:
    fallbacks = {"a": FallbackConfig(model="b")}
    async with rig_up(is_open=False, fallbacks=fallbacks) as rig, raw_client(rig) as client:
        script = rig.engines["b"].answer = Script()
        script.say(b'data: {"model":"b"}\n\n')
        script.end()
        rig.traffic.open("b")
        await ask(rig, client)
        await until(lambda: rig.traffic.waiting("a") == 1)
        rig.traffic.fail("a", "its wake failed")
        rest = await client.everything()
        assert b": rotator fallback=b\n\n" in rest
        assert rest.endswith(b'data: {"model":"a"}\n\n\r\n0\r\n\r\n')


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/responses"])
async def test_errors_after_notices_speak_the_clients_dialect(path: str) -> None:
    async with rig_up(is_open=False) as rig:
        headers = {**COMMENTS, "x-rotator-deadline-s": "0.05"}
        _, body = await rig.posted(path, chat(stream=True), headers=headers)
        last = body.split(b"\n\n")[-2]
        assert last.startswith(b"event: error\ndata: ")
        assert json.loads(last.split(b"data: ", 1)[1])["type"] == "error"


async def test_a_cut_right_after_admission_does_not_leave_a_ticket_behind() -> None:
    async with rig_up(is_open=False) as rig, raw_client(rig) as client:
        rig.engines["a"].answer = Script()
        await ask(rig, client)
        await until(lambda: rig.traffic.waiting("a") == 1)
        rig.traffic.open("a")
        client.leave()
        await until(lambda: rig.traffic.in_flight("a") == 0 and bool(rig.ends))
        await asyncio.sleep(0)
        assert rig.ends == [("a", "client_left")]
