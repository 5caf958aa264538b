"""Bytes through, unchanged; and changed exactly where an alias or an override says so."""

import gzip
import json
from typing import Any

import pytest
from aiohttp import web

from rotator.config import OverridesConfig
from tests.contract.gateway.rig import Answer, Script, chat, raw_client, rig_up

ODD_JSON = b'{ "model" : "a",\t"x": 1.0e+2 , "y":"\\u00e9", "model2":null}\n'


def answering(body: bytes, kind: str = "application/json", status: int = 200, **headers: str) -> Answer:
    async def answer(_: web.Request) -> web.StreamResponse:
        return web.Response(body=body, status=status, headers={"Content-Type": kind, **headers})

    return answer


def streaming(*pieces: bytes) -> Answer:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        for piece in pieces:
            await response.write(piece)
        await response.write_eof()
        return response

    return answer


async def test_request_and_answer_bytes_pass_unchanged() -> None:
    async with rig_up() as rig:
        rig.engines["a"].answer = answering(ODD_JSON)
        response, said = await rig.posted("/v1/completions", ODD_JSON)
        assert rig.engines["a"].seen[0].body == ODD_JSON
        assert said == ODD_JSON
        assert response.headers["Content-Length"] == str(len(ODD_JSON))


async def test_the_query_passes_except_for_our_own_parameters() -> None:
    async with rig_up() as rig:
        await rig.posted("/v1/completions?x=1&y=%20z", chat())
        await rig.posted("/v1/completions?x=1&x-rotator-notices=none", chat())
        assert [s.path for s in rig.engines["a"].seen] == ["/v1/completions?x=1&y=%20z", "/v1/completions?x=1"]


async def test_end_to_end_headers_pass_and_hop_by_hop_ones_do_not() -> None:
    async with rig_up() as rig, raw_client(rig) as client:
        await client.request(
            "POST",
            "/v1/completions",
            b'{"model":"a"}',
            X_Trace="t1",
            User_Agent="me/1",
            Connection="close, X-Secret",
            X_Secret="s",
            Keep_Alive="timeout=5",
            Authorization="Bearer ours",
            X_Api_Key="ours",
            X_Rotator_Deadline_S="5",
            Content_Type="application/json",
        )
        await client.everything()
        headers = {name.lower(): value for name, value in rig.engines["a"].seen[0].headers.items()}
        assert headers["x-trace"] == "t1"
        assert headers["user-agent"] == "me/1"
        assert not {"x-secret", "keep-alive", "authorization", "x-api-key", "x-rotator-deadline-s"} & set(headers)


async def test_the_engines_status_and_headers_pass_with_ours_added() -> None:
    async with rig_up() as rig:
        rig.engines["a"].answer = answering(
            b'{"error":{}}', status=422, **{"X-Engine": "v", "X-Rotator-Engine": "liar"}
        )
        response, said = await rig.posted("/v1/completions", chat())
        assert (response.status, said) == (422, b'{"error":{}}')
        assert response.headers["X-Engine"] == "v"
        assert response.headers.getall("x-rotator-engine") == ["a"]
        assert response.headers["x-rotator-waited-ms"] == "0"
        assert response.headers["x-rotator-request-id"]
        assert len(response.headers.getall("date")) == 1
        assert rig.ends == [("a", "ok")]


async def test_an_engines_own_server_error_counts_as_failed_and_passes() -> None:
    async with rig_up() as rig:
        rig.engines["a"].answer = answering(b"oops", "text/plain", 500)
        response, said = await rig.posted("/v1/completions", chat())
        assert (response.status, said) == (500, b"oops")
        assert rig.ends == [("a", "failed")]


async def test_a_compressed_answer_passes_as_it_is() -> None:
    packed = gzip.compress(b'{"model":"a"}')
    async with rig_up() as rig:
        rig.engines["a"].answer = answering(packed, **{"Content-Encoding": "gzip"})
        response, said = await rig.posted("/v1/completions", chat(), headers={"Accept-Encoding": "gzip"})
        assert said == packed
        assert response.headers["Content-Encoding"] == "gzip"
        assert rig.engines["a"].seen[0].headers["Accept-Encoding"] == "gzip"


async def test_a_large_binary_answer_passes_whole() -> None:
    audio = bytes(range(256)) * 20_000
    async with rig_up() as rig:
        rig.engines["a"].answer = answering(audio, "audio/wav")
        _, said = await rig.posted("/v1/audio/speech", chat())
        assert said == audio


async def test_a_redirect_is_not_followed() -> None:
    async with rig_up() as rig:
        rig.engines["a"].answer = answering(b"", status=307, Location="/sleep")
        response, _ = await rig.posted("/v1/completions", chat(), allow_redirects=False)
        assert response.status == 307
        assert len(rig.engines["a"].seen) == 1


async def test_events_pass_unchanged_however_they_were_cut_into_pieces() -> None:
    events = b'data: {"model":"a","x":"\xc3\xa9"}\n\nevent: ping\r\ndata: 1\r\n\r\n: note\n\ndata: [DONE]\n\n'
    async with rig_up() as rig:
        rig.engines["a"].answer = streaming(*[events[i : i + 1] for i in range(len(events))])
        _, said = await rig.posted("/v1/chat/completions", chat(stream=True))
        assert said == events


async def test_a_stream_that_ends_inside_an_event_passes_to_its_last_byte() -> None:
    async with rig_up() as rig:
        rig.engines["a"].answer = streaming(b"data: 1\n\nda", b"ta: 2")
        _, said = await rig.posted("/v1/chat/completions", chat(stream=True))
        assert said == b"data: 1\n\ndata: 2"


async def test_each_event_reaches_the_client_when_the_engine_says_it() -> None:
    async with rig_up() as rig, raw_client(rig) as client:
        script = rig.engines["a"].answer = Script()
        await client.request("POST", "/v1/chat/completions", json.dumps(chat(stream=True)).encode())
        for n in range(3):
            script.say(b"data: %d\n\n" % n)
            assert (await client.until(b"data: %d\n\n" % n)).endswith(b"data: %d\n\n" % n)
        script.end()
        await client.until(b"0\r\n\r\n")


# -- aliases ---------------------------------------------------------------------------------------------------------


async def test_an_alias_becomes_the_engines_name_and_back_again() -> None:
    async with rig_up(aliases={"nick": "a"}, served={"a": "org/real"}) as rig:
        rig.engines["a"].answer = answering(b'{"id":"1","model":"org/real","choices":[{"text":"org/real"}]}')
        _, said = await rig.posted("/v1/completions", {"model": "nick", "prompt": "nick"})
        assert rig.engines["a"].seen[0].json == {"model": "org/real", "prompt": "nick"}
        assert json.loads(said) == {"id": "1", "model": "nick", "choices": [{"text": "org/real"}]}


async def test_an_engine_under_another_served_name_answers_under_its_own() -> None:
    async with rig_up(served={"a": "org/real"}) as rig:
        rig.engines["a"].answer = answering(b'{"model":"org/real"}')
        response, said = await rig.posted("/v1/completions", chat())
        assert json.loads(said) == {"model": "a"}
        assert response.headers["Content-Length"] == str(len(said))


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
async def test_names_in_events_are_turned_back_wherever_the_pieces_end(size: int) -> None:
    events = (
        b'data: {"model":"org/real","choices":[{"delta":{"content":"\\"model\\":\\"org/real\\""}}]}\n\n'
        b'event: response.created\ndata: {"response":{"id":"r","model":"org/real"}}\n\n'
        b'event: message_start\r\ndata: {"message":{"model":"org/real"}}\r\n\r\n'
        b"data: [DONE]\n\n"
    )
    async with rig_up(aliases={"nick": "a"}, served={"a": "org/real"}) as rig:
        rig.engines["a"].answer = streaming(*[events[i : i + size] for i in range(0, len(events), size)])
        _, said = await rig.posted("/v1/chat/completions", chat("nick", stream=True))
    assert said.startswith(b'data: {"model":"nick",')
    assert b'data: {"response":{"id":"r","model":"nick"}}\n\n' in said
    assert b'event: message_start\r\ndata: {"message":{"model":"nick"}}\r\n\r\n' in said
    assert said.endswith(b"data: [DONE]\n\n")
    content = json.loads(said.split(b"\n")[0][6:])["choices"][0]["delta"]["content"]
    assert content == '"model":"org/real"'


async def test_an_aliased_request_asks_for_an_answer_that_can_be_read() -> None:
    async with rig_up(aliases={"nick": "a"}) as rig:
        await rig.posted("/v1/completions", chat("nick"), headers={"Accept-Encoding": "gzip, br"})
        assert "gzip" not in rig.engines["a"].seen[0].headers.get("Accept-Encoding", "")


async def test_a_chunked_json_answer_is_renamed_too() -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        await response.write(b'{"mod')
        await response.write(b'el":"a"}')
        await response.write_eof()
        return response

    async with rig_up(aliases={"nick": "a"}) as rig:
        rig.engines["a"].answer = answer
        _, said = await rig.posted("/v1/completions", chat("nick"))
        assert json.loads(said) == {"model": "nick"}


# -- overrides -------------------------------------------------------------------------------------------------------


async def test_overrides_fill_in_set_and_remove() -> None:
    overrides = OverridesConfig(
        defaults={"temperature": 0.5, "top_k": 1}, set={"seed": 7, "user": "x"}, remove=("logit_bias", "user")
    )
    async with rig_up(overrides={"a": overrides}) as rig:
        await rig.posted("/v1/completions", {"model": "a", "temperature": 1, "seed": 1, "logit_bias": {"1": 2}})
        assert rig.engines["a"].seen[0].json == {"model": "a", "temperature": 1, "top_k": 1, "seed": 7}


async def test_overrides_leave_the_answer_alone() -> None:
    async with rig_up(overrides={"a": OverridesConfig(set={"seed": 7})}) as rig:
        rig.engines["a"].answer = answering(ODD_JSON)
        _, said = await rig.posted("/v1/completions", chat())
        assert said == ODD_JSON


# -- multipart -------------------------------------------------------------------------------------------------------

NASTY = bytes(range(256)) + b'\r\n--XX\r\r\n--X\r\n-\r\nname="model"\r\n\r\n'


def form(model: str, boundary: str = "XXboundaryXX", *, first: bool = False) -> bytes:
    file = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="model"\r\n'
        "Content-Type: audio/wav\r\n\r\n"
    ).encode() + (NASTY + b"\r\n")
    field = f'--{boundary}\r\nContent-Disposition: form-data; name="model"\r\n\r\n{model}\r\n'.encode()
    return (field + file if first else file + field) + f"--{boundary}--\r\n".encode()


@pytest.mark.parametrize("first", [True, False])
async def test_a_multipart_body_is_kept_whole(first: bool) -> None:
    body = form("a", first=first)
    kind = {"Content-Type": "multipart/form-data; boundary=XXboundaryXX"}
    async with rig_up() as rig:
        await rig.posted("/v1/audio/transcriptions", body, headers=kind)
        assert rig.engines["a"].seen[0].body == body
        assert rig.engines["a"].seen[0].headers["Content-Type"] == kind["Content-Type"]


@pytest.mark.parametrize("first", [True, False])
async def test_an_alias_in_a_multipart_body_is_all_that_changes(first: bool) -> None:
    kind = {"Content-Type": 'multipart/form-data; boundary="XXboundaryXX"'}
    async with rig_up(aliases={"nick": "a"}, served={"a": "org/a-long-name"}) as rig:
        await rig.posted("/v1/audio/transcriptions", form("nick", first=first), headers=kind)
        assert rig.engines["a"].seen[0].body == form("org/a-long-name", first=first)


@pytest.mark.parametrize(
    ("body", "kind", "code"),
    [
        (form("a"), "multipart/form-data", "invalid_multipart"),
        (b"nonsense", "multipart/form-data; boundary=b", "invalid_multipart"),
        (form("", "b"), "multipart/form-data; boundary=b", "missing_model"),
        (b"--b--\r\n", "multipart/form-data; boundary=b", "missing_model"),
    ],
)
async def test_a_bad_multipart_body_is_400(body: bytes, kind: str, code: str) -> None:
    async with rig_up() as rig:
        response, said = await rig.posted("/v1/audio/transcriptions", body, headers={"Content-Type": kind})
        assert response.status == 400
        assert json.loads(said)["error"]["code"] == code


# -- learned answers -------------------------------------------------------------------------------------------------


def store(**kept: dict[str, Any]) -> Answer:
    async def answer(request: web.Request) -> web.StreamResponse:
        if request.method == "POST" and request.path == "/v1/responses":
            return web.json_response({"id": "resp_new", "model": "org/real"})
        ident = request.path.split("/")[3]
        if ident not in kept:
            return web.json_response({"error": {"message": "no such response"}}, status=404)
        return web.json_response({**kept[ident], "asked": f"{request.method} {request.path_qs}"})

    return answer


async def test_a_stored_answer_is_asked_of_the_engine_that_gave_it() -> None:
    async with rig_up(("a", "b"), aliases={"nick": "b"}, served={"b": "org/real"}) as rig:
        rig.engines["a"].answer = store()
        rig.engines["b"].answer = store(resp_new={"model": "org/real"})
        _, said = await rig.posted("/v1/responses", {"model": "nick", "input": "x"})
        assert json.loads(said)["id"] == "resp_new"
        async with rig.client.get(rig.url + "/v1/responses/resp_new?include=x") as response:
            got = await response.json()
        assert got == {"model": "nick", "asked": "GET /v1/responses/resp_new?include=x"}
        assert response.headers["x-rotator-engine"] == "b"
        assert rig.engines["a"].seen == []


async def test_the_id_of_a_streamed_answer_is_learned_too() -> None:
    async with rig_up() as rig:
        rig.engines["b"].answer = streaming(
            b'event: response.created\ndata: {"response":{"id":"resp_s"}}\n\n', b"data: x\n\n"
        )
        await rig.posted("/v1/responses", {"model": "b", "stream": True})
        rig.engines["b"].answer = store(resp_s={})
        async with rig.client.get(rig.url + "/v1/responses/resp_s") as response:
            assert response.status == 200
        assert rig.engines["a"].seen == []


async def test_an_answer_never_seen_is_searched_on_all_running_engines_without_waking_any() -> None:
    async with rig_up(("a", "b", "c"), is_open=False) as rig:
        rig.directory.states |= {"a": "asleep", "b": "asleep", "c": "stopped"}
        rig.engines["a"].answer = store()
        rig.engines["b"].answer = store(old={"model": "b"})
        async with rig.client.delete(rig.url + "/v1/responses/old") as response:
            said = await response.json()
        assert said["asked"] == "DELETE /v1/responses/old"
        async with rig.client.post(rig.url + "/v1/responses/old/cancel") as response:
            assert (await response.json())["asked"] == "POST /v1/responses/old/cancel"
        assert rig.demands == []
        assert rig.engines["c"].seen == []
        assert [s.method for s in rig.engines["b"].seen] == ["GET", "DELETE", "POST"]


async def test_an_answer_that_no_engine_has_is_404() -> None:
    async with rig_up() as rig:
        rig.engines["a"].answer = rig.engines["b"].answer = store()
        async with rig.client.get(rig.url + "/v1/responses/lost") as response:
            assert response.status == 404
            assert (await response.json())["error"]["code"] == "response_not_found"


async def test_an_answer_is_not_called_lost_while_an_engine_could_not_be_asked() -> None:
    async with rig_up() as rig:
        rig.engines["a"].answer = store()
        await rig.engines["b"].stop()
        async with rig.client.get(rig.url + "/v1/responses/maybe") as response:
            assert response.status == 503
            assert "Retry-After" in response.headers
