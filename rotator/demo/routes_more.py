"""The rest of what a gateway may pass on: responses, Anthropic messages, vectors, tokens, audio, a WebSocket."""

import asyncio
import base64
import struct
import time
import uuid
from collections import OrderedDict
from typing import Any

from aiohttp import WSMsgType, web

from rotator.demo import tokens
from rotator.demo.routes_openai import chat_prompt, content_text
from rotator.demo.sequences import Step, Stream
from rotator.demo.wire import (
    MAX_TOKENS_DEFAULT,
    EventStream,
    Refused,
    bad_request,
    check_model,
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

RESPONSES_MAX = 1000
AUDIO_BYTES_MAX = 64 << 20
_VECTOR_TASKS = ("embed", "generate", "chat")


class ResponseStore:
    """Responses that a client may ask for again, the oldest forgotten first, and the background ones still running."""

    def __init__(self) -> None:
        self.found: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self.tasks: dict[str, asyncio.Task[None]] = {}

    def put(self, response: dict[str, Any]) -> None:
        self.found[response["id"]] = response
        while len(self.found) > RESPONSES_MAX:
            self.found.popitem(last=False)

    def start(self, response_id: str, task: asyncio.Task[None]) -> None:
        self.tasks[response_id] = task
        task.add_done_callback(lambda _: self.tasks.pop(response_id, None))


STORE: web.AppKey[ResponseStore] = web.AppKey("responses", ResponseStore)


def _response(body: dict[str, Any], status: str) -> dict[str, Any]:
    return {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        "model": body.get("model"),
        "status": status,
        "output": [],
        "usage": None,
    }


def _complete(response: dict[str, Any], stream: Stream, text: str, reason: str) -> dict[str, Any]:
    usage = usage_of(stream)
    part = {"type": "output_text", "text": text, "annotations": []}
    message = {"id": f"msg_{response['id'][5:]}", "type": "message", "role": "assistant", "status": "completed"}
    response["status"] = "completed" if reason == "stop" else "cancelled" if reason == "abort" else "incomplete"
    response["output"] = [message | {"content": [part]}]
    response["usage"] = {
        "input_tokens": usage["prompt_tokens"],
        "output_tokens": usage["completion_tokens"],
        "total_tokens": usage["total_tokens"],
    }
    return response


async def create_response(request: web.Request) -> web.StreamResponse:
    body = await read_body(request)
    given = body.get("input")
    if not given:
        raise Refused(bad_request("input is required"))
    prompt = given if isinstance(given, str) else chat_prompt({"messages": given})
    stream = submit(request, prompt, sampling_of(body, default_max=MAX_TOKENS_DEFAULT))
    store, response = request.app[STORE], _response(body, "in_progress")
    if body.get("store", True):
        store.put(response)
    if body.get("background"):
        response["status"] = "queued"
        store.start(response["id"], asyncio.create_task(_in_background(request, response, stream)))
        return json_response(response)
    if body.get("stream"):
        return await _stream_response(request, response, stream)
    produced, reason = await collect(request, stream)
    return json_response(_complete(response, stream, text_of(produced), reason))


async def _in_background(request: web.Request, response: dict[str, Any], stream: Stream) -> None:
    response["status"] = "in_progress"
    try:
        produced, reason = await collect(request, stream)
    except asyncio.CancelledError:
        response["status"] = "cancelled"
        raise
    _complete(response, stream, text_of(produced), reason)


async def _stream_response(request: web.Request, response: dict[str, Any], stream: Stream) -> web.StreamResponse:
    events, number, text = EventStream(request), 0, ""
    await events.open()

    async def send(kind: str, value: dict[str, Any]) -> None:
        nonlocal number
        await events.send({"type": kind, "sequence_number": number, **value}, event=kind)
        number += 1

    await send("response.created", {"response": response})
    reason = "abort"
    async for item in events.follow(stream):
        if not isinstance(item, Step):
            reason = item.reason
            break
        piece = tokens.token_text(item.token_id)
        text += piece
        await send("response.output_text.delta", {"output_index": 0, "content_index": 0, "delta": piece})
        await events.sent_token()
    await send("response.completed", {"response": _complete(response, stream, text, reason)})
    return await events.done(marker=False)


async def get_response(request: web.Request) -> web.Response:
    return json_response(_found_response(request))


async def cancel_response(request: web.Request) -> web.Response:
    response = _found_response(request)
    task = request.app[STORE].tasks.get(response["id"])
    if task is None:
        return bad_request("only a background response that is under way can be cancelled")
    task.cancel()
    await asyncio.wait([task])
    response["status"] = "cancelled"
    return json_response(response)


def _found_response(request: web.Request) -> dict[str, Any]:
    response_id = request.match_info["response_id"]
    found = request.app[STORE].found.get(response_id)
    if found is None:
        raise Refused(error(404, "NotFoundError", f"Response with id '{response_id}' not found."))
    return found


async def messages(request: web.Request) -> web.StreamResponse:
    """Anthropic's dialect."""
    body = await read_body(request)
    prompt = f"{content_text(body.get('system'))}\n{chat_prompt(body)}"
    stream = submit(request, prompt, sampling_of(body, default_max=MAX_TOKENS_DEFAULT))
    head = {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant", "model": body.get("model")}
    if body.get("stream"):
        return await _stream_message(request, head, stream)
    produced, reason = await collect(request, stream)
    content = [{"type": "text", "text": text_of(produced)}]
    return json_response(
        head | {"content": content, "stop_reason": _stop_reason(reason), "usage": _anthropic_usage(stream)}
    )


async def _stream_message(request: web.Request, head: dict[str, Any], stream: Stream) -> web.StreamResponse:
    events, reason = EventStream(request), "abort"
    await events.open()

    async def send(kind: str, **value: Any) -> None:
        await events.send({"type": kind, **value}, event=kind)

    await send("message_start", message=head | {"content": [], "usage": _anthropic_usage(stream)})
    await send("content_block_start", index=0, content_block={"type": "text", "text": ""})
    async for item in events.follow(stream):
        if not isinstance(item, Step):
            reason = item.reason
            break
        delta = {"type": "text_delta", "text": tokens.token_text(item.token_id)}
        await send("content_block_delta", index=0, delta=delta)
        await events.sent_token()
    await send("content_block_stop", index=0)
    await send("message_delta", delta={"stop_reason": _stop_reason(reason)}, usage=_anthropic_usage(stream))
    await send("message_stop")
    return await events.done(marker=False)


def _stop_reason(reason: str) -> str:
    return {"stop": "end_turn", "length": "max_tokens"}.get(reason, reason)


def _anthropic_usage(stream: Stream) -> dict[str, int]:
    return {"input_tokens": len(stream.prompt_ids), "output_tokens": len(stream.produced)}


async def embeddings(request: web.Request) -> web.Response:
    if served(request).task not in _VECTOR_TASKS:
        return error(404, "NotFoundError", "The model does not support Embeddings API")
    body = await read_body(request)
    texts = _texts(body.get("input"))
    dimensions = int(body.get("dimensions") or served(request).dimensions)
    rows: list[dict[str, Any]] = []
    for index, text in enumerate(texts):
        values: Any = await served(request).core.embed(text, dimensions)
        if body.get("encoding_format") == "base64":
            values = base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()
        rows.append({"object": "embedding", "index": index, "embedding": values})
    return json_response({"object": "list", "data": rows, "model": body.get("model"), "usage": _count(texts)})


async def pooling(request: web.Request) -> web.Response:
    if served(request).task != "embed":
        return error(404, "NotFoundError", "The model does not support Pooling API")
    body = await read_body(request)
    texts = _texts(body.get("input"))
    core, dimensions = served(request).core, served(request).dimensions
    rows = [
        {"object": "pooling", "index": index, "data": await core.embed(text, dimensions)}
        for index, text in enumerate(texts)
    ]
    return json_response({"object": "list", "data": rows, "model": body.get("model"), "usage": _count(texts)})


async def rerank(request: web.Request) -> web.Response:
    body = await read_body(request)
    query, documents = str(body.get("query", "")), _texts(body.get("documents"))
    scores = [await _score(request, query, document) for document in documents]
    order = sorted(range(len(documents)), key=lambda i: -scores[i])[: body.get("top_n") or None]
    results = [{"index": i, "document": {"text": documents[i]}, "relevance_score": scores[i]} for i in order]
    return json_response({"id": f"rerank-{uuid.uuid4().hex}", "model": body.get("model"), "results": results})


async def score(request: web.Request) -> web.Response:
    body = await read_body(request)
    left, right = _texts(body.get("text_1")), _texts(body.get("text_2"))
    pairs = [(left[0], text) for text in right] if len(left) == 1 else list(zip(left, right, strict=False))
    rows = [
        {"object": "score", "index": index, "score": await _score(request, one, other)}
        for index, (one, other) in enumerate(pairs)
    ]
    return json_response({"object": "list", "data": rows, "model": body.get("model"), "usage": _count(right)})


async def _score(request: web.Request, one: str, other: str) -> float:
    dimensions, core = served(request).dimensions, served(request).core
    left, right = await core.embed(one, dimensions), await core.embed(other, dimensions)
    return (1 + sum(a * b for a, b in zip(left, right, strict=True))) / 2


async def tokenize(request: web.Request) -> web.Response:
    body = await read_body(request)
    ids = tokens.tokenize(chat_prompt(body) if "messages" in body else str(body.get("prompt", "")))
    return json_response({"count": len(ids), "max_model_len": served(request).max_model_len, "tokens": ids})


async def detokenize(request: web.Request) -> web.Response:
    body = await read_body(request)
    return json_response({"prompt": "".join(tokens.token_text(int(i)) for i in body.get("tokens") or ())})


async def transcriptions(request: web.Request) -> web.Response:
    """Multipart: a file and a model. What it hears depends on every byte of the file."""
    if not request.content_type.startswith("multipart/"):
        return bad_request("multipart/form-data with 'file' and 'model' is required")
    fields: dict[str, str] = {}
    audio = b""
    async for part in await request.multipart():
        name = getattr(part, "name", None)
        raw = bytes(await part.read())  # type: ignore[union-attr]  # nested multiparts are not part of this API
        if name == "file":
            audio = raw[:AUDIO_BYTES_MAX]
        elif name:
            fields[name] = raw.decode()
    check_model(request, fields.get("model"))
    if not audio:
        return bad_request("'file' is required")
    prompt = [len(audio), *(int.from_bytes(audio[i : i + 4], "little") for i in range(0, min(len(audio), 4096), 4))]
    sampling = sampling_of({"max_tokens": 24, "temperature": 0, "ignore_eos": True}, default_max=24)
    produced, _reason = await collect(request, submit(request, prompt, sampling))
    return json_response({"text": text_of(produced).strip(), "usage": {"type": "duration", "seconds": 1}})


async def realtime(request: web.Request) -> web.WebSocketResponse:
    """An echo, so that what passes through is seen byte for byte."""
    check_model(request, request.query.get("model"))
    socket = web.WebSocketResponse()
    await socket.prepare(request)
    await socket.send_json({"type": "session.created", "model": request.query.get("model")})
    async for message in socket:
        if message.type is WSMsgType.TEXT:
            await socket.send_str(message.data)
        elif message.type is WSMsgType.BINARY:
            await socket.send_bytes(message.data)
    return socket


def _texts(value: Any) -> list[str]:
    match value:
        case str():
            return [value]
        case [int(), *_]:
            return [" ".join(map(str, value))]
        case [_, *_]:
            return [one if isinstance(one, str) else " ".join(map(str, one)) for one in value]
    raise Refused(bad_request("at least one text is required"))


def _count(texts: list[str]) -> dict[str, int]:
    total = sum(len(tokens.tokenize(text)) for text in texts)
    return {"prompt_tokens": total, "total_tokens": total}


def add(app: web.Application) -> None:
    app[STORE] = ResponseStore()
    post, get = app.router.add_post, app.router.add_get
    post("/v1/responses", create_response)
    get("/v1/responses/{response_id}", get_response)
    post("/v1/responses/{response_id}/cancel", cancel_response)
    post("/v1/messages", messages)
    post("/v1/embeddings", embeddings)
    post("/pooling", pooling)
    for prefix in ("", "/v1", "/v2"):
        post(f"{prefix}/rerank", rerank)
    for prefix in ("", "/v1"):
        post(f"{prefix}/score", score)
    post("/tokenize", tokenize)
    post("/detokenize", detokenize)
    post("/v1/audio/transcriptions", transcriptions)
    get("/v1/realtime", realtime)
