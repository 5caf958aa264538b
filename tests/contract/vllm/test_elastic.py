"""What an elastic allocator's plugin adds to an engine, as adapter and stub speak it: bytes lent, masters placed."""

import asyncio

import aiohttp
import pytest

from rotator.adapters.vllm import VllmControl
from rotator.ports import EngineRefused
from tests.contract.vllm.test_dialects import MODEL, PROBE, SOON_S, StartStub, eventually, stream_tokens

KV_BYTES = 1 << 16  # of the stub's plain memory, a rank


def posts(asked: list[tuple[str, str, bytes]]) -> list[tuple[str, bytes]]:
    return [(path, body) for method, path, body in asked if method == "POST"]


async def test_bytes_are_freed_under_a_paused_scheduler_and_brought_back_before_it_goes_on(
    stub: StartStub, control: VllmControl
) -> None:
    engine = await stub()
    before = await control.generate(engine.url, MODEL, PROBE, deadline_s=SOON_S)
    engine.asked.clear()
    await control.sleep_bytes(engine.url, bytes_per_gpu=1000, deadline_s=SOON_S)
    assert await control.is_sleeping(engine.url, deadline_s=SOON_S)
    assert all(rank.asleep() == {"kv_cache"} for rank in engine.ranks)
    await control.wake_bytes(engine.url, deadline_s=SOON_S)
    assert posts(engine.asked) == [
        ("/sleep?level=0&mode=keep", b""),
        ("/reset_prefix_cache?reset_running_requests=true", b""),
        ("/collective_rpc", b'{"method":"rotator_sleep_bytes","args":[1000]}'),
        ("/collective_rpc", b'{"method":"rotator_wake","args":[]}'),
        ("/wake_up?tags=scheduling", b""),
    ]
    assert not await control.is_sleeping(engine.url, deadline_s=SOON_S)
    assert await control.generate(engine.url, MODEL, PROBE, deadline_s=SOON_S) == before


async def test_one_that_sleeps_so_is_asked_for_more_without_another_pause(
    stub: StartStub, control: VllmControl
) -> None:
    engine = await stub()
    before = await control.generate(engine.url, MODEL, PROBE, deadline_s=SOON_S)
    await control.sleep_bytes(engine.url, bytes_per_gpu=1000, deadline_s=SOON_S)
    await control.sleep_bytes(engine.url, bytes_per_gpu=1000, deadline_s=SOON_S)
    assert [path for path in engine.asked_paths() if path.startswith("/sleep")] == ["/sleep?level=0&mode=keep"]
    assert all(rank.asleep() == {"weights", "kv_cache"} for rank in engine.ranks)
    await control.wake_bytes(engine.url, deadline_s=SOON_S)
    assert await control.generate(engine.url, MODEL, PROBE, deadline_s=SOON_S) == before


async def test_more_than_the_kv_cache_takes_weights_too(stub: StartStub, control: VllmControl) -> None:
    engine = await stub()
    await control.sleep_bytes(engine.url, bytes_per_gpu=KV_BYTES + 1, deadline_s=SOON_S)
    assert all(rank.asleep() == {"weights", "kv_cache"} for rank in engine.ranks)


@pytest.mark.parametrize("release", ["0.24.0", "0.33.0"])
async def test_streams_go_on_with_the_same_tokens_after_bytes_were_lent(
    release: str, stub: StartStub, control: VllmControl
) -> None:
    engine = await stub(release)
    undisturbed, _, _ = await stream_tokens(engine, "a long story", 120)
    frozen = asyncio.create_task(stream_tokens(engine, "a long story", 120))
    made = engine.core.counters.generation_tokens
    await eventually(lambda: engine.core.counters.generation_tokens > made + 20)
    await control.sleep_bytes(engine.url, bytes_per_gpu=1000, deadline_s=SOON_S)
    still = engine.core.counters.generation_tokens
    await control.wake_bytes(engine.url, deadline_s=SOON_S)
    assert still < made + 120
    assert await asyncio.wait_for(frozen, SOON_S) == (undisturbed, "length", True)


async def test_masters_are_placed_where_they_are_told_to(stub: StartStub, control: VllmControl) -> None:
    engine = await stub()
    for where in ("disk", "none", "host"):
        await control.place_masters(engine.url, where=where, deadline_s=SOON_S)
        assert engine.core.masters == where
    with pytest.raises(EngineRefused):
        await control.place_masters(engine.url, where="tape", deadline_s=SOON_S)


async def test_memory_is_not_freed_under_a_scheduler_that_runs(stub: StartStub) -> None:
    engine = await stub()
    body = {"method": "rotator_sleep_bytes", "args": [1000]}
    async with aiohttp.ClientSession() as session, session.post(f"{engine.url}/collective_rpc", json=body) as answer:
        assert answer.status >= 500
    assert not any(rank.asleep() for rank in engine.ranks)
