"""Streams that stand still, break, or are read slowly: nothing truncated ever ends as if it were whole."""

import asyncio
import json
import re

import pytest
from aiohttp import web

from rotator.config import GatewayConfig
from rotator.service import rewrite
from tests.contract.gateway.rig import RawClient, Rig, Script, chat, raw_client, rig_up, until

BRISK = GatewayConfig(keepalive_s=0.02)
COMMENT = b": frozen\n\n"


async def begin(rig: Rig, client: RawClient, model: str = "a", path: str = "/v1/chat/completions") -> Script:
    """A stream under way, its first event delivered."""
    script = rig.engines[model].answer = Script()
    await client.request("POST", path, json.dumps(chat(model, stream=True)).encode())
    script.say(b"data: 0\n\n")
    await client.until(b"data: 0\n\n\r\n")
    return script


def unchunked(wire: bytes) -> bytes:
    return b"".join(re.findall(rb"[0-9a-f]+\r\n(.*?)\r\n(?=[0-9a-f]+\r\n|$)", wire, re.DOTALL))


async def test_a_frozen_stream_gets_comments_and_goes_on_with_the_same_bytes() -> None:
    async with rig_up(config=BRISK) as rig, raw_client(rig) as client:
        script = await begin(rig, client)
        rig.traffic.close("a")
        rig.traffic.hold("a")
        for _ in range(3):
            assert (await client.until(COMMENT)).endswith(COMMENT)
        rig.traffic.release_hold("a")
        script.say(b"data: 1\n\n")
        rest = await client.until(b"data: 1\n\n\r\n")
        told = rb"[0-9a-f]+\r\n: rotator stalled_s=[0-9.]+ freezes=1\n\n\r\n9\r\ndata: 1\n\n\r\n"
        assert re.fullmatch(told, rest.replace(b"a\r\n" + COMMENT + b"\r\n", b"").lstrip(b"\r\n"))
        script.end()
        await client.until(b"0\r\n\r\n")
        await until(lambda: rig.ends == [("a", "ok")])


async def test_a_stream_tells_once_after_each_freeze_how_long_it_stood_still_in_all() -> None:
    async with rig_up() as rig, raw_client(rig) as client:
        script = await begin(rig, client)
        for number in (1, 2):
            rig.traffic.hold("a")
            rig.traffic.release_hold("a")
            script.say(b"data: one\n\n")
            heard = await client.until(b"data: one\n\n\r\n")
            script.say(b"data: two\n\n")
            heard += await client.until(b"data: two\n\n\r\n")
            assert re.findall(rb": rotator stalled_s=[0-9.]+ freezes=([0-9])", heard) == [b"%d" % number]


async def test_a_whole_answer_tells_in_its_head_how_long_it_stood_still() -> None:
    async with rig_up() as rig:
        release = asyncio.Event()

        async def slow(_: web.Request) -> web.Response:
            await release.wait()
            return web.json_response({"ok": True})

        rig.engines["a"].answer = slow
        asking = asyncio.create_task(rig.client.post(f"{rig.url}/v1/chat/completions", json=chat("a")))
        await until(lambda: rig.traffic.in_flight("a") == 1)
        rig.traffic.hold("a")
        release.set()
        rig.traffic.release_hold("a")
        response = await asking
        assert int(response.headers["x-rotator-stalled-ms"]) >= 0
        assert (await response.json()) == {"ok": True}


async def test_what_a_woken_engine_says_is_held_back_until_it_is_released() -> None:
    async with rig_up(config=BRISK) as rig, raw_client(rig) as client:
        script = await begin(rig, client)
        rig.traffic.hold("a")
        script.say(b"data: unchecked\n\n")
        held = b"".join([await client.until(COMMENT) for _ in range(5)])
        assert b"unchecked" not in held
        rig.traffic.release_hold("a")
        await client.until(b"data: unchecked\n\n")
        assert rig.traffic.in_flight("a") == 1


async def test_a_stream_that_ends_while_it_is_held_ends_only_when_released() -> None:
    async with rig_up(config=BRISK) as rig, raw_client(rig) as client:
        script = await begin(rig, client)
        rig.traffic.hold("a")
        script.end()
        held = b"".join([await client.until(COMMENT) for _ in range(3)])
        assert b"0\r\n\r\n" not in held
        rig.traffic.release_hold("a")
        await client.until(b"0\r\n\r\n")
        assert rig.traffic.freezes("a") == 1


async def test_comments_never_fall_into_the_middle_of_an_event() -> None:
    async with rig_up(config=BRISK) as rig, raw_client(rig) as client:
        script = await begin(rig, client)
        script.say(b'data: {"half":')
        rig.traffic.hold("a")
        held = await client.until(COMMENT) + await client.until(COMMENT)
        assert b"half" not in held
        rig.traffic.release_hold("a")
        script.say(b" 1}\n\n")
        await client.until(b'data: {"half": 1}\n\n')
        assert rig.traffic.in_flight("a") == 1


async def test_a_plain_answer_that_is_held_waits_silently_and_then_arrives_whole() -> None:
    release = asyncio.Event()

    async def slow(_: web.Request) -> web.StreamResponse:
        await release.wait()
        return web.json_response({"x": 1})

    async with rig_up(config=BRISK) as rig:
        rig.engines["a"].answer = slow
        asking = asyncio.create_task(rig.posted("/v1/completions", chat()))
        await until(lambda: rig.engines["a"].open == 1)
        rig.traffic.hold("a")
        release.set()
        await until(lambda: rig.engines["a"].open == 0)
        await asyncio.sleep(0.05)
        assert not asking.done()
        rig.traffic.release_hold("a")
        response, body = await asking
        assert (response.status, json.loads(body)) == (200, {"x": 1})


async def test_a_large_body_under_way_is_held_back_too() -> None:
    go_on = asyncio.Event()

    async def sound(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "audio/wav"})
        await response.prepare(request)
        await response.write(b"first")
        await go_on.wait()
        await response.write(b"second")
        await response.write_eof()
        return response

    async with rig_up(config=BRISK) as rig, raw_client(rig) as client:
        rig.engines["a"].answer = sound
        await client.request("POST", "/v1/audio/speech", b'{"model":"a"}')
        await client.until(b"first\r\n")
        rig.traffic.hold("a")
        go_on.set()
        await until(lambda: rig.engines["a"].open == 0)
        await asyncio.sleep(0.05)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.reader.read(1), 0.05)
        rig.traffic.release_hold("a")
        assert await client.until(b"0\r\n\r\n") == b"6\r\nsecond\r\n0\r\n\r\n"


async def test_an_event_too_large_to_wait_for_its_end_gets_no_comment_into_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewrite, "EVENT_BYTES_MAX", 10)
    async with rig_up(config=BRISK) as rig, raw_client(rig) as client:
        script = await begin(rig, client)
        script.say(b"data: a part of an event")
        await client.until(b"of an event\r\n")
        rig.traffic.hold("a")
        await asyncio.sleep(0.1)
        rig.traffic.release_hold("a")
        script.say(b" and its end\n\n")
        assert await client.until(b"\n\n\r\n") == b"e\r\n and its end\n\n\r\n"


async def test_a_client_of_a_frozen_stream_that_leaves_is_forgotten_at_once() -> None:
    async with rig_up() as rig, raw_client(rig) as client:
        await begin(rig, client)
        rig.traffic.hold("a")
        await asyncio.sleep(0.05)
        client.leave()
        await until(lambda: rig.traffic.in_flight("a") == 0)
        await until(lambda: rig.engines["a"].left == 1)
        assert rig.ends == [("a", "client_left")]
        assert rig.demands == ["a"]


async def test_five_freezes_leave_the_stream_byte_for_byte_as_it_would_have_been() -> None:
    async with rig_up(config=BRISK) as rig, raw_client(rig) as client:
        script = rig.engines["a"].answer = Script()
        await client.request("POST", "/v1/completions", json.dumps(chat(stream=True)).encode(), Connection="close")
        await asyncio.wait_for(script.begun.wait(), 5)
        for n in range(10):
            script.say(b"data: %d\n\n" % n)
            if n % 2:
                rig.traffic.hold("a")
                await asyncio.sleep(0.03)
                rig.traffic.release_hold("a")
        script.say(b"data: [DONE]\n\n")
        script.end()
        wire = await client.everything()
        said = re.sub(rb"(?m)^: [^\n]*\n\n", b"", unchunked(wire.split(b"\r\n\r\n", 1)[1]))  # comments are no events
        assert said == b"".join(b"data: %d\n\n" % n for n in range(10)) + b"data: [DONE]\n\n"


# -- broken engines --------------------------------------------------------------------------------------------------


async def test_an_engine_that_dies_in_a_stream_leaves_an_error_event_and_a_broken_connection() -> None:
    async with rig_up() as rig, raw_client(rig) as client:
        script = await begin(rig, client)
        script.die()
        rest = await client.everything()
        events = unchunked(rest)
        assert events.startswith(b"data: {")
        assert events.endswith(b"\n\n")
        assert json.loads(events[6:])["error"]["code"] == "engine_failed"
        assert not rest.endswith(b"0\r\n\r\n")
        assert b"[DONE]" not in rest
        assert rig.ends == [("a", "failed")]
        assert [e["engine"] for e in rig.events("engine.unreachable")] == ["a"]


async def test_an_engine_that_dies_inside_an_event_takes_that_event_with_it() -> None:
    async with rig_up() as rig, raw_client(rig) as client:
        script = await begin(rig, client)
        script.say(b'data: {"cut": "unfinished')
        await asyncio.sleep(0.05)
        script.die()
        rest = await client.everything()
        assert b"unfinished" not in rest
        assert json.loads(unchunked(rest)[6:])["error"]["code"] == "engine_failed"
        assert not rest.endswith(b"0\r\n\r\n")


@pytest.mark.parametrize(("path", "kind"), [("/v1/messages", "overloaded_error"), ("/v1/responses", "error")])
async def test_the_error_event_speaks_the_clients_dialect(path: str, kind: str) -> None:
    async with rig_up() as rig, raw_client(rig) as client:
        await begin(rig, client, path=path)
        rig.traffic.abort("a", "forced")
        said = unchunked(await client.everything())
        assert said.startswith(b"event: error\ndata: {")
        body = json.loads(said.split(b"data: ", 1)[1])
        assert body["type"] == "error"
        assert kind in (body["error"]["type"], body["type"])


async def test_a_standard_client_sees_a_broken_stream_as_an_error_not_as_an_end() -> None:
    import aiohttp

    async with rig_up() as rig:
        script = rig.engines["a"].answer = Script()
        async with rig.post("/v1/chat/completions", chat(stream=True)) as response:
            script.say(b"data: 0\n\n")
            assert await response.content.readany() == b"data: 0\n\n"
            script.die()
            with pytest.raises(aiohttp.ClientPayloadError):
                await response.content.read()


def half(length: int | None, body: bytes) -> "object":
    async def answer(request: web.Request) -> web.StreamResponse:
        headers = {"Content-Type": "application/octet-stream"}
        response = web.StreamResponse(headers=headers)
        if length is not None:
            response.content_length = length
        await response.prepare(request)
        await response.write(body)
        await asyncio.sleep(0.03)
        assert request.transport is not None
        request.transport.close()
        return response

    return answer


@pytest.mark.parametrize("length", [None, 8 << 20])
async def test_a_body_that_breaks_off_is_never_ended(length: int | None) -> None:
    async with rig_up() as rig, raw_client(rig) as client:
        rig.engines["a"].answer = half(length, b"z" * (3 << 20))  # type: ignore[assignment] # an answer
        await client.request("POST", "/v1/audio/speech", b'{"model":"a"}')
        wire = await client.everything()
        head, body = wire.split(b"\r\n\r\n", 1)
        assert b"200 OK" in head
        assert not body.endswith(b"0\r\n\r\n")
        assert 0 < len(body) < 4 << 20
        assert rig.ends == [("a", "failed")]


async def test_a_small_body_that_breaks_off_becomes_a_clean_error() -> None:
    async with rig_up() as rig:
        rig.engines["a"].answer = half(1000, b"z" * 500)  # type: ignore[assignment] # an answer
        response, body = await rig.posted("/v1/audio/speech", chat())
        assert response.status == 502
        assert json.loads(body)["error"]["code"] == "engine_failed"


# -- cuts ------------------------------------------------------------------------------------------------------------


async def test_an_operators_force_cuts_a_stream_with_the_reason_and_closes_the_way_to_the_engine() -> None:
    async with rig_up() as rig, raw_client(rig) as client:
        await begin(rig, client)
        rig.traffic.abort("a", "an operator forced a to sleep")
        rest = await client.everything()
        error = json.loads(unchunked(rest)[6:])["error"]
        assert error["code"] == "aborted"
        assert "an operator forced a to sleep" in error["message"]
        assert not rest.endswith(b"0\r\n\r\n")
        await until(lambda: rig.engines["a"].left == 1)
        assert rig.ends == [("a", "aborted")]
        await asyncio.wait_for(rig.traffic.drained("a"), 1)


async def test_a_frozen_stream_can_be_cut() -> None:
    async with rig_up() as rig, raw_client(rig) as client:
        script = await begin(rig, client)
        rig.traffic.hold("a")
        script.say(b"data: held\n\n")
        await asyncio.sleep(0.05)
        rig.traffic.abort("a", "a died")
        rest = await client.everything()
        assert b"held" not in rest
        assert b"a died" in rest
        assert not rest.endswith(b"0\r\n\r\n")


async def test_a_request_that_was_not_answered_yet_is_cut_with_a_clean_error() -> None:
    async def hang(_: web.Request) -> web.StreamResponse:
        await asyncio.Event().wait()
        raise AssertionError

    async with rig_up() as rig:
        rig.engines["a"].answer = hang
        asking = asyncio.create_task(rig.posted("/v1/completions", chat()))
        await until(lambda: rig.engines["a"].open == 1)
        rig.traffic.abort("a", "a died")
        response, body = await asking
        assert (response.status, json.loads(body)["error"]["code"]) == (503, "aborted")


# -- slow clients ----------------------------------------------------------------------------------------------------


async def test_a_client_that_does_not_read_stops_the_engine_instead_of_filling_memory() -> None:
    sent = 0

    async def flood(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        event = b"data: " + b"x" * 65_000 + b"\n\n"
        for _ in range(2000):
            await response.write(event)
            sent += len(event)
        await response.write_eof()
        return response

    async with rig_up() as rig:
        rig.engines["a"].answer = flood
        reader, writer = await asyncio.open_connection("127.0.0.1", rig.port, limit=1024)
        body = json.dumps(chat(stream=True)).encode()
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        await reader.readuntil(b"200 OK\r\n")
        before = -1
        while before != sent:
            before = sent
            await asyncio.sleep(0.1)
        assert sent < 40 << 20  # of 130 MB: what the kernel's socket buffers and our bounded ones hold
        assert rig.traffic.in_flight("a") == 1
        writer.transport.abort()
        await until(lambda: rig.traffic.in_flight("a") == 0)


async def test_a_cut_stream_whose_client_does_not_read_leaves_the_engine_at_once() -> None:
    async def flood(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        while True:
            await response.write(b"data: " + b"x" * 65_000 + b"\n\n")

    async with rig_up() as rig:
        rig.engines["a"].answer = flood
        reader, writer = await asyncio.open_connection("127.0.0.1", rig.port, limit=1024)
        body = json.dumps(chat(stream=True)).encode()
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        await reader.readuntil(b"200 OK\r\n")
        await asyncio.sleep(0.3)
        rig.traffic.abort("a", "forced")
        await asyncio.wait_for(rig.traffic.drained("a"), 1)
        assert rig.ends == [("a", "aborted")]
        writer.transport.abort()
