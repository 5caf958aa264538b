"""What the stub's routes share: error bodies, reading a request, streams of SSE."""

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from rotator.demo import tokens
from rotator.demo.core import Core
from rotator.demo.sequences import BadArgument, CoreError, Finish, Sampling, Step, Stream

MAX_TOKENS_DEFAULT = 256


@dataclass(frozen=True, slots=True)
class Served:
    """What the engine says it is."""

    core: Core
    models: tuple[str, ...]
    task: str = "generate"  # generate, chat (no /v1/completions), embed, score
    max_model_len: int = 32_768
    dimensions: int = 128


SERVED: web.AppKey[Served] = web.AppKey("served", Served)


def served(request: web.Request) -> Served:
    return request.app[SERVED]


def json_response(value: Any, status: int = 200) -> web.Response:
    # The standard library's dumps, which writes a NaN as NaN: that is what an engine does whose state is garbage.
    return web.Response(text=json.dumps(value), status=status, content_type="application/json")


def error(status: int, kind: str, message: str) -> web.Response:
    return json_response({"error": {"message": message, "type": kind, "param": None, "code": status}}, status)


def bad_request(message: str) -> web.Response:
    return error(400, "BadRequestError", message)


class Refused(Exception):
    """A request that is answered with this response."""

    def __init__(self, response: web.StreamResponse) -> None:
        super().__init__(response.status)
        self.response = response


@web.middleware
async def errors_as_json(request: web.Request, handler: Any) -> web.StreamResponse:
    try:
        response: web.StreamResponse = await handler(request)
    except Refused as e:
        return e.response
    except BadArgument as e:
        return bad_request(str(e))
    except CoreError as e:
        return error(500, "InternalServerError", str(e))
    except web.HTTPException as e:
        return json_response({"detail": e.reason}, e.status)
    return response


def only_with(key: str) -> Any:
    """As vLLM does with an API key: all below /v1 asks for it, and nothing else."""

    @web.middleware
    async def check(request: web.Request, handler: Any) -> web.StreamResponse:
        shown = request.headers.get("Authorization", "")
        if key and request.path.startswith("/v1") and shown != f"Bearer {key}":
            return json_response({"error": "Unauthorized"}, 401)
        response: web.StreamResponse = await handler(request)
        return response

    return check


async def read_body(request: web.Request) -> dict[str, Any]:
    """The JSON body, checked for a model that is served. Raises Refused."""
    try:
        body = json.loads(await request.read())
    except ValueError:
        raise Refused(bad_request("the body is not valid JSON")) from None
    if not isinstance(body, dict):
        raise Refused(bad_request("the body is not a JSON object"))
    check_model(request, body.get("model"))
    return body


def check_model(request: web.Request, model: Any) -> None:
    if model is not None and model not in served(request).models:
        raise Refused(error(404, "NotFoundError", f"The model `{model}` does not exist."))


def sampling_of(body: Mapping[str, Any], *, default_max: int) -> Sampling:
    """Sampling parameters of a request. Raises Refused."""
    names = ("max_completion_tokens", "max_tokens", "max_output_tokens")
    found = next((body[name] for name in names if body.get(name) is not None), default_max)
    temperature, seed = body.get("temperature"), body.get("seed")
    if not isinstance(found, int) or found < 1:
        raise Refused(bad_request(f"max_tokens must be at least 1, got {found}."))
    if not isinstance(temperature, int | float | None) or not isinstance(seed, int | None):
        raise Refused(bad_request("temperature must be a number and seed an integer"))
    return Sampling(
        max_tokens=found,
        temperature=1.0 if temperature is None else float(temperature),
        seed=None if seed is None else int(seed),
        ignore_eos=bool(body.get("ignore_eos", False)),
    )


def submit(request: web.Request, prompt: str | list[int], sampling: Sampling) -> Stream:
    """Tokenize, check the length, queue. Raises Refused, CoreError."""
    ids = prompt if isinstance(prompt, list) else tokens.tokenize(prompt)
    limit = served(request).max_model_len
    if len(ids) + sampling.max_tokens > limit:
        message = (
            f"This model's maximum context length is {limit} tokens, but {len(ids)} + {sampling.max_tokens} are asked"
        )
        raise Refused(bad_request(message))
    return served(request).core.submit(ids, sampling)


async def steps(request: web.Request, stream: Stream) -> AsyncIterator[Step | Finish]:
    """Every token and then the Finish. A client that leaves takes its sequence with it."""
    core = served(request).core
    try:
        await core.reachable()
        while True:
            item = await stream.out.get()
            if isinstance(item, Finish) and item.reason == "error":
                raise CoreError("EngineCore encountered an issue and is dead")
            yield item
            if isinstance(item, Finish):
                return
    finally:
        core.drop(stream)


async def collect(request: web.Request, stream: Stream) -> tuple[list[Step], str]:
    """The whole answer and how it ended."""
    produced: list[Step] = []
    async for item in steps(request, stream):
        if isinstance(item, Finish):
            return produced, item.reason
        produced.append(item)
    return produced, "abort"


def text_of(produced: Sequence[Step]) -> str:
    return "".join(tokens.token_text(step.token_id) for step in produced)


def usage_of(stream: Stream) -> dict[str, int]:
    prompt, completion = len(stream.prompt_ids), len(stream.produced)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


class EventStream:
    """Server-sent events, with the ways in which an engine's stream breaks."""

    def __init__(self, request: web.Request) -> None:
        self._request = request
        self._tokens = 0
        self._response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}
        )

    async def open(self) -> None:
        await self._response.prepare(self._request)

    async def send(self, value: Any, *, event: str = "") -> None:
        head = f"event: {event}\n" if event else ""
        await self._response.write(f"{head}data: {json.dumps(value)}\n\n".encode())

    async def sent_token(self) -> None:
        """One more token is out: die or cut the connection here, if told to."""
        self._tokens += 1
        core = served(self._request).core
        misbehaviour = core.misbehaviour
        if self._tokens >= misbehaviour.die_after_tokens and misbehaviour.die("stream"):
            core.exit(misbehaviour.exit_code)
        cut = misbehaviour.cut_stream_after
        if cut is not None and self._tokens >= cut and misbehaviour.take("cut_stream_after"):
            transport = self._request.transport
            if transport is not None:
                transport.abort()
            raise ConnectionResetError("cut, as told")

    async def follow(self, stream: Stream) -> AsyncIterator[Step | Finish]:
        """Every token and the Finish. A core that fails under a stream ends it as vLLM does: with an error among the
        data, then normally."""
        try:
            async for item in steps(self._request, stream):
                yield item
        except CoreError as e:
            reason = {"message": str(e), "type": "InternalServerError", "param": None, "code": 500}
            await self.send({"error": reason})
            raise Refused(await self.done()) from None

    async def done(self, *, marker: bool = True) -> web.StreamResponse:
        if marker:
            await self._response.write(b"data: [DONE]\n\n")
        await self._response.write_eof()
        return self._response
