"""Whatever an engine does wrong comes out of the adapter as one of three errors, within the deadline."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from rotator.adapters.vllm import VllmControl
from rotator.config import CanaryConfig
from rotator.core.values import Level
from rotator.ports import EngineRefused, EngineTimeout, EngineUnreachable, Probe
from rotator.service import canary
from tests.contract.vllm.stub import MODEL, Stub
from tests.contract.vllm.test_dialects import RELEASES, SOON_S, eventually

SHORT_S = 0.15
PROBE = Probe(prompt="The capital of France is", max_tokens=4)
CONFIG = CanaryConfig(tokens=8)

StartStub = Callable[..., Awaitable[Stub]]


async def sleep(control: VllmControl, url: str, deadline_s: float = SOON_S) -> None:
    await control.sleep(url, level=Level.HOST, abort=False, deadline_s=deadline_s)


async def wake(control: VllmControl, url: str, deadline_s: float = SOON_S) -> None:
    await control.wake(url, level=Level.HOST, deadline_s=deadline_s)


@asynccontextmanager
async def raw_server(answer: bytes) -> AsyncIterator[str]:
    """Answers every connection with these bytes, whatever was asked, and closes it."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@asynccontextmanager
async def scripted(routes: dict[str, Any]) -> AsyncIterator[str]:
    """Answers each path with its JSON value, or its (status, text)."""

    async def handle(request: web.Request) -> web.Response:
        value = routes.get(request.path)
        if value is None:
            return web.json_response({"detail": "Not Found"}, status=404)
        if isinstance(value, tuple):
            return web.Response(status=value[0], text=value[1])
        return web.json_response(value)

    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", handle)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@pytest.mark.parametrize("way", ["hang_sleep", "wedged"])
async def test_a_sleep_that_hangs_is_a_timeout(way: str, stub: StartStub, control: VllmControl) -> None:
    engine = await stub(**{way: True})
    with pytest.raises(EngineTimeout, match=r"/sleep: no answer within 0.15 s"):
        await sleep(control, engine.url, SHORT_S)


async def test_a_slow_sleep_within_the_deadline_is_a_sleep(stub: StartStub, control: VllmControl) -> None:
    engine = await stub(slow_sleep_s=0.1)
    await sleep(control, engine.url)
    assert await control.is_sleeping(engine.url, deadline_s=SOON_S)


async def test_a_sleep_goes_on_when_the_caller_gave_up_on_it(stub: StartStub, control: VllmControl) -> None:
    engine = await stub(slow_sleep_s=0.3)
    with pytest.raises(EngineTimeout):
        await sleep(control, engine.url, SHORT_S)
    await eventually(lambda: bool(engine.ranks[0].asleep()))
    assert engine.ranks[0].asleep()


@pytest.mark.parametrize("way", ["hang_wake", "slow_wake_s"])
async def test_a_wake_that_hangs_is_a_timeout(way: str, stub: StartStub, control: VllmControl) -> None:
    engine = await stub()
    await sleep(control, engine.url)
    engine.misbehave(**{way: 30 if way == "slow_wake_s" else True})
    with pytest.raises(EngineTimeout):
        await wake(control, engine.url, SHORT_S)


async def test_a_generation_that_hangs_is_a_timeout_while_health_says_200(
    stub: StartStub, control: VllmControl
) -> None:
    engine = await stub(wedged=True)
    assert await control.is_healthy(engine.url, deadline_s=SOON_S)
    with pytest.raises(EngineTimeout):
        await control.generate(engine.url, MODEL, PROBE, deadline_s=SHORT_S)


async def test_a_probe_that_timed_out_leaves_no_request_in_the_engine(stub: StartStub, control: VllmControl) -> None:
    engine = await stub(hang_generate=True)
    with pytest.raises(EngineTimeout):
        await control.generate(engine.url, MODEL, PROBE, deadline_s=SHORT_S)
    await eventually(lambda: engine.core.running == engine.core.waiting == 0)
    assert engine.core.counters.requests == 1


async def test_a_cancelled_call_closes_its_connection(stub: StartStub, control: VllmControl) -> None:
    engine = await stub(hang_generate=True)
    call = asyncio.create_task(control.generate(engine.url, MODEL, PROBE, deadline_s=SOON_S))
    await eventually(lambda: engine.core.waiting + engine.core.running == 1)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await eventually(lambda: engine.core.waiting + engine.core.running == 0)


@pytest.mark.parametrize("release", RELEASES)
async def test_a_rank_that_fails_to_sleep_is_a_refusal_and_the_others_slept(
    release: str, stub: StartStub, control: VllmControl
) -> None:
    engine = await stub(release, fail_sleep_rank=1)
    with pytest.raises(EngineRefused, match="500: Worker_TP1") as caught:
        await sleep(control, engine.url)
    assert caught.value.status == 500
    assert [bool(rank.asleep()) for rank in engine.ranks] == [True, False]


async def test_a_rank_that_fails_to_wake_is_a_refusal(stub: StartStub, control: VllmControl) -> None:
    engine = await stub()
    await sleep(control, engine.url)
    engine.misbehave(fail_wake_rank=0)
    with pytest.raises(EngineRefused, match="Worker_TP0"):
        await wake(control, engine.url)


async def test_a_lie_about_sleeping_passes_here_and_is_left_to_the_bytes(stub: StartStub, control: VllmControl) -> None:
    engine = await stub(lie_sleep=True)
    await sleep(control, engine.url)
    assert await control.is_sleeping(engine.url, deadline_s=SOON_S)
    assert not any(rank.asleep() for rank in engine.ranks)


@pytest.mark.parametrize("kind", ["zero", "corrupt"])
@pytest.mark.parametrize("task", ["generate", "chat", "embed"])
async def test_a_wake_to_garbage_is_caught_by_the_canary_and_a_good_one_passes(
    kind: str, task: str, stub: StartStub, control: VllmControl
) -> None:
    engine = await stub(task=task)
    golden = await canary.record(control, engine.url, MODEL, CONFIG)
    assert golden["repeatable"]
    await sleep(control, engine.url)
    await wake(control, engine.url)
    good = await canary.check(control, engine.url, MODEL, golden, CONFIG)
    assert good.ok, good.reason
    await sleep(control, engine.url)
    engine.misbehave(wake_garbage=kind)
    await wake(control, engine.url)
    bad = await canary.check(control, engine.url, MODEL, golden, CONFIG)
    assert not bad.ok
    assert bad.reason


async def test_weights_that_read_as_zero_say_exclamation_marks(stub: StartStub, control: VllmControl) -> None:
    engine = await stub(wake_garbage="zero")
    await sleep(control, engine.url)
    await wake(control, engine.url)
    generation = await control.generate(engine.url, MODEL, PROBE, deadline_s=SOON_S)
    assert generation.text == "!!!!"
    assert canary.garbage(generation)


async def test_a_level_2_wake_without_a_reload_says_exclamation_marks(stub: StartStub, control: VllmControl) -> None:
    engine = await stub()
    await control.sleep(engine.url, level=Level.DISCARD, abort=False, deadline_s=SOON_S)
    await wake(control, engine.url)
    assert (await control.generate(engine.url, MODEL, PROBE, deadline_s=SOON_S)).text == "!!!!"


@pytest.mark.parametrize("task", ["generate", "chat"])
async def test_log_probabilities_that_are_no_numbers_are_refused(
    task: str, stub: StartStub, control: VllmControl
) -> None:
    engine = await stub(task=task, nan_logprobs=True)
    with pytest.raises(EngineRefused, match="garbage"):
        await control.generate(engine.url, MODEL, PROBE, deadline_s=SOON_S)


async def test_an_engine_without_the_development_routes_is_refused_with_the_fix(
    stub: StartStub, control: VllmControl
) -> None:
    engine = await stub(dev_mode=False)
    for ask in (sleep(control, engine.url), wake(control, engine.url)):
        with pytest.raises(EngineRefused, match=r"VLLM_SERVER_DEV_MODE=1 .* --enable-sleep-mode") as caught:
            await ask
        assert caught.value.status == 404


async def test_nobody_listening_is_unreachable(control: VllmControl) -> None:
    async with raw_server(b"") as url:
        pass
    with pytest.raises(EngineUnreachable):
        await control.version(url, deadline_s=SOON_S)
    assert not await control.is_healthy(url, deadline_s=SOON_S)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n<html/>",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    ],
)
async def test_what_is_no_vllm_is_unreachable(answer: bytes, control: VllmControl) -> None:
    async with raw_server(answer) as url:
        for ask in (
            control.version(url, deadline_s=SOON_S),
            control.is_sleeping(url, deadline_s=SOON_S),
            control.served_models(url, deadline_s=SOON_S),
            sleep(control, url),
        ):
            with pytest.raises(EngineUnreachable):
                await ask


async def test_an_answer_without_end_is_not_read_to_its_end(control: VllmControl) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 900000000\r\n\r\n"
    async with raw_server(head + b"x" * (9 << 20)) as url:
        with pytest.raises(EngineUnreachable, match="larger than"):
            await control.version(url, deadline_s=SOON_S)


@pytest.mark.parametrize(
    "body",
    [{"status": "awake", "level": 1}, {"status": "sleeping", "level": 2}, {"status": "error"}],
)
async def test_a_200_whose_body_says_otherwise_is_a_refused_sleep(body: dict[str, Any], control: VllmControl) -> None:
    async with scripted({"/version": {"version": "0.32.0"}, "/sleep": body}) as url:
        with pytest.raises(EngineRefused, match="answered 200, but its body says"):
            await sleep(control, url)


async def test_a_200_whose_body_says_otherwise_is_a_refused_wake(control: VllmControl) -> None:
    async with scripted({"/wake_up": {"status": "sleeping", "tags": ["weights"]}}) as url:
        with pytest.raises(EngineRefused, match="sleeping"):
            await wake(control, url)


async def test_an_empty_200_is_checked_against_what_the_engine_says_of_itself(control: VllmControl) -> None:
    still_awake = {"/version": {"version": "0.26.0"}, "/sleep": (200, ""), "/is_sleeping": {"is_sleeping": False}}
    async with scripted(still_awake) as url:
        with pytest.raises(EngineRefused, match="says that it is awake"):
            await sleep(control, url)
    async with scripted({"/wake_up": (200, ""), "/is_sleeping": {"is_sleeping": True}}) as url:
        with pytest.raises(EngineRefused, match="says that it is asleep"):
            await wake(control, url)


async def test_the_deadline_covers_all_steps_of_a_wake_together(stub: StartStub, control: VllmControl) -> None:
    engine = await stub("0.26.0")
    await control.sleep(engine.url, level=Level.DISCARD, abort=False, deadline_s=SOON_S)
    engine.misbehave(slow_wake_s=0.2)
    began_s = asyncio.get_running_loop().time()
    with pytest.raises(EngineTimeout):
        await control.wake(engine.url, level=Level.DISCARD, deadline_s=0.3)
    assert asyncio.get_running_loop().time() - began_s < 1.0


@pytest.mark.parametrize(
    "answer",
    [
        {"choices": []},
        {"choices": [{"text": "a", "logprobs": None}]},
        {"choices": [{"text": "a", "logprobs": {"tokens": ["Paris"], "token_logprobs": [-0.1]}}]},
        {"choices": [{"text": "a", "logprobs": {"tokens": ["token_id:5"], "token_logprobs": [None]}}]},
        {"choices": [{"text": "a", "logprobs": ["?"]}]},
    ],
)
async def test_an_answer_without_token_ids_and_log_probabilities_is_refused(
    answer: dict[str, Any], control: VllmControl
) -> None:
    async with scripted({"/v1/completions": answer}) as url:
        with pytest.raises(EngineRefused):
            await control.generate(url, MODEL, PROBE, deadline_s=SOON_S)


@pytest.mark.parametrize(
    ("task", "route"),
    [("chat", "/v1/chat/completions"), ("embed", "/v1/embeddings"), ("score", "/score")],
)
async def test_a_model_that_does_not_complete_is_probed_on_the_route_that_it_has(
    task: str, route: str, stub: StartStub, control: VllmControl
) -> None:
    engine = await stub(task=task)
    first = await control.generate(engine.url, MODEL, PROBE, deadline_s=SOON_S)
    assert engine.asked_paths()[-1] == route
    assert await control.generate(engine.url, MODEL, PROBE, deadline_s=SOON_S) == first
    assert len(first.token_ids) == len(first.logprobs) == len(first.runner_up_logprobs) > 0


async def test_an_engine_that_answers_no_probe_at_all_is_refused_with_every_reason(control: VllmControl) -> None:
    async with scripted({"/v1/completions": (400, "no completions here")}) as url:
        with pytest.raises(EngineRefused, match=r"no route answers a probe: .*no completions here.*/score"):
            await control.generate(url, MODEL, PROBE, deadline_s=SOON_S)


async def test_an_engine_that_dies_in_mid_answer_is_unreachable(stub: StartStub, control: VllmControl) -> None:
    engine = await stub(hang_generate=True)
    call = asyncio.create_task(control.generate(engine.url, MODEL, PROBE, deadline_s=SOON_S))
    await eventually(lambda: engine.core.waiting + engine.core.running == 1)
    await engine.runner.cleanup()
    with pytest.raises(EngineUnreachable):
        await call


@pytest.mark.parametrize("place", ["sleep", "wake"])
async def test_dying_is_told_to_the_process_with_its_exit_code(
    place: str, stub: StartStub, control: VllmControl
) -> None:
    engine = await stub(die_at=place, exit_code=127)
    await sleep(control, engine.url)
    await wake(control, engine.url)
    assert engine.deaths[0] == 127


async def test_the_residue_grows_with_each_sleep_where_told(stub: StartStub, control: VllmControl) -> None:
    engine = await stub(residue_growth_gib=1.5)
    for cycle in (1, 2):
        await sleep(control, engine.url)
        await wake(control, engine.url)
        assert engine.ranks[0].residue_bytes == cycle * 3 << 29


async def test_once_makes_a_misbehaviour_happen_once(stub: StartStub, control: VllmControl) -> None:
    engine = await stub(fail_sleep_rank=0, once=True)
    with pytest.raises(EngineRefused):
        await sleep(control, engine.url)
    await wake(control, engine.url)
    await sleep(control, engine.url)
    assert engine.core.misbehaviour.fail_sleep_rank is None
