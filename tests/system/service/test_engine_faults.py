"""Engines that lie, answer garbage, fail on one rank, hang or die where it hurts."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from tests.system.service.rig import Rig, engine, eventually, rig_up

pytestmark = pytest.mark.asyncio(loop_scope="module")
DEADLINES = {"sleep_deadline_s": 2, "wake_deadline_s": 2}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Rig]:
    engines = [engine(name, gpus=[0, 1], **DEADLINES) for name in ("a", "b")]
    settings = {"canary": {"deadline_s": 2}}
    async with rig_up(tmp_path_factory.mktemp("faults"), engines, gpus=2, **settings) as rig:
        await rig.say("b")
        yield rig


@pytest_asyncio.fixture(loop_scope="module")
async def rig(shared: Rig) -> AsyncIterator[Rig]:
    """``a`` is awake and ``b`` asleep, both have woken since they last failed."""
    for name in ("b", "a", "b", "a"):
        await shared.say(name)
    await shared.settled()
    yield shared
    await shared.check()


async def quarantined(rig: Rig, name: str, old: set[int], *words: str) -> None:
    """Killed and kept out, with the evidence in the journal; whoever asks is told why; a release brings it back."""
    await rig.until_state(name, "quarantined")
    assert not rig.engine_processes(name)
    view = await rig.view(name)
    refused = await rig.chat(name).end()
    assert refused.status == 503
    rows = (await rig.get(f"/ledger?table=transitions&engine={name}&result=failed&limit=5"))["rows"]
    for word in words:
        assert word in view["reason"]
        assert refused.error
        assert word in refused.error
        assert any(word in (row["error"] or "") for row in rows), rows
    await rig.post(f"/engines/{name}/release")
    assert await rig.say(name)
    assert not rig.engine_processes(name) & old


async def test_one_that_lies_about_sleeping_is_quarantined_with_the_evidence(rig: Rig) -> None:
    old = rig.engine_processes("a")
    await rig.misbehave("a", lie_sleep=True)
    assert await rig.say("b"), "the other one gets the room of the liar that was killed"
    await quarantined(rig, "a", old, "said it sleeps", "still holds 12.")


async def test_one_whose_residue_grows_beyond_the_tolerance_is_quarantined(rig: Rig) -> None:
    old = rig.engine_processes("a")
    await rig.misbehave("a", residue_growth_gib=3)
    assert await rig.say("b")
    await quarantined(rig, "a", old, "said it sleeps", "still holds")


@pytest.mark.parametrize("kind", ["zero", "corrupt"])
async def test_one_that_wakes_to_garbage_is_quarantined_and_no_client_sees_any_of_it(rig: Rig, kind: str) -> None:
    undisturbed = await rig.say("a", "story", 600)
    old = rig.engine_processes("a")
    await rig.misbehave("a", wake_garbage=kind)
    frozen = await rig.chat("a", "story", 600).begun()
    assert await rig.say("b")  # freezes it
    fresh = rig.chat("a", "story", 600)
    for chat in (frozen, fresh):
        answer = await chat.end()
        assert not answer.claims_to_be_complete, answer
        assert undisturbed.startswith(answer.text)
    assert fresh.answer.status == 503
    assert frozen.answer.text
    await quarantined(rig, "a", old, "canary failed")


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"fail_sleep_rank": 1}, "Worker_TP1"),
        ({"hang_sleep": True}, "sleep"),
        ({"die_at": "sleep", "exit_code": 9}, "sleep"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
async def test_a_sleep_that_fails_ends_in_a_kill_and_a_relaunch(rig: Rig, how: dict[str, Any], words: str) -> None:
    mark, old = rig.events.now(), rig.engine_processes("a")
    await rig.misbehave("a", **how)
    assert await rig.say("b"), "the other one is served all the same"
    failed = await rig.events.wait("engine.failed", "a", mark)
    assert words in failed["data"]["reason"]
    assert await rig.say("a")
    assert not rig.engine_processes("a") & old


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"fail_wake_rank": 1}, "Worker_TP1"),
        ({"hang_wake": True}, "wake failed"),
        ({"hang_generate": True}, "wake failed"),
        ({"nan_logprobs": True}, ""),
        ({"die_at": "wake", "exit_code": 9}, ""),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
async def test_a_wake_that_fails_ends_in_a_kill_and_a_relaunch(rig: Rig, how: dict[str, Any], words: str) -> None:
    mark, old = rig.events.now(), rig.engine_processes("b")
    await rig.misbehave("b", **how)
    waiting = rig.chat("b")
    if "nan_logprobs" in how:
        assert (await waiting.end()).status == 503
        await quarantined(rig, "b", old, "canary failed")
        return
    failed = await rig.events.wait("engine.failed", "b", mark)
    assert words in failed["data"]["reason"]
    assert (await waiting.end()).done, waiting.answer
    assert not rig.engine_processes("b") & old
    assert await rig.say("a")


async def test_one_that_dies_in_mid_stream_leaves_no_answer_that_looks_whole_and_comes_back(rig: Rig) -> None:
    mark, old = rig.events.now(), rig.engine_processes("a")
    await rig.misbehave("a", die_at="stream", die_after_tokens=5)
    answer = await rig.chat("a", "story", 50).end()
    assert not answer.claims_to_be_complete
    assert answer.error or answer.broken
    await rig.events.wait("engine.failed", "a", mark)
    assert await rig.say("a", "story", 50)
    assert not rig.engine_processes("a") & old


async def test_a_stream_that_its_engine_cuts_is_never_ended_as_whole(rig: Rig) -> None:
    await rig.misbehave("a", cut_stream_after=5)
    answer = await rig.chat("a", "story", 50).end()
    assert not answer.claims_to_be_complete
    assert answer.text
    assert answer.error or answer.broken


async def test_starts_that_fail_are_told_to_clients_and_operators_in_words(tmp_path: Any) -> None:
    engines = [
        engine("exits", misbehave={"die_at": "start", "exit_code": 127}),
        engine("dies", misbehave={"die_at": "load", "exit_code": 3}),
        engine("named", arguments=["--served-model-name", "another"]),
        engine("missing", command=["/nowhere/vllm", "serve"]),
        engine("slow", misbehave={"start_delay_s": 60}, start_deadline_s=3),
        engine("good"),
    ]
    async with rig_up(tmp_path, engines) as rig:
        for name, words in {
            "exits": "127",
            "dies": "3",
            "named": "it serves another",
            "missing": "/nowhere/vllm",
            "slow": "not ready after 3 s",
        }.items():
            status, problem = await rig.call("POST", f"/engines/{name}/start", json={"deadline_s": 20})
            assert status == 502, problem
            assert words in problem["detail"], problem
            status, view = await rig.call("POST", f"/engines/{name}/stop")
            assert (status, view["done"]) == (200, True)
        assert await rig.say("good")
        await rig.check()


async def test_one_that_always_fails_is_refused_with_the_reason_after_its_second_failure(tmp_path: Any) -> None:
    engines = [engine("bad", misbehave={"die_at": "start", "exit_code": 127}), engine("good")]
    async with rig_up(tmp_path, engines, recovery={"backoff_first_s": 1, "backoff_max_s": 20}) as rig:
        answer = await rig.chat("bad").end()
        assert answer.status == 503
        assert answer.error
        assert "bad is failing" in answer.error
        assert "127" in answer.error
        assert int(answer.headers["retry-after"]) >= 1
        assert await rig.say("good")
        await eventually(lambda: failures(rig, 3), what="further tries by itself")


async def failures(rig: Rig, count: int) -> bool:
    return bool((await rig.view("bad"))["failures"] >= count)
