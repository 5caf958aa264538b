"""Requests for engines that are not awake: they wait, know how long, and leave when their client does."""

import asyncio
import json
from dataclasses import replace

import pytest

from rotator.config import GatewayConfig
from rotator.service.traffic import Limits
from tests.contract.gateway.rig import FakeEngine, Rig, chat, raw_client, rig_up, until


def asking(rig: Rig, model: str = "a", **headers: str) -> "asyncio.Task[tuple[int, dict[str, str], bytes]]":
    async def ask() -> tuple[int, dict[str, str], bytes]:
        response, body = await rig.posted("/v1/completions", chat(model), headers=headers)
        return response.status, {k.lower(): v for k, v in response.headers.items()}, body

    return asyncio.create_task(ask())


async def test_a_request_waits_for_its_engine_and_is_told_how_long() -> None:
    async with rig_up(is_open=False, eta_s=7.5) as rig:
        client = asking(rig)
        await until(lambda: rig.traffic.waiting("a") == 1)
        assert rig.demands == ["a"]
        row = rig.traffic.entries()[0]
        await asyncio.sleep(0.02)
        rig.traffic.open("a")
        status, headers, _ = await client
        assert status == 200
        assert headers["x-rotator-eta-s"] == "7.5"
        assert int(headers["x-rotator-waited-ms"]) >= 15
        assert headers["x-rotator-request-id"] == row.id


async def test_many_wait_for_one_engine_and_all_are_served_once() -> None:
    async with rig_up(is_open=False) as rig:
        clients = [asking(rig) for _ in range(20)]
        await until(lambda: rig.traffic.waiting("a") == 20)
        rig.traffic.open("a")
        assert [status for status, _, _ in await asyncio.gather(*clients)] == [200] * 20
        assert len(rig.engines["a"].seen) == 20


async def test_nothing_is_sent_to_an_engine_before_its_gate_opens() -> None:
    async with rig_up(is_open=False) as rig:
        client = asking(rig)
        await until(lambda: rig.traffic.waiting("a") == 1)
        assert rig.engines["a"].seen == []
        rig.traffic.open("a")
        await client
        assert len(rig.engines["a"].seen) == 1


async def test_a_request_goes_to_the_address_that_the_engine_has_when_it_is_admitted() -> None:
    async with rig_up(("a",), is_open=False) as rig:
        client = asking(rig)
        await until(lambda: rig.traffic.waiting("a") == 1)
        moved = FakeEngine()
        await moved.start()
        rig.directory.names["a"] = replace(rig.directory.names["a"], url=moved.url)
        rig.traffic.open("a")
        assert (await client)[0] == 200
        assert (len(rig.engines["a"].seen), len(moved.seen)) == (0, 1)
        await moved.stop()


async def test_a_client_that_leaves_while_it_waits_is_forgotten_at_once() -> None:
    async with rig_up(is_open=False) as rig:
        async with raw_client(rig) as client:
            await client.request("POST", "/v1/completions", b'{"model":"a"}')
            await until(lambda: rig.traffic.waiting("a") == 1)
            client.leave()
            await until(lambda: rig.traffic.waiting("a") == 0)
        assert rig.demands == ["a", "a"]
        assert rig.ends == [("a", "client_left")]
        rig.traffic.open("a")
        assert rig.traffic.in_flight("a") == 0
        assert rig.engines["a"].seen == []


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_in_flight_closes_the_way_to_the_engine(stream: bool) -> None:
    hung = asyncio.Event()

    async def hang(_: object) -> None:
        await hung.wait()

    async with rig_up() as rig:
        rig.engines["a"].answer = hang  # type: ignore[assignment] # it never answers
        async with raw_client(rig) as client:
            await client.request("POST", "/v1/chat/completions", json.dumps(chat(stream=stream)).encode())
            await until(lambda: rig.engines["a"].open == 1)
            client.leave()
            await until(lambda: rig.engines["a"].left == 1)
        await until(lambda: rig.traffic.in_flight("a") == 0)
        assert rig.ends == [("a", "client_left")]


async def test_a_client_that_leaves_while_it_sends_leaves_nothing_behind() -> None:
    async with rig_up() as rig, raw_client(rig) as client:
        client.writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        await client.writer.drain()
        client.leave()
        response, _ = await rig.posted("/v1/completions", chat())
        assert response.status == 200
        assert len(rig.engines["a"].seen) == 1


async def test_a_wait_ends_at_the_clients_deadline_with_503_and_the_eta() -> None:
    async with rig_up(is_open=False, eta_s=41.2) as rig:
        status, headers, body = await asking(rig, **{"x-rotator-deadline-s": "0.02"})
        assert status == 503
        assert json.loads(body)["error"]["code"] == "wait_expired"
        assert headers["retry-after"] == "42"
        assert headers["x-rotator-eta-s"] == "41.2"
        assert headers["x-rotator-request-id"]


async def test_a_clients_deadline_cannot_exceed_the_configured_one() -> None:
    async with rig_up(is_open=False, config=GatewayConfig(wait_deadline_s=0.02)) as rig:
        status, _, body = await asking(rig, **{"x-rotator-deadline-s": "3600"})
        assert (status, json.loads(body)["error"]["code"]) == (503, "wait_expired")


async def test_a_full_queue_is_429_with_a_retry_after_from_the_eta() -> None:
    async with rig_up(is_open=False, eta_s=12.3, config=GatewayConfig(queue_max=1)) as rig:
        first = asking(rig)
        await until(lambda: rig.traffic.waiting("a") == 1)
        status, headers, body = await asking(rig)
        assert status == 429
        assert headers["retry-after"] == "13"
        assert json.loads(body)["error"]["type"] == "rate_limit_error"
        assert json.loads(body)["error"]["code"] == "queue_full"
        rig.traffic.open("a")
        assert (await first)[0] == 200


async def test_a_failing_engine_is_503_with_its_reason_and_when_to_come_back() -> None:
    async with rig_up(is_open=False) as rig:
        waiting = asking(rig)
        await until(lambda: rig.traffic.waiting("a") == 1)
        rig.traffic.fail("a", "a is failing: rank 2 ran out of memory", 30.0)
        for status, headers, body in (await waiting, await asking(rig)):
            error = json.loads(body)["error"]
            assert status == 503
            assert (error["code"], error["message"]) == (
                "engine_unavailable",
                "a is failing: rank 2 ran out of memory",
            )
            assert headers["retry-after"] == "30"


async def test_while_the_service_goes_down_work_in_flight_finishes_and_the_rest_is_503() -> None:
    release = asyncio.Event()
    async with rig_up() as rig:
        echo = rig.engines["a"].answer

        async def slow(request: object) -> object:
            await release.wait()
            return await echo(request)  # type: ignore[arg-type] # passed on as it came

        rig.engines["a"].answer = slow  # type: ignore[assignment] # as above
        in_flight = asking(rig)
        await until(lambda: rig.engines["a"].open == 1)
        rig.traffic.shut()
        status, _, body = await asking(rig, "b")
        assert (status, json.loads(body)["error"]["message"]) == (503, "shutting down")
        release.set()
        assert (await in_flight)[0] == 200


async def test_an_engine_that_is_not_there_is_503_and_the_loop_hears_of_it() -> None:
    async with rig_up(("a",)) as rig:
        await rig.engines["a"].stop()
        status, headers, body = await asking(rig)
        error = json.loads(body)["error"]
        assert (status, error["code"]) == (503, "engine_unavailable")
        assert "cannot be reached" in error["message"]
        assert "retry-after" in headers
        assert [e["engine"] for e in rig.events("engine.unreachable")] == ["a"]
        assert rig.traffic.in_flight("a") == 0
        assert rig.ends == [("a", "failed")]


async def test_a_burst_at_a_dead_engine_alarms_the_loop_once() -> None:
    async with rig_up(("a",)) as rig:
        await rig.engines["a"].stop()
        answers = await asyncio.gather(*(asking(rig) for _ in range(10)))
        assert {status for status, _, _ in answers} == {503}
        assert len(rig.events("engine.unreachable")) == 1


@pytest.mark.parametrize("method", ["POST", "GET", "DELETE"])
async def test_a_request_that_may_have_reached_the_engine_is_never_sent_again(method: str) -> None:
    async with rig_up(("a",)) as rig:
        rig.gateway._stored.learn("resp_1", rig.directory.names["a"])
        await rig.posted("/v1/completions", chat())  # so that there is a kept connection to send on

        async def drop(request: object) -> object:
            request.transport.abort()  # type: ignore[attr-defined] # an aiohttp request
            raise ConnectionResetError

        rig.engines["a"].answer = drop  # type: ignore[assignment] # it never answers
        path = "/v1/completions" if method == "POST" else "/v1/responses/resp_1"
        async with rig.client.request(method, rig.url + path, json=chat() if method == "POST" else None) as response:
            said = await response.json()
        assert response.status == 502
        assert said["error"]["code"] == "engine_failed"
        assert [s.method for s in rig.engines["a"].seen] == ["POST", method]


async def test_the_metrics_count_requests_waits_and_who_waits_now() -> None:
    async with rig_up(is_open=False) as rig:
        rig.metrics.watch(rig.traffic)
        client = asking(rig)
        await until(lambda: rig.traffic.waiting("a") == 1)
        read = rig.metrics.registry.get_sample_value
        assert read("rotator_queue_requests", {"engine": "a"}) == 1
        rig.traffic.open("a")
        await client
        await until(lambda: read("rotator_requests_total", {"model": "a", "outcome": "ok"}) == 1)
        assert read("rotator_queue_requests", {"engine": "a"}) == 0
        assert read("rotator_wait_seconds_count", {"model": "a"}) == 1
        assert read("rotator_freezes_total", {"engine": "a"}) == 0


async def test_waiting_requests_count_for_their_client_by_its_key() -> None:
    """One client's crowd weighs no more for the model's turn than its share; others beside it count."""
    async with rig_up(is_open=False, identify=lambda headers: headers.get("authorization", "")) as rig:
        rig.traffic.configure({"a": Limits(100, 60.0, 8, client_waiters_max=2)})
        bodies = [asyncio.create_task(rig.client.post(f"{rig.url}/v1/chat/completions", json=chat("a"), headers=who))
                  for who in [{"Authorization": "one"}] * 5 + [{"Authorization": "two"}]]  # fmt: skip
        await until(lambda: rig.traffic.waiting("a") == 6)
        assert rig.traffic.weight("a") == 3.0
        rig.traffic.open("a")
        assert [(await body).status for body in bodies] == [200] * 6
        assert rig.traffic.weight("a") == 0.0
