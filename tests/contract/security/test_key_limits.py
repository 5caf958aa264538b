"""What a key may have of the models: its own list, its requests at one time and a minute, its places in line."""

import json
from typing import Any

import pytest

from rotator.config import ConfigError, FallbackConfig, KeyConfig, parse
from rotator.service.keys import digest
from tests.contract.gateway.rig import Rig, Script, until
from tests.contract.security.front import front, key

OF = {"authorization": "Bearer secret-one"}


def chat(model: str = "a", **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": [], **more}


def one(**limits: Any) -> KeyConfig:
    return key("one", digest("secret-one"), **limits)


async def ask(rig: Rig, model: str = "a") -> tuple[int, dict[str, Any], Any]:
    response, body = await rig.posted("/v1/chat/completions", chat(model), headers=OF)
    return response.status, json.loads(body), response.headers


async def listed(rig: Rig) -> list[str]:
    async with rig.client.get(f"{rig.url}/v1/models", headers=OF) as answer:
        return sorted(row["id"] for row in (await answer.json())["data"])


async def test_a_key_with_models_sees_and_asks_for_these_alone():
    aliases = {"fast": "a", "smart": "b", "wise": "b"}
    async with front(keys=[one(models=["a", "wise"])], aliases=aliases) as door:
        assert await listed(door.rig) == ["a", "fast", "wise"]
        assert [(await ask(door.rig, m))[0] for m in ("a", "fast", "wise", "b", "smart")] == [200, 200, 200, 404, 404]
        status, said, _ = await ask(door.rig, "smar")
        assert status == 404
        assert "smart" not in said["error"]["message"]
        async with door.rig.client.get(f"{door.rig.url}/v1/models/b", headers=OF) as answer:
            assert answer.status == 404
        async with door.rig.client.ws_connect(f"{door.rig.url}/v1/realtime", headers=OF) as socket:
            assert (await socket.receive_json())["type"] == "session.created"
            await socket.send_json({"type": "session.update", "model": "b"})
            assert (await socket.receive_json())["error"]["code"] == "model_not_found"


async def test_a_key_with_models_is_not_led_to_another_by_a_fallback():
    fallbacks = {"a": FallbackConfig(model="b")}
    for models, status in ((["a"], 503), (["a", "b"], 200)):
        async with front(keys=[one(models=models)], fallbacks=fallbacks) as door:
            door.rig.traffic.fail("a", "it broke")
            assert (await ask(door.rig))[0] == status


async def test_a_stored_answer_of_a_model_that_is_not_the_keys_is_none():
    async with front(keys=[one(models=["b"])]) as door:
        async with door.rig.client.get(f"{door.rig.url}/v1/responses/resp_1", headers=OF) as answer:
            assert answer.status == 200
        assert door.rig.engines["a"].seen == []


async def test_a_key_with_models_reads_nothing_of_the_operators():
    async with front(keys=[one(models=["a"])]) as door:
        said = await door.say(b"GET /engines HTTP/1.1\r\nhost: 127.0.0.1\r\nx-api-key: secret-one\r\n\r\n")
        assert said.startswith(b"HTTP/1.1 403")
        assert b"glm" not in said


async def test_more_requests_at_one_time_than_a_key_may_have_are_told_to_come_again():
    script = Script()
    async with front(keys=[one(in_flight_max=1)]) as door:
        door.rig.engines["a"].answer = script
        async with door.rig.post("/v1/chat/completions", chat(stream=True), headers=OF):
            await script.begun.wait()
            status, said, headers = await ask(door.rig, "b")
            assert (status, said["error"]["code"]) == (429, "too_many_in_flight")
            assert int(headers["retry-after"]) >= 1
            script.end()
        await until(lambda: door.rig.traffic.in_flight("a") == 0)
        assert (await ask(door.rig, "b"))[0] == 200


async def test_more_requests_a_minute_than_a_key_may_have_are_told_when_the_next_may_come():
    async with front(keys=[one(requests_per_minute=2)]) as door:
        assert [(await ask(door.rig))[0] for _ in range(2)] == [200, 200]
        status, said, headers = await ask(door.rig)
        assert (status, said["error"]["code"]) == (429, "rate_limit_exceeded")
        assert 55 <= int(headers["retry-after"]) <= 60
        assert len(await listed(door.rig)) == 2


async def test_more_waiting_requests_than_a_key_may_have_are_refused_and_go_to_no_fallback():
    fallbacks = {"b": FallbackConfig(model="a")}
    async with front(keys=[one()], is_open=False, fallbacks=fallbacks) as door:
        rig = door.rig
        rig.traffic.waiting_max = {"one": 1}
        async with rig.post("/v1/chat/completions", chat(stream=True), headers={**OF, "x-rotator-notices": "comments"}):
            await until(lambda: rig.traffic.waiting("a") == 1)
            status, said, headers = await ask(rig, "b")
            assert (status, said["error"]["code"]) == (429, "queue_full")
            assert headers["retry-after"] == "5"
            rig.traffic.open("a")
        await until(lambda: not rig.traffic._waiting_by)


@pytest.mark.parametrize(
    ("extra", "words"),
    [({"models": ["glm"]}, "no engine or alias"), ({"models": ["a"], "scopes": ["operate"]}, "scope infer alone")],
)
def test_a_key_with_models_that_cannot_be_is_told_at_once(tmp_path: Any, extra: dict[str, Any], words: str):
    fleet = {
        "engines": [{"name": "a", "gpus": [0], "command": ["true"]}],
        "keys": [{"name": "k", "sha256": "0" * 64, **extra}],
    }
    with pytest.raises(ConfigError, match=words):
        parse(json.dumps(fleet), base=tmp_path)
