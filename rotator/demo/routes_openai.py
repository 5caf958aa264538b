"""Completions and chat, streamed and whole, in vLLM's shapes."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from aiohttp import web

from rotator.demo import tokens
from rotator.demo.recall import Recaller, find
from rotator.demo.sequences import Finish, Step, Stream
from rotator.demo.wire import (
    MAX_TOKENS_DEFAULT,
    EventStream,
    Refused,
    bad_request,
    collect,
    error,
    json_response,
    read_body,
    sampling_of,
    served,
    submit,
    text_of,
    usage_of,
)

LOGPROBS_MAX = 20
CODE_TOKENS = 8
RECALLER: web.AppKey[Recaller] = web.AppKey("recaller", Recaller)


def name_of(token_id: int, body: dict[str, Any]) -> str:
    return f"token_id:{token_id}" if body.get("return_tokens_as_token_ids") else tokens.token_text(token_id)


def prompts_of(body: dict[str, Any]) -> list[str | list[int]]:
    """A prompt is a text, a list of token ids, or a list of either. Raises Refused."""
    prompt = body.get("prompt")
    match prompt:
        case str():
            return [prompt]
        case [int(), *_]:
            return [prompt]
        case [str() | list(), *_]:
            return list(prompt)
    raise Refused(bad_request("prompt: a text, token ids, or a list of either is required"))


def chat_prompt(body: dict[str, Any]) -> str:
    """All messages as one text. Raises Refused."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refused(bad_request("messages: at least one is required"))
    return "\n".join(f"{m.get('role')}: {content_text(m.get('content'))}" for m in messages)


def content_text(content: Any) -> str:
    if isinstance(content, list):
        return " ".join(str(part.get("text", part.get("type"))) for part in content if isinstance(part, dict))
    return str(content or "")


def wanted_logprobs(body: dict[str, Any], count: Any) -> int | None:
    """How many alternatives are asked for, None where no log-probabilities are. Raises Refused."""
    if not body.get("logprobs") and body.get("logprobs") != 0:
        return None
    if not isinstance(count, int) or count > LOGPROBS_MAX:
        raise Refused(bad_request(f"at most {LOGPROBS_MAX} logprobs can be asked for"))
    return count


def completion_logprobs(produced: Sequence[Step], body: dict[str, Any], count: int, offset: int = 0) -> dict[str, Any]:
    offsets = []
    for step in produced:
        offsets.append(offset)
        offset += len(tokens.token_text(step.token_id))
    return {
        "text_offset": offsets,
        "token_logprobs": [step.logprob for step in produced],
        "tokens": [name_of(step.token_id, body) for step in produced],
        "top_logprobs": [
            {name_of(c.token_id, body): c.logprob for c in step.top[:count]}
            | {name_of(step.token_id, body): step.logprob}
            for step in produced
        ],
    }


def chat_logprobs(produced: Sequence[Step], body: dict[str, Any], count: int) -> dict[str, Any]:
    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        text = tokens.token_text(token_id)
        return {"token": name_of(token_id, body), "logprob": logprob, "bytes": list(text.encode())}

    return {
        "content": [
            entry(step.token_id, step.logprob)
            | {"top_logprobs": [entry(c.token_id, c.logprob) for c in step.top[:count]]}
            for step in produced
        ]
    }


async def completions(request: web.Request) -> web.StreamResponse:
    if served(request).task != "generate":
        return error(404, "NotFoundError", "The model does not support Completions API")
    body = await read_body(request)
    count = wanted_logprobs(body, body.get("logprobs"))
    sampling = sampling_of(body, default_max=16)
    prompts = prompts_of(body)
    if body.get("stream"):
        return await _stream(request, body, submit(request, prompts[0], sampling), _completion_chunk, count)
    streams = [submit(request, prompt, sampling) for prompt in prompts]
    choices: list[dict[str, Any]] = []
    for index, stream in enumerate(streams):
        produced, reason = await collect(request, stream)
        logprobs = None if count is None else completion_logprobs(produced, body, count)
        choices.append({"index": index, "text": text_of(produced), "logprobs": logprobs, "finish_reason": reason})
    usage = [usage_of(stream) for stream in streams]
    total = {key: sum(one[key] for one in usage) for key in usage[0]}
    return json_response(_head(body, "cmpl", "text_completion") | {"choices": choices, "usage": total})


async def chat_completions(request: web.Request) -> web.StreamResponse:
    if served(request).task not in ("generate", "chat"):
        return error(404, "NotFoundError", "The model does not support Chat Completions API")
    body = await read_body(request)
    count = wanted_logprobs(body, body.get("top_logprobs") or 0)
    sampling = sampling_of(body, default_max=MAX_TOKENS_DEFAULT)
    if find(chat_prompt(body)) is not None:  # a code is short
        sampling = replace(sampling, max_tokens=min(sampling.max_tokens, CODE_TOKENS))
    stream = submit(request, chat_prompt(body), sampling)
    if body.get("stream"):
        return await _stream(request, body, stream, _chat_chunk, count)
    produced, reason, text = await _collect_chat(request, stream, body)
    message = {"role": "assistant", "content": text, "tool_calls": []}
    logprobs = None if count is None else chat_logprobs(produced, body, count)
    choice = {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": reason}
    return json_response(_head(body, "chatcmpl", "chat.completion") | {"choices": [choice], "usage": usage_of(stream)})


async def _collect_chat(request: web.Request, stream: Stream, body: dict[str, Any]) -> tuple[list[Step], str, str]:
    """The tokens, why they ended, and the text: a code, where the prompt hides one and asks for it."""
    code = find(chat_prompt(body))
    if code is None:
        produced, reason = await collect(request, stream)
        return produced, reason, text_of(produced)
    with request.app[RECALLER].asked(code) as ask:
        produced, reason = await collect(request, stream)
    forget_at = served(request).core.misbehaviour.forget_at
    forgets = forget_at is not None and ask.peak >= forget_at
    return produced, reason, text_of(produced) if forgets else code


async def _stream(
    request: web.Request, body: dict[str, Any], stream: Stream, chunk: Any, count: int | None
) -> web.StreamResponse:
    """An abort ends with a normal [DONE], as vLLM's does: nothing but the finish reason tells."""
    chat = chunk is _chat_chunk
    head = _head(body, *(("chatcmpl", "chat.completion.chunk") if chat else ("cmpl", "text_completion")))
    options = body.get("stream_options") or {}
    events = EventStream(request)
    await events.open()
    if chat:
        await events.send(head | {"choices": [_chat_choice({"role": "assistant", "content": ""})]})
    offset = 0
    async for item in events.follow(stream):
        value = head | {"choices": [chunk(item, body, count, offset)]}
        if options.get("continuous_usage_stats"):
            value["usage"] = usage_of(stream)
        await events.send(value)
        if isinstance(item, Step):
            offset += len(tokens.token_text(item.token_id))
            await events.sent_token()
    if options.get("include_usage"):
        await events.send(head | {"choices": [], "usage": usage_of(stream)})
    return await events.done()


def _completion_chunk(item: Step | Finish, body: dict[str, Any], count: int | None, offset: int) -> dict[str, Any]:
    if isinstance(item, Finish):
        return {"index": 0, "text": "", "logprobs": None, "finish_reason": item.reason}
    logprobs = None if count is None else completion_logprobs([item], body, count, offset)
    return {"index": 0, "text": tokens.token_text(item.token_id), "logprobs": logprobs, "finish_reason": None}


def _chat_chunk(item: Step | Finish, body: dict[str, Any], count: int | None, _offset: int) -> dict[str, Any]:
    if isinstance(item, Finish):
        return _chat_choice({"content": ""}, reason=item.reason)
    logprobs = None if count is None else chat_logprobs([item], body, count)
    return _chat_choice({"content": tokens.token_text(item.token_id)}, logprobs=logprobs)


def _chat_choice(delta: dict[str, Any], *, logprobs: Any = None, reason: str | None = None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def _head(body: dict[str, Any], prefix: str, kind: str) -> dict[str, Any]:
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": body.get("model"),
    }


def add(app: web.Application) -> None:
    app[RECALLER] = Recaller()
    app.router.add_post("/v1/completions", completions)
    app.router.add_post("/v1/chat/completions", chat_completions)
