"""What the gateway takes, what it refuses, and in which words."""

import asyncio
import json

import pytest

from rotator.config import GatewayConfig
from rotator.service.keys import Denial
from tests.contract.gateway.rig import chat, raw_client, rig_up

INFERENCE = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/embeddings",
    "/v1/rerank",
    "/v2/rerank",
    "/rerank",
    "/v1/score",
    "/score",
    "/tokenize",
    "/detokenize",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/audio/speech",
    "/v1/audio/transcriptions",
    "/v1/audio/translations",
    "/v1/images/generations",
    "/v1/images/edits",
]

FORBIDDEN = [
    ("POST", "/sleep"),
    ("POST", "/wake_up"),
    ("GET", "/is_sleeping"),
    ("POST", "/collective_rpc"),
    ("POST", "/reset_prefix_cache"),
    ("POST", "/release_kv_cache_memory"),
    ("POST", "/v1/load_lora_adapter"),
    ("POST", "/v1/unload_lora_adapter"),
    ("GET", "/metrics"),
    ("GET", "/server_info"),
    ("POST", "/start_profile"),
    ("POST", "/pooling"),
    ("POST", "/invocations"),
    ("GET", "/v1/chat/completions/abc"),
    ("POST", "/v1"),
    ("POST", "/v1/"),
]

TRICKS = [
    "//v1/load_lora_adapter",
    "/v1//load_lora_adapter",
    "/v1/chat/completions/",
    "/v1/chat/completions/../../load_lora_adapter",
    "/v1/chat/../load_lora_adapter",
    "/v1/./load_lora_adapter",
    "/v1/audio/../load_lora_adapter",
    "/v1/audio/..%2Fload_lora_adapter",
    "/v1/audio/%2e%2e/load_lora_adapter",
    "/v1/audio/%2e%2e%2fload_lora_adapter",
    "/v1/audio/..",
    "/v1/audio/%2e%2e",
    "/v1/images/x%2f..%2f..%2f..%2fsleep",
    "/v1/responses/..%2fload_lora_adapter",
    "/v1/responses/%2e%2e",
    "/v1/responses/x/../../load_lora_adapter",
    "/v1/responses/x%2fcancel/cancel",
    "/%76%31/load_lora_adapter",
    "/v1%2fload_lora_adapter",
    "/v1/load%5flora%5fadapter",
    "/v1/chat/completions;/../../../sleep",
    "/v1/chat/completions%00",
    "/v1/chat/completions%3f/sleep",
    "/V1/chat/completions",
    "\\v1\\sleep",
    "http://127.0.0.1/sleep",
    "http://127.0.0.1//v1/load_lora_adapter",
    "http://evil/v1/audio/../load_lora_adapter",
]


@pytest.mark.parametrize("path", INFERENCE)
async def test_each_listed_route_reaches_the_engine_on_the_same_path(path: str) -> None:
    async with rig_up() as rig:
        response, body = await rig.posted(path, {"model": "a", "input": "x"})
        assert response.status == 200
        assert [(s.method, s.path) for s in rig.engines["a"].seen] == [("POST", path)]
        assert json.loads(body) == {"model": "a", "input": "x"}


@pytest.mark.parametrize(("method", "path"), FORBIDDEN)
async def test_an_engines_other_endpoints_are_not_reachable(method: str, path: str) -> None:
    async with rig_up() as rig:
        async with rig.client.request(method, rig.url + path, json={"model": "a"}) as response:
            said = await response.json()
        assert response.status in (404, 405)
        assert said["error"]["code"] in ("unknown_url", "method_not_allowed")
        assert set(said["error"]) == {"message", "type", "param", "code"}
        assert rig.engines["a"].seen == []


@pytest.mark.parametrize("method", ["POST", "GET", "DELETE"])
@pytest.mark.parametrize("target", TRICKS)
async def test_no_spelling_of_a_path_reaches_an_engines_other_endpoints(target: str, method: str) -> None:
    async with rig_up() as rig, raw_client(rig) as client:
        await client.request(method, target, b'{"model":"a"}', Connection="close")
        status = await client.status()
        await client.everything()
        assert status in (400, 404, 405)
        assert [s.path for s in rig.engines["a"].seen + rig.engines["b"].seen] == []


async def test_an_absolute_form_target_is_the_path_in_it_and_stays_on_our_engine() -> None:
    async with rig_up() as rig, raw_client(rig) as client:
        await client.request("POST", "http://elsewhere.example/v1/completions", b'{"model":"a"}', Connection="close")
        assert await client.status() == 200
        assert [s.path for s in rig.engines["a"].seen] == ["/v1/completions"]


async def test_a_smuggled_second_request_in_the_body_stays_a_body() -> None:
    inner = b'{"model":"a","x":"\\r\\n\\r\\nPOST /sleep HTTP/1.1\\r\\n\\r\\n"}'
    async with rig_up() as rig:
        await rig.posted("/v1/completions", inner)
        assert [s.path for s in rig.engines["a"].seen] == ["/v1/completions"]


async def test_the_wrong_method_is_refused_with_the_right_one() -> None:
    async with rig_up() as rig, rig.client.get(rig.url + "/v1/chat/completions") as response:
        assert response.status == 405
        assert response.headers["allow"] == "POST"


async def test_an_unknown_model_is_404_and_close_names_are_told() -> None:
    async with rig_up(("qwen-small", "llama"), aliases={"qwen": "qwen-small"}) as rig:
        response, body = await rig.posted("/v1/chat/completions", chat("qwen-smal"))
        error = json.loads(body)["error"]
        assert response.status == 404
        assert (error["code"], error["param"], error["type"]) == ("model_not_found", "model", "invalid_request_error")
        assert "qwen-small" in error["message"]
        assert "llama" not in error["message"]


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"{", "invalid_json"),
        (b"", "invalid_json"),
        (b"[]", "invalid_json"),
        (b'{"messages":[]}', "missing_model"),
        (b'{"model":""}', "missing_model"),
        (b'{"model":null}', "missing_model"),
        (b'{"model":7}', "invalid_model"),
        (b'{"model":"' + b"x" * 300 + b'"}', "invalid_model"),
    ],
)
async def test_bad_bodies_are_400_with_a_reason(body: bytes, code: str) -> None:
    async with rig_up() as rig:
        response, said = await rig.posted("/v1/chat/completions", body)
        assert response.status == 400
        assert json.loads(said)["error"]["code"] == code
        assert rig.engines["a"].seen == []


async def test_errors_on_messages_have_anthropics_shape() -> None:
    async with rig_up() as rig:
        response, said = await rig.posted("/v1/messages", chat("nobody"))
        assert response.status == 404
        body = json.loads(said)
        assert body["type"] == "error"
        assert body["error"]["type"] == "not_found_error"


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_over_the_limit_is_413_whether_its_length_was_said_or_not(chunked: bool) -> None:
    async with rig_up(config=GatewayConfig(body_max_mib=0.01)) as rig, raw_client(rig) as client:
        big = b'{"model":"a","x":"' + b"y" * 20_000 + b'"}'
        if chunked:
            client.writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
            client.writer.write(b"%x\r\n" % len(big) + big + b"\r\n0\r\n\r\n")
        else:
            await client.request("POST", "/v1/completions", big)
        said = await client.everything()
        assert b" 413 " in said.split(b"\r\n", 1)[0]
        assert b'"body_too_large"' in said
        assert rig.engines["a"].seen == []


async def test_a_body_that_is_announced_too_large_is_refused_before_it_is_sent() -> None:
    async with rig_up(config=GatewayConfig(body_max_mib=0.01)) as rig, raw_client(rig) as client:
        client.writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999\r\n\r\n")
        assert await client.status() == 413


async def test_a_body_that_grows_over_the_limit_piece_by_piece_is_refused_before_its_end() -> None:
    async with rig_up(config=GatewayConfig(body_max_mib=0.01)) as rig, raw_client(rig) as client:
        client.writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(4):
            client.writer.write(b"1000\r\n" + b"y" * 4096 + b"\r\n")
            await asyncio.sleep(0.02)
        assert await client.status() == 413


async def test_a_large_body_under_the_limit_arrives_whole() -> None:
    async with rig_up() as rig:
        body = b'{"model":"a","x":"' + b"y" * 3_000_000 + b'"}'
        _, said = await rig.posted("/v1/completions", body)
        assert said == body
        assert rig.engines["a"].seen[0].body == body


async def test_models_lists_names_and_aliases_with_their_state() -> None:
    async with rig_up(aliases={"nick": "a"}, eta_s=4.0) as rig:
        rig.directory.states["a"] = "asleep"
        async with rig.client.get(rig.url + "/v1/models") as response:
            said = await response.json()
        assert said["object"] == "list"
        assert [m["id"] for m in said["data"]] == ["a", "nick", "b"]
        first = said["data"][1]
        assert first["object"] == "model"
        assert isinstance(first["created"], int)
        assert first["rotator"] == {"engine": "a", "state": "asleep", "eta_s": 4.0}


@pytest.mark.parametrize("spelling", ["org/model", "org%2Fmodel"])
async def test_one_model_is_found_by_its_id_slashes_and_all(spelling: str) -> None:
    async with rig_up(aliases={"org/model": "a"}) as rig, raw_client(rig) as client:
        await client.request("GET", f"/v1/models/{spelling}", Connection="close")
        said = await client.everything()
        assert b"200 OK" in said
        assert json.loads(said.split(b"\r\n\r\n", 1)[1])["id"] == "org/model"


async def test_an_unknown_model_id_is_404() -> None:
    async with rig_up() as rig, rig.client.get(rig.url + "/v1/models/nobody") as response:
        assert response.status == 404
        assert (await response.json())["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("value", ["0", "-3", "soon", "nan", "inf"])
async def test_a_deadline_that_is_no_time_is_400(value: str) -> None:
    async with rig_up() as rig:
        response, said = await rig.posted("/v1/completions", chat(), headers={"x-rotator-deadline-s": value})
        assert response.status == 400
        assert b"invalid_header" in said


async def test_without_a_key_nothing_is_answered_and_with_one_it_is() -> None:
    def authorize(headers: object, scope: str) -> Denial | None:
        assert isinstance(headers, dict)
        assert scope == "infer"
        return None if headers.get("authorization") == "Bearer k" else Denial("who are you?", 401)

    async with rig_up(authorize=authorize) as rig:
        response, said = await rig.posted("/v1/completions", chat())
        assert response.status == 401
        assert json.loads(said)["error"] == {
            "message": "who are you?",
            "type": "authentication_error",
            "param": None,
            "code": "invalid_api_key",
        }
        response, _ = await rig.posted("/v1/completions", chat(), headers={"Authorization": "Bearer k"})
        assert response.status == 200
        assert "Authorization" not in rig.engines["a"].seen[0].headers


async def test_a_request_that_a_foreign_page_caused_is_refused() -> None:
    def guard(method: str, headers: object) -> Denial | None:
        return Denial(f"no {method} from there", 403)

    async with rig_up(guard=guard) as rig:
        response, said = await rig.posted("/v1/completions", chat())
        assert response.status == 403
        assert b"no POST from there" in said
