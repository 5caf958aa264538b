"""What the service tells of itself while real processes take turns: metrics, traces, its log."""

import json
from pathlib import Path
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from tests.contract.gateway.collector import collecting
from tests.system.service.rig import Rig, engine, eventually, rig_up


def read(text: str, name: str, **labels: str) -> float | None:
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == name and labels.items() <= sample.labels.items():
                return sample.value
    return None


async def text_of(rig: Rig, path: str) -> str:
    async with aiohttp.ClientSession() as session, session.get(rig.url + path) as answer:
        assert answer.status == 200
        return await answer.text()


async def test_a_turn_shows_in_metrics_traces_and_log(tmp_path: Path) -> None:
    async with collecting() as collector:
        settings: dict[str, Any] = {
            "telemetry": {"otlp_endpoint": collector.url, "service_name": "trial"},
            "log": {"format": "json"},
        }
        async with rig_up(tmp_path, [engine("a"), engine("b")], **settings) as rig:
            for model in ("a", "b"):
                assert (await rig.chat(model, tokens=8).end()).text
            await rig.say("a")
            own = await text_of(rig, "/metrics")
            assert read(own, "rotator_requests_total", model="a", outcome="ok") == 2
            assert read(own, "rotator_engine_wakes_total", engine="a") == 1
            assert (read(own, "rotator_completion_tokens_total", model="b") or 0) >= 7
            assert read(own, "rotator_time_to_first_token_seconds_count", model="b") == 1
            assert (read(own, "rotator_swap_phase_seconds_sum", phase="wake") or 0) > 0
            assert (read(own, "process_resident_memory_bytes") or 0) > 0
            engines = await text_of(rig, "/metrics/engines")
            assert (read(engines, "vllm:generation_tokens_total", model="a") or 0) > 0
            assert (
                read(engines, "vllm:generation_tokens_total", model="b") is None
            )  # asleep since before the first look
            assert await rig.state("b") == "asleep"
            await rig.terminate()
            log = [json.loads(line) for line in rig.log().splitlines() if line.startswith("{")]
        await eventually(lambda: any(span.name == "swap" for span in collector.spans))
    assert log
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in log)
    by_id = {span.id: span for span in collector.spans}
    waits = [span for span in collector.spans if span.name == "wait"]
    assert len(waits) == 3
    assert all(by_id[wait.links[0]].name == "swap" for wait in waits)
    phases = {span.name for span in collector.spans if by_id.get(span.parent) and by_id[span.parent].name == "swap"}
    assert {"start", "drain", "sleep", "verify", "wake", "canary"} <= phases
    assert collector.service == "trial"
