"""Spans from a client's request to its engine, as a collector receives them; a bad collector costs nothing."""

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from rotator.adapters import telemetry
from rotator.adapters.telemetry import OtelTracer, open_telemetry
from rotator.config_telemetry import TelemetryConfig
from rotator.service.events import Event
from rotator.service.tracing import Traces
from tests.contract.gateway.collector import Collector, collecting
from tests.contract.gateway.rig import chat, rig_up, until

SERVER, CLIENT = 2, 3
CLIENTS = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
UNSAMPLED = CLIENTS[:-2] + "00"
PLAN: Mapping[str, Any] = {"reason": "a is waited for", "evict": [{"engine": "b"}]}


def opened(collector: Collector, environ: Mapping[str, str] | None = None, **config: Any) -> OtelTracer:
    tracer = open_telemetry(TelemetryConfig(otlp_endpoint=collector.url, **config), environ or {})  # type: ignore[arg-type] # pydantic reads the text
    assert tracer is not None
    return tracer


def event(kind: str, at_wall_s: float, **data: Any) -> Event:
    return Event(1, at_wall_s, kind, "a", {"id": "s-1", **data})


async def test_a_request_is_told_with_its_wait_its_engine_and_the_swap_that_served_it() -> None:
    async with collecting() as collector:
        tracer = opened(collector, service_name="box-7")
        traces = Traces(tracer)
        async with rig_up(is_open=False, traces=traces) as rig:
            asking = asyncio.create_task(rig.posted("/v1/completions", chat("a"), headers={"traceparent": CLIENTS}))
            await until(lambda: rig.traffic.waiting("a") == 1)
            now_s = traces.now()
            traces.heard(event("swap.begun", now_s, plan=PLAN))
            rig.traffic.open("a")
            response, _ = await asking
            assert response.status == 200
            timeline = [{"phase": "wake", "engine": "a", "at_s": 0.5, "seconds": 2.0}]
            traces.heard(event("swap.ended", now_s + 3.0, error=None, timeline=timeline))
            sent = rig.engines["a"].seen[0].headers["traceparent"]
        await tracer.close()
    request, wait, engine = (collector.named(n) for n in ("POST /v1/completions", "wait", "engine"))
    swap, wake = collector.named("swap"), collector.named("wake")
    assert (request.trace, request.parent) == (CLIENTS[3:35], CLIENTS[36:52])
    assert {wait.trace, engine.trace} == {request.trace}
    assert wait.parent == engine.parent == request.id
    assert (request.kind, engine.kind) == (SERVER, CLIENT)
    assert sent == f"00-{engine.trace}-{engine.id}-01"
    assert wait.links == (swap.id,)
    assert request.begin_s <= wait.begin_s <= wait.end_s <= engine.begin_s + 0.001
    assert swap.trace != request.trace
    assert wake.parent == swap.id
    assert wake.end_s - wake.begin_s == pytest.approx(2.0, abs=0.001)
    assert swap.attributes["rotator.evicted"] == "b"
    assert request.attributes["http.response.status_code"] == 200
    assert request.attributes["rotator.request_id"] == response.headers["x-rotator-request-id"]
    assert collector.service == "box-7"


async def test_a_failed_request_and_a_failed_swap_are_told_as_errors() -> None:
    async with collecting() as collector:
        tracer = opened(collector)
        traces = Traces(tracer)
        traces.heard(event("swap.begun", 100.0, plan=PLAN))
        traces.heard(event("swap.ended", 103.0, error="its wake failed", timeline=[]))
        async with rig_up(traces=traces) as rig:
            await rig.engines["a"].stop()
            response, _ = await rig.posted("/v1/completions", chat("a"))
            assert response.status == 503
        await tracer.close()
    assert collector.named("swap").failed
    assert collector.named("POST /v1/completions").failed
    assert collector.named("engine").failed


async def test_a_wait_that_another_swap_served_long_ago_points_to_none() -> None:
    async with collecting() as collector:
        tracer = opened(collector)
        traces = Traces(tracer)
        traces.heard(event("swap.begun", 100.0, plan=PLAN))
        traces.heard(event("swap.ended", 103.0, error=None, timeline=[]))
        async with rig_up(is_open=False, traces=traces) as rig:
            asking = asyncio.create_task(rig.posted("/v1/completions", chat("a")))
            await until(lambda: rig.traffic.waiting("a") == 1)
            rig.traffic.open("a")
            await asking
        await tracer.close()
    assert collector.named("wait").links == ()


async def test_a_client_decides_whether_it_is_traced_and_the_rest_by_their_share() -> None:
    async with collecting() as collector:
        tracer = opened(collector, sample_ratio=0.0)
        traces = Traces(tracer)
        async with rig_up(traces=traces) as rig:
            for headers in ({}, {"traceparent": UNSAMPLED}, {"traceparent": CLIENTS}):
                await rig.posted("/v1/completions", chat("a"), headers=headers)
            passed = [seen.headers["traceparent"] for seen in rig.engines["a"].seen]
        traces.heard(event("swap.begun", 100.0, plan=PLAN))
        traces.heard(event("swap.ended", 103.0, error=None, timeline=[]))
        await tracer.close()
    assert [p[-2:] for p in passed] == ["00", "00", "01"]
    assert sorted(span.name for span in collector.spans) == ["POST /v1/completions", "engine", "swap"]


@pytest.mark.parametrize("bad", ["", "nonsense", "00-" + "0" * 32 + "-b7ad6b7169203331-01", "ff" + CLIENTS[2:]])
async def test_a_traceparent_that_is_none_begins_a_trace_of_our_own(bad: str) -> None:
    async with collecting() as collector:
        tracer = opened(collector)
        async with rig_up(traces=Traces(tracer)) as rig:
            response, _ = await rig.posted("/v1/completions", chat("a"), headers={"traceparent": bad} if bad else {})
            assert response.status == 200
        await tracer.close()
    assert collector.named("POST /v1/completions").parent == ""


async def test_without_traces_a_clients_traceparent_goes_on_as_it_came() -> None:
    async with rig_up() as rig:
        await rig.posted("/v1/completions", chat("a"), headers={"traceparent": CLIENTS, "tracestate": "x=1"})
        seen = rig.engines["a"].seen[0].headers
        assert (seen["traceparent"], seen["tracestate"]) == (CLIENTS, "x=1")


def test_without_an_endpoint_there_is_no_tracer() -> None:
    assert open_telemetry(TelemetryConfig(), {}) is None


async def test_headers_for_the_collector_come_from_the_environment() -> None:
    async with collecting() as collector:
        environ = {"OTLP_HEADERS": "authorization=Bearer s3cret,x-team=gpu"}
        tracer = opened(collector, environ, headers_env="OTLP_HEADERS")
        tracer.begin("swap").end()
        await tracer.close()
    assert collector.headers[0]["authorization"] == "Bearer s3cret"
    assert collector.headers[0]["x-team"] == "gpu"


async def test_a_collector_that_refuses_costs_no_request_anything_and_is_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with collecting() as collector:
        collector.status = 400
        tracer = opened(collector)
        async with rig_up(traces=Traces(tracer)) as rig:
            for _ in range(10):
                response, _ = await rig.posted("/v1/completions", chat("a"))
                assert response.status == 200
        await tracer.close()
    assert tracer.counts == {"exported": 0, "failed": 20, "dropped": 0}
    assert [r.message for r in caplog.records if "telemetry" in r.message] == [
        "telemetry: traces cannot be sent: they are dropped"
    ]


async def test_a_collector_that_hangs_holds_up_neither_requests_nor_the_end_of_the_service(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(telemetry, "CLOSE_S", 0.2)
    async with collecting() as collector:
        collector.hangs = True
        tracer = opened(collector)
        async with rig_up(traces=Traces(tracer)) as rig:
            response, _ = await rig.posted("/v1/completions", chat("a"))
            assert response.status == 200
        clock = asyncio.get_running_loop().time
        began_s = clock()
        await tracer.close()
        assert clock() - began_s < 1.0


async def test_spans_beyond_the_queue_are_dropped_and_counted() -> None:
    async with collecting() as collector:
        collector.hangs = True
        tracer = opened(collector)
        for _ in range(telemetry.QUEUE_MAX + 1000):
            tracer.begin("swap").end()
        counts = tracer.counts
        assert counts["exported"] == 0
        assert 0 < counts["dropped"] <= 1000
