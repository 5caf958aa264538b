"""Fallbacks: one hop, and header, events and metrics say so."""

import asyncio
import json

import pytest

from rotator.config import FallbackConfig, GatewayConfig
from tests.contract.gateway.rig import FakeEngine, Script, chat, rig_up, until

TO_B = {"a": FallbackConfig(model="b")}


async def test_another_model_answers_for_one_that_fails_and_everybody_is_told() -> None:
    async with rig_up(fallbacks=TO_B) as rig:
        rig.traffic.fail("a", "a is failing")
        response, body = await rig.posted("/v1/completions", chat("a"))
        assert response.status == 200
        assert response.headers["x-rotator-fallback"] == "b"
        assert response.headers["x-rotator-engine"] == "b"
        assert rig.engines["b"].seen[0].json["model"] == "b"
        assert json.loads(body)["model"] == "a"
        assert rig.events("gateway.fallback") == [{"engine": "a", "model": "a", "to": "b", "reason": "a is failing"}]
        assert rig.metrics.registry.get_sample_value("rotator_fallbacks_total", {"model": "a", "to": "b"}) == 1
        assert rig.ends == [("a", "refused"), ("b", "ok")]


async def test_an_answer_of_the_model_itself_carries_no_fallback() -> None:
    async with rig_up(fallbacks=TO_B) as rig:
        response, _ = await rig.posted("/v1/completions", chat("a"))
        assert "x-rotator-fallback" not in response.headers
        assert rig.engines["b"].seen == []
        assert rig.events("gateway.fallback") == []


async def test_a_full_queue_and_a_dead_engine_fall_back_too() -> None:
    async with rig_up(fallbacks=TO_B, config=GatewayConfig(queue_max=1)) as rig:
        await rig.engines["a"].stop()
        response, _ = await rig.posted("/v1/completions", chat("a"))
        assert response.headers["x-rotator-fallback"] == "b"
        rig.traffic.close("a")
        waiting = asyncio.create_task(rig.posted("/v1/completions", chat("a")))
        await until(lambda: rig.traffic.waiting("a") == 1)
        response, _ = await rig.posted("/v1/completions", chat("a"))
        assert response.headers["x-rotator-fallback"] == "b"
        waiting.cancel()


async def test_an_expired_wait_falls_back_only_to_what_is_awake() -> None:
    async with rig_up(fallbacks=TO_B) as rig:
        rig.traffic.close("a")
        headers = {"x-rotator-deadline-s": "0.02"}
        response, _ = await rig.posted("/v1/completions", chat("a"), headers=headers)
        assert (response.status, response.headers["x-rotator-fallback"]) == (200, "b")
        rig.traffic.close("b")
        response, body = await rig.posted("/v1/completions", chat("a"), headers=headers)
        assert response.status == 503
        error = json.loads(body)["error"]
        assert error["code"] == "wait_expired"
        assert "its fallback b cannot be had either" in error["message"]
        assert "b" not in rig.demands


async def test_a_fallback_that_sleeps_is_woken_within_the_clients_deadline() -> None:
    async with rig_up(fallbacks=TO_B) as rig:
        rig.traffic.fail("a", "a is failing")
        rig.traffic.close("b")
        asking = asyncio.create_task(rig.posted("/v1/completions", chat("a")))
        await until(lambda: rig.traffic.waiting("b") == 1)
        rig.traffic.open("b")
        response, _ = await asking
        assert (response.status, response.headers["x-rotator-fallback"]) == (200, "b")


async def test_two_fallbacks_in_a_circle_are_one_hop() -> None:
    circle = {**TO_B, "b": FallbackConfig(model="a")}
    async with rig_up(fallbacks=circle) as rig:
        rig.traffic.fail("a", "a is failing", 9.0)
        rig.traffic.fail("b", "b is failing", 5.0)
        response, body = await rig.posted("/v1/completions", chat("a"))
        assert response.status == 503
        assert response.headers["Retry-After"] == "9"
        assert "a is failing" in json.loads(body)["error"]["message"]
        assert len(rig.events("gateway.fallback")) == 1


async def test_a_request_whose_bytes_reached_the_engine_does_not_fall_back() -> None:
    async def die(request: object) -> object:
        request.transport.abort()  # type: ignore[attr-defined] # an aiohttp request
        raise ConnectionResetError

    async with rig_up(fallbacks=TO_B) as rig:
        rig.engines["a"].answer = die  # type: ignore[assignment] # it never answers
        response, _ = await rig.posted("/v1/completions", chat("a"))
        assert response.status == 502
        assert rig.engines["b"].seen == []


@pytest.mark.parametrize("stream", [True, False])
async def test_an_outside_endpoint_gets_its_own_key_and_name_and_none_of_the_clients_secrets(stream: bool) -> None:
    outside = FakeEngine()
    await outside.start()
    if stream:
        script = outside.answer = Script()
        script.say(b'data: {"model":"big"}\n\n')
        script.end()
    config = FallbackConfig(url=outside.url, upstream_model="big", api_key_env="OUT_KEY")
    async with rig_up(fallbacks={"a": config}, environ={"OUT_KEY": "sesame"}) as rig:
        rig.traffic.fail("a", "a is failing")
        headers = {"Authorization": "Bearer ours", "Cookie": "c=1", "X-Internal": "i"}
        response, body = await rig.posted("/v1/completions", chat("a", stream=stream), headers=headers)
        assert response.status == 200
        assert response.headers["x-rotator-fallback"] == "127.0.0.1"
        (seen,) = outside.seen
        assert seen.path == "/v1/completions"
        assert seen.json["model"] == "big"
        assert seen.headers["Authorization"] == "Bearer sesame"
        assert not {"Cookie", "X-Internal"} & set(seen.headers)
        assert json.loads(body.removeprefix(b"data: "))["model"] == "a"
    await outside.stop()


async def test_an_outside_endpoint_that_is_down_or_has_no_key_leaves_the_first_refusal() -> None:
    down = FallbackConfig(url="http://127.0.0.1:9")
    keyless = FallbackConfig(url="http://127.0.0.1:9", api_key_env="NOWHERE")
    async with rig_up(fallbacks={"a": down, "b": keyless}) as rig:
        rig.traffic.fail("a", "a is failing")
        rig.traffic.fail("b", "b is failing")
        for model, why in (("a", "no connection"), ("b", "NOWHERE is not set")):
            response, body = await rig.posted("/v1/completions", chat(model))
            assert response.status == 503
            message = json.loads(body)["error"]["message"]
            assert message.startswith(f"{model} is failing; its fallback 127.0.0.1 cannot be had either")
            assert why in message
