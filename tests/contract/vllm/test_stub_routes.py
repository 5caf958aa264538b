"""The stub answers as vLLM does, so that real clients cannot tell: judged by the OpenAI client where there is one."""

import asyncio
import json
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aiohttp
import openai
import pytest

from tests.contract.vllm.stub import MODEL, Stub
from tests.contract.vllm.test_dialects import eventually

StartStub = Callable[..., Awaitable[Stub]]
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0, "extra_body": {"ignore_eos": True}}
MESSAGES: Any = [{"role": "user", "content": "Tell me a story"}]


@pytest.fixture
async def engine(stub: StartStub) -> Stub:
    return await stub("0.26.0")


@pytest.fixture
async def client(engine: Stub) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{engine.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture
async def http(engine: Stub) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(base_url=engine.url) as session:
        yield session


async def test_a_streamed_chat_says_what_a_whole_one_says(client: openai.AsyncOpenAI) -> None:
    whole = await client.chat.completions.create(messages=MESSAGES, max_tokens=12, **GREEDY)
    stream = await client.chat.completions.create(
        messages=MESSAGES, max_tokens=12, stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    chunks = [chunk async for chunk in stream]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert whole.usage is not None
    assert chunks[-1].usage == whole.usage
    assert whole.usage.completion_tokens == 12
    assert whole.choices[0].finish_reason == "length"


async def test_log_probabilities_of_a_chat_come_with_alternatives_and_token_ids(client: openai.AsyncOpenAI) -> None:
    asked = GREEDY | {"extra_body": {"ignore_eos": True, "return_tokens_as_token_ids": True}}
    answer = await client.chat.completions.create(
        messages=MESSAGES, max_tokens=4, logprobs=True, top_logprobs=2, **asked
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    for step in logprobs.content:
        assert step.token.startswith("token_id:")
        assert step.token == step.top_logprobs[0].token
        assert sum(math.exp(top.logprob) for top in step.top_logprobs) <= 1


async def test_equal_seeds_draw_equal_tokens_and_other_seeds_others(client: openai.AsyncOpenAI) -> None:
    async def draw(seed: int) -> str:
        answer = await client.completions.create(
            model=MODEL, prompt="x", max_tokens=32, temperature=1.0, seed=seed, extra_body={"ignore_eos": True}
        )
        return answer.choices[0].text

    assert await draw(1) == await draw(1)
    assert await draw(1) != await draw(2)


async def test_several_prompts_give_several_choices(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(prompt=["one", "two"], max_tokens=5, **GREEDY)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].text != answer.choices[1].text
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 10


async def test_an_answer_may_end_by_itself(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model=MODEL, prompt="x", max_tokens=2000, temperature=0)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens < 2000


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"model": "other"}, 404),
        ({"max_tokens": 0}, 400),
        ({"max_tokens": 99_999}, 400),
        ({"prompt": None}, 400),
        ({"seed": "x"}, 400),
    ],
)
async def test_bad_requests_get_error_bodies_in_openais_shape(
    change: dict[str, Any], status: int, http: aiohttp.ClientSession
) -> None:
    body = {"model": MODEL, "prompt": "x", "max_tokens": 4} | change
    async with http.post("/v1/completions", json=body) as answer:
        assert answer.status == status
        error = (await answer.json())["error"]
    assert error["code"] == status
    assert error["message"]


async def test_a_stream_that_is_cut_never_ends_as_if_it_were_whole(engine: Stub, http: aiohttp.ClientSession) -> None:
    engine.misbehave(cut_stream_after=3)
    body = {"model": MODEL, "prompt": "x", "max_tokens": 50, "stream": True, "ignore_eos": True}
    lines: list[bytes] = []

    async def read() -> None:
        async with http.post("/v1/completions", json=body) as answer:
            async for line in answer.content:
                lines.append(line)  # noqa: PERF401 - a comprehension would lose them all when it breaks

    with pytest.raises(aiohttp.ClientError):
        await read()
    assert lines
    assert not any(b"[DONE]" in line for line in lines)
    await eventually(lambda: engine.core.running == 0)


async def test_dying_in_mid_stream_comes_after_so_many_tokens(engine: Stub, http: aiohttp.ClientSession) -> None:
    engine.misbehave(die_at="stream", die_after_tokens=5, exit_code=127, once=True)
    body = {"model": MODEL, "prompt": "x", "max_tokens": 9, "stream": True, "ignore_eos": True}
    async with http.post("/v1/completions", json=body) as answer:
        await answer.read()
    assert engine.deaths == [127]


async def test_a_client_that_leaves_takes_its_request_with_it(engine: Stub, http: aiohttp.ClientSession) -> None:
    body = {"model": MODEL, "prompt": "x", "max_tokens": 20_000, "stream": True, "ignore_eos": True}
    answer = await http.post("/v1/completions", json=body)
    await answer.content.readline()
    assert engine.core.running == 1
    answer.close()
    await eventually(lambda: engine.core.running == 0)


async def test_responses_are_made_streamed_and_found_again(client: openai.AsyncOpenAI) -> None:
    made = await client.responses.create(model=MODEL, input="hello", max_output_tokens=6, temperature=0)
    assert made.output_text
    assert (await client.responses.retrieve(made.id)).output_text == made.output_text
    events = [
        event
        async for event in await client.responses.create(
            model=MODEL, input="hello", max_output_tokens=6, temperature=0, stream=True
        )
    ]
    deltas = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert deltas == made.output_text
    assert events[-1].type == "response.completed"
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve("resp_none")


async def test_a_background_response_can_be_cancelled(engine: Stub, client: openai.AsyncOpenAI) -> None:
    # Without its natural end: on a busy machine it would be over before the cancel comes.
    endless = {"ignore_eos": True}
    made = await client.responses.create(
        model=MODEL, input="hello", max_output_tokens=20_000, background=True, extra_body=endless
    )
    assert made.status == "queued"
    await eventually(lambda: engine.core.counters.generation_tokens > 0)
    assert (await client.responses.cancel(made.id)).status == "cancelled"
    await eventually(lambda: engine.core.running == 0)


@pytest.mark.parametrize("stream", [False, True])
async def test_messages_speak_anthropics_dialect(stream: bool, http: aiohttp.ClientSession) -> None:
    body = {"model": MODEL, "max_tokens": 5, "messages": MESSAGES, "temperature": 0, "stream": stream}
    async with http.post("/v1/messages", json=body) as answer:
        text = await answer.text()
    if stream:
        kinds = [line[7:] for line in text.splitlines() if line.startswith("event: ")]
        assert kinds[:2] == ["message_start", "content_block_start"]
        assert kinds.count("content_block_delta") == 5
        assert kinds[-1] == "message_stop"
    else:
        message = json.loads(text)
        assert message["content"][0]["text"]
        assert message["stop_reason"] == "max_tokens"


async def test_embeddings_differ_by_text_and_are_the_same_in_both_encodings(client: openai.AsyncOpenAI) -> None:
    packed = await client.embeddings.create(model=MODEL, input=["one", "two"])
    plain = await client.embeddings.create(model=MODEL, input=["one", "two"], encoding_format="float")
    for one, other in zip(packed.data, plain.data, strict=True):
        assert one.embedding == pytest.approx(other.embedding, abs=1e-6)
    assert plain.data[0].embedding != plain.data[1].embedding
    assert math.hypot(*plain.data[0].embedding) == pytest.approx(1)


async def test_rerank_orders_by_score_and_score_puts_equals_first(http: aiohttp.ClientSession) -> None:
    body = {"model": MODEL, "query": "cat", "documents": ["dog", "cat", "fish"]}
    async with http.post("/v1/rerank", json=body) as answer:
        results = (await answer.json())["results"]
    assert results[0]["index"] == 1
    assert [r["relevance_score"] for r in results] == sorted((r["relevance_score"] for r in results), reverse=True)
    async with http.post("/score", json={"model": MODEL, "text_1": "cat", "text_2": ["cat", "dog"]}) as answer:
        scores = [row["score"] for row in (await answer.json())["data"]]
    assert scores[0] == pytest.approx(1)
    assert scores[1] < 1


async def test_tokenize_counts_words(http: aiohttp.ClientSession) -> None:
    async with http.post("/tokenize", json={"model": MODEL, "prompt": "a b a"}) as answer:
        value = await answer.json()
    assert value["count"] == 3
    assert value["tokens"][0] == value["tokens"][2] != value["tokens"][1]


async def test_a_transcription_depends_on_the_files_bytes(client: openai.AsyncOpenAI) -> None:
    async def hear(audio: bytes) -> str:
        return (await client.audio.transcriptions.create(model=MODEL, file=("a.wav", audio))).text

    assert await hear(b"RIFF" * 50) == await hear(b"RIFF" * 50)
    assert await hear(b"RIFF" * 50) != await hear(b"RIFX" * 50)


async def test_a_websocket_echoes_text_and_bytes(http: aiohttp.ClientSession) -> None:
    async with http.ws_connect(f"/v1/realtime?model={MODEL}") as socket:
        assert (await socket.receive_json())["type"] == "session.created"
        await socket.send_str("hello")
        assert await socket.receive_str() == "hello"
        await socket.send_bytes(b"\x00\xff")
        assert await socket.receive_bytes() == b"\x00\xff"


async def test_metrics_carry_vllms_names_and_follow_the_sleep_state(engine: Stub, http: aiohttp.ClientSession) -> None:
    async def metrics() -> str:
        async with http.get("/metrics") as answer:
            return await answer.text()

    async with http.post("/v1/completions", json={"model": MODEL, "prompt": "x", "max_tokens": 5}) as answer:
        made = (await answer.json())["usage"]["completion_tokens"]
    text = await metrics()
    assert f'vllm:generation_tokens_total{{engine="0",model_name="m"}} {made}' in text
    assert "vllm:num_requests_running{" in text
    assert "vllm:num_requests_waiting{" in text
    assert 'sleep_state="awake"} 1' in text
    await engine.core.sleep(2, "keep")
    assert 'sleep_state="discard_all"} 1' in await metrics()


@pytest.mark.parametrize(("release", "there"), [("0.31.0", False), ("0.32.0", True)])
async def test_operation_metrics_came_with_0_32(release: str, there: bool, stub: StartStub) -> None:
    engine = await stub(release)
    await engine.core.sleep(1, "keep")
    async with aiohttp.ClientSession() as session, session.get(f"{engine.url}/metrics") as answer:
        text = await answer.text()
    assert ('sleep_mode_operation_duration_seconds_count{operation="sleep"} 1' in text) is there


async def test_misbehaviour_is_set_at_run_time_and_nonsense_is_refused(
    engine: Stub, http: aiohttp.ClientSession
) -> None:
    async with http.post("/stub/misbehave", json={"lie_sleep": True}) as answer:
        assert answer.status == 200
    async with http.post("/stub/misbehave", json={"slow_wake_s": 2}) as answer:
        assert await answer.json() == {**(await answer.json()), "lie_sleep": True, "slow_wake_s": 2}
    async with http.post("/stub/misbehave", json={"lie_asleep": True}) as answer:
        assert answer.status == 400
    async with http.post("/stub/misbehave", json={"reset": True}) as answer:
        assert (await answer.json())["lie_sleep"] is False
    assert engine.core.misbehaviour.slow_wake_s == 0


async def test_a_hang_that_is_lifted_lets_requests_go_on(engine: Stub, http: aiohttp.ClientSession) -> None:
    engine.misbehave(hang_generate=True)
    body = {"model": MODEL, "prompt": "x", "max_tokens": 4, "ignore_eos": True}
    asked = asyncio.ensure_future(http.post("/v1/completions", json=body))
    await eventually(lambda: engine.core.waiting == 1)
    async with http.post("/stub/misbehave", json={"reset": True}):
        pass
    async with await asyncio.wait_for(asked, 5) as answer:
        assert (await answer.json())["usage"]["completion_tokens"] == 4


async def test_queued_requests_beyond_the_batch_wait_and_are_served(stub: StartStub) -> None:
    from rotator.demo.core import Core
    from rotator.demo.dialects import stub_dialect
    from rotator.demo.memory import PlainMemory
    from rotator.demo.misbehave import Misbehaviour
    from rotator.demo.sequences import Sampling, Speed

    core = Core(
        [PlainMemory()],
        seed="x",
        dialect=stub_dialect("0.26.0"),
        speed=Speed(tokens_per_s=1000, running_max=2),
        misbehaviour=Misbehaviour(),
        die=lambda code: None,
    )
    core.load()
    running = asyncio.create_task(core.run())
    streams = [core.submit([5], Sampling(max_tokens=3, ignore_eos=True)) for _ in range(5)]
    await eventually(lambda: core.running == 2)
    assert core.waiting == 3
    await eventually(lambda: all(len(stream.produced) == 3 for stream in streams))
    running.cancel()
