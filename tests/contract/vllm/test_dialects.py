"""Adapter and stub, written apart, agree on every release's dialect."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import pytest

from rotator.adapters.vllm import VllmControl
from rotator.adapters.vllm_dialect import Mode, dialect_of, parse_release
from rotator.core.values import Level
from rotator.ports import EngineRefused, Probe
from tests.contract.vllm.stub import MODEL, Stub

RELEASES = ("0.19.1", "0.24.0", "0.26.0", "0.31.0", "0.32.0", "0.33.0")
STAGED = tuple(release for release in RELEASES if release != "0.19.1")
SOON_S = 5.0
PROBE = Probe(prompt="The capital of France is", max_tokens=8)

StartStub = Callable[..., Awaitable[Stub]]


async def eventually(condition: Callable[[], bool], within_s: float = SOON_S) -> None:
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110 - what is awaited has no event
            await asyncio.sleep(0.002)


async def stream_tokens(stub: Stub, prompt: str, count: int) -> tuple[list[str], str | None, bool]:
    """Texts, finish reason and whether [DONE] came, of one streamed greedy completion."""
    import json

    body = {"model": MODEL, "prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True, "stream": True}
    pieces: list[str] = []
    reason, done = None, False
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{stub.url}/v1/completions", json=body) as response,
    ):
        async for line in response.content:
            if line.strip() == b"data: [DONE]":
                done = True
            elif line.startswith(b'data: {"error"'):
                reason = "error"
            elif line.startswith(b"data: "):
                choice = json.loads(line[6:])["choices"][0]
                reason = choice["finish_reason"] or reason
                pieces += [choice["text"]] if choice["text"] else []
    return pieces, reason, done


@pytest.mark.parametrize("release", RELEASES)
async def test_a_sleep_and_a_wake_at_level_1_bring_back_the_same_answers(
    release: str, stub: StartStub, control: VllmControl
) -> None:
    engine = await stub(release)
    before = await control.generate(engine.url, MODEL, PROBE, deadline_s=SOON_S)
    await control.sleep(engine.url, level=Level.HOST, abort=False, deadline_s=SOON_S)
    assert await control.is_sleeping(engine.url, deadline_s=SOON_S)
    assert all(rank.asleep() == {"weights", "kv_cache"} for rank in engine.ranks)
    await control.wake(engine.url, level=Level.HOST, deadline_s=SOON_S)
    assert not await control.is_sleeping(engine.url, deadline_s=SOON_S)
    assert await control.generate(engine.url, MODEL, PROBE, deadline_s=SOON_S) == before


@pytest.mark.parametrize("release", RELEASES)
async def test_a_wake_from_level_2_reloads_the_weights(release: str, stub: StartStub, control: VllmControl) -> None:
    engine = await stub(release)
    before = await control.generate(engine.url, MODEL, PROBE, deadline_s=SOON_S)
    await control.sleep(engine.url, level=Level.DISCARD, abort=False, deadline_s=SOON_S)
    await control.wake(engine.url, level=Level.DISCARD, deadline_s=SOON_S)
    assert not await control.is_sleeping(engine.url, deadline_s=SOON_S)
    assert await control.generate(engine.url, MODEL, PROBE, deadline_s=SOON_S) == before


@pytest.mark.parametrize("release", RELEASES)
async def test_a_pause_is_resumed_without_touching_memory(release: str, stub: StartStub, control: VllmControl) -> None:
    engine = await stub(release)
    await control.sleep(engine.url, level=Level.PAUSE, abort=False, deadline_s=SOON_S)
    assert await control.is_sleeping(engine.url, deadline_s=SOON_S)
    assert not any(rank.asleep() for rank in engine.ranks)
    await control.resume(engine.url, deadline_s=SOON_S)
    assert not await control.is_sleeping(engine.url, deadline_s=SOON_S)


@pytest.mark.parametrize("release", RELEASES)
async def test_level_and_mode_travel_in_the_query_string_and_never_in_a_body(
    release: str, stub: StartStub, control: VllmControl
) -> None:
    engine = await stub(release)
    await control.sleep(engine.url, level=Level.HOST, abort=False, deadline_s=SOON_S)
    assert ("POST", "/sleep?level=1&mode=keep", b"") in engine.asked
    await control.wake(engine.url, level=Level.HOST, deadline_s=SOON_S)
    assert ("POST", "/wake_up", b"") in engine.asked
    await control.sleep(engine.url, level=Level.HOST, abort=True, deadline_s=SOON_S)
    assert "/sleep?level=1&mode=abort" in engine.asked_paths()


@pytest.mark.parametrize("release", STAGED)
async def test_from_0_24_weights_are_loaded_and_caches_reset_before_anything_resumes(
    release: str, stub: StartStub, control: VllmControl
) -> None:
    engine = await stub(release)
    await control.sleep(engine.url, level=Level.DISCARD, abort=False, deadline_s=SOON_S)
    engine.asked.clear()
    await control.wake(engine.url, level=Level.DISCARD, deadline_s=SOON_S)
    posts = [(path, body) for method, path, body in engine.asked if method == "POST"]
    assert posts == [
        ("/wake_up?tags=weights", b""),
        ("/collective_rpc", b'{"method":"reload_weights"}'),
        ("/reset_prefix_cache", b""),
        ("/wake_up?tags=kv_cache", b""),
    ]


async def test_before_0_24_a_wake_from_level_2_is_whole_because_a_partial_one_resumes(
    stub: StartStub, control: VllmControl
) -> None:
    engine = await stub("0.19.1")
    await control.sleep(engine.url, level=Level.DISCARD, abort=False, deadline_s=SOON_S)
    assert "/sleep?level=2&mode=wait" in engine.asked_paths()
    engine.asked.clear()
    await control.wake(engine.url, level=Level.DISCARD, deadline_s=SOON_S)
    posts = [path for method, path, _ in engine.asked if method == "POST"]
    assert posts == ["/wake_up", "/collective_rpc", "/reset_prefix_cache"]


@pytest.mark.parametrize("release", RELEASES)
async def test_streams_frozen_at_level_1_go_on_after_the_wake_with_the_same_tokens(
    release: str, stub: StartStub, control: VllmControl
) -> None:
    engine = await stub(release)
    undisturbed, _, _ = await stream_tokens(engine, "a long story", 120)
    frozen = asyncio.create_task(stream_tokens(engine, "a long story", 120))
    made = engine.core.counters.generation_tokens
    await eventually(lambda: engine.core.counters.generation_tokens > made + 20)
    await control.sleep(engine.url, level=Level.HOST, abort=False, deadline_s=SOON_S)
    still = engine.core.counters.generation_tokens
    assert not frozen.done()
    await control.wake(engine.url, level=Level.HOST, deadline_s=SOON_S)
    assert still < made + 120
    assert await asyncio.wait_for(frozen, SOON_S) == (undisturbed, "length", True)


@pytest.mark.parametrize("release", STAGED)
async def test_from_0_24_streams_survive_level_2_too(release: str, stub: StartStub, control: VllmControl) -> None:
    engine = await stub(release)
    undisturbed, _, _ = await stream_tokens(engine, "a long story", 100)
    frozen = asyncio.create_task(stream_tokens(engine, "a long story", 100))
    made = engine.core.counters.generation_tokens
    await eventually(lambda: engine.core.counters.generation_tokens > made + 20)
    await control.sleep(engine.url, level=Level.DISCARD, abort=False, deadline_s=SOON_S)
    assert not frozen.done()
    await control.wake(engine.url, level=Level.DISCARD, deadline_s=SOON_S)
    assert await asyncio.wait_for(frozen, SOON_S) == (undisturbed, "length", True)
    assert not engine.deaths


async def test_before_0_24_level_2_lets_streams_finish_since_they_would_not_survive_it(
    stub: StartStub, control: VllmControl
) -> None:
    engine = await stub("0.23.0")
    stream = asyncio.create_task(stream_tokens(engine, "a story", 100))
    await eventually(lambda: engine.core.counters.generation_tokens > 10)
    await control.sleep(engine.url, level=Level.DISCARD, abort=False, deadline_s=SOON_S)
    pieces, reason, done = await asyncio.wait_for(stream, SOON_S)
    assert (len(pieces), reason, done) == (100, "length", True)


async def test_an_abort_cuts_streams_and_ends_them_with_a_normal_done(stub: StartStub, control: VllmControl) -> None:
    engine = await stub("0.26.0")
    stream = asyncio.create_task(stream_tokens(engine, "a story", 1000))
    await eventually(lambda: engine.core.counters.generation_tokens > 10)
    await control.sleep(engine.url, level=Level.HOST, abort=True, deadline_s=SOON_S)
    pieces, reason, done = await asyncio.wait_for(stream, SOON_S)
    assert len(pieces) < 1000
    assert (reason, done) == ("abort", True)


async def test_a_request_that_arrives_while_asleep_waits_and_is_answered_after_the_wake(
    stub: StartStub, control: VllmControl
) -> None:
    engine = await stub("0.26.0")
    await control.sleep(engine.url, level=Level.HOST, abort=False, deadline_s=SOON_S)
    waiting = asyncio.create_task(control.generate(engine.url, MODEL, PROBE, deadline_s=SOON_S))
    await eventually(lambda: engine.core.waiting == 1)
    assert not waiting.done()
    await control.wake(engine.url, level=Level.HOST, deadline_s=SOON_S)
    assert len((await waiting).token_ids) == PROBE.max_tokens


async def test_a_partial_wake_before_0_24_with_a_frozen_stream_kills_the_stub_as_it_does_vllm(
    stub: StartStub, control: VllmControl
) -> None:
    engine = await stub("0.23.0")
    stream = asyncio.create_task(stream_tokens(engine, "a story", 1000))
    await eventually(lambda: engine.core.counters.generation_tokens > 10)
    await control.sleep(engine.url, level=Level.HOST, abort=False, deadline_s=SOON_S)
    async with aiohttp.ClientSession() as session:
        await session.post(f"{engine.url}/wake_up?tags=weights")
    await eventually(lambda: engine.deaths == [1])
    assert not await control.is_healthy(engine.url, deadline_s=SOON_S)
    _, reason, _ = await asyncio.wait_for(stream, SOON_S)
    assert reason == "error"


@pytest.mark.parametrize("release", RELEASES)
async def test_bodies_and_argument_checks_are_those_of_the_release(release: str, stub: StartStub) -> None:
    engine = await stub(release)
    spoken = parse_release(release)
    assert spoken is not None
    new = spoken >= (0, 32, 0)
    async with aiohttp.ClientSession() as session:

        async def post(path: str, **more: Any) -> tuple[int, str]:
            async with session.post(engine.url + path, **more) as response:
                return response.status, await response.text()

        assert (await post("/sleep?level=7&mode=keep"))[0] == (400 if new else 500)
        ignored_body = await post("/sleep", json={"level": 2})
        assert ignored_body == (200, '{"status": "sleeping", "level": 1}' if new else "")
        unknown_tag = await post("/wake_up?tags=weight")
        assert unknown_tag == (200, '{"status": "sleeping", "tags": ["weight"]}' if new else "")
        partial = await post("/wake_up?tags=weights")
        assert partial == (200, '{"status": "sleeping", "tags": ["weights"]}' if new else "")
        assert (await post("/wake_up"))[0] == 200


@pytest.mark.parametrize("release", ["0.26.1.dev3+g12abcde", "0.25.1+sm120", "v0.26.0rc1"])
async def test_builds_and_forks_are_spoken_to_as_the_release_they_come_from(
    release: str, stub: StartStub, control: VllmControl
) -> None:
    engine = await stub(release)
    assert await control.version(engine.url, deadline_s=SOON_S) == release
    assert await control.can_freeze(engine.url, (Level.HOST,), deadline_s=SOON_S)


@pytest.mark.parametrize("release", RELEASES)
async def test_every_known_release_can_freeze(release: str, stub: StartStub, control: VllmControl) -> None:
    engine = await stub(release)
    assert await control.can_freeze(engine.url, (Level.HOST,), deadline_s=SOON_S)


@pytest.mark.parametrize(("release", "keeps"), [("0.23.0", False), ("0.24.0", True)])
async def test_a_release_whose_partial_wake_resumes_cannot_freeze_over_level_2(
    release: str, keeps: bool, stub: StartStub, control: VllmControl
) -> None:
    engine = await stub(release)
    levels = (Level.HOST, Level.DISCARD)
    assert await control.can_freeze(engine.url, levels, deadline_s=SOON_S) is keeps


async def test_a_release_without_mode_keep_cannot_freeze(stub: StartStub, control: VllmControl) -> None:
    engine = await stub("0.16.0")
    assert not await control.can_freeze(engine.url, (Level.HOST,), deadline_s=SOON_S)


async def test_a_version_that_tells_nothing_is_spoken_to_with_care(stub: StartStub, control: VllmControl) -> None:
    engine = await stub("nightly")
    assert not await control.can_freeze(engine.url, (Level.HOST,), deadline_s=SOON_S)
    await control.sleep(engine.url, level=Level.DISCARD, abort=False, deadline_s=SOON_S)
    await control.wake(engine.url, level=Level.DISCARD, deadline_s=SOON_S)
    assert not await control.is_sleeping(engine.url, deadline_s=SOON_S)


@pytest.mark.parametrize(
    ("version", "release"),
    [
        ("0.26.0", (0, 26, 0)),
        ("0.26.1.dev3+g12abcde", (0, 26, 1)),
        ("v0.30", (0, 30, 0)),
        ("1.2.3", (1, 2, 3)),
        ("0.1.dev1+gdeadbee", None),
        ("dev", None),
        ("", None),
    ],
)
def test_versions_are_read_for_their_release(version: str, release: tuple[int, int, int] | None) -> None:
    assert parse_release(version) == release


def test_versions_out_of_the_known_range_carry_a_note() -> None:
    assert "older than 0.19" in dialect_of("0.18.0").note
    assert "newer than 0.33" in dialect_of("0.40.0").note
    assert "tells no release" in dialect_of("dev").note
    assert dialect_of("0.33.4").note == ""


def test_abort_is_only_ever_an_operators_force() -> None:
    for release in RELEASES:
        for level in Level:
            assert dialect_of(release).sleep_mode(level, abort=False) is not Mode.ABORT
            assert dialect_of(release).sleep_mode(level, abort=True) is Mode.ABORT


async def test_served_models_are_listed_and_an_unknown_one_is_refused(stub: StartStub, control: VllmControl) -> None:
    engine = await stub("0.26.0")
    assert await control.served_models(engine.url, deadline_s=SOON_S) == (MODEL,)
    with pytest.raises(EngineRefused, match="`other` does not exist"):
        await control.generate(engine.url, "other", PROBE, deadline_s=SOON_S)
