"""What the gateway itself says to clients: errors in the shape that their library understands, and small answers."""

import math
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

import orjson

from rotator.ports import RotatorError
from rotator.service.routes import Dialect
from rotator.service.traffic import Cut, EngineUnavailable, QueueFull, WaitExpired

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Header = tuple[bytes, bytes]

_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


@dataclass(eq=False)
class ApiError(RotatorError):
    """A request that gets an error from us, not from an engine. ``eta_s`` and ``retry_after_s`` become headers."""

    status: int
    message: str
    code: str
    type: str = "invalid_request_error"
    param: str | None = None
    retry_after_s: float | None = None
    eta_s: float | None = None
    allow: tuple[str, ...] = ()
    closes: bool = False  # what remains of the request was not read: the connection cannot go on

    def __str__(self) -> str:
        return self.message

    def headers(self) -> list[Header]:
        headers: list[Header] = []
        if self.retry_after_s is not None:
            headers.append((b"retry-after", b"%d" % max(1, math.ceil(self.retry_after_s))))
        if self.eta_s is not None:
            headers.append((b"x-rotator-eta-s", b"%.1f" % self.eta_s))
        if self.allow:
            headers.append((b"allow", ", ".join(self.allow).encode()))
        if self.closes:
            headers.append((b"connection", b"close"))
        return headers


def server_error(status: int, message: str, code: str, retry_after_s: float | None = None) -> ApiError:
    return ApiError(status, message, code, "server_error", retry_after_s=retry_after_s)


def refusal(error: QueueFull | WaitExpired | EngineUnavailable | Cut) -> ApiError:
    """What a client hears when its model cannot be had."""
    match error:
        case QueueFull():
            after_s = error.retry_after_s
            return ApiError(429, str(error), "queue_full", "rate_limit_error", retry_after_s=after_s, eta_s=after_s)
        case WaitExpired():
            said = server_error(503, str(error), "wait_expired", 1.0 if error.eta_s is None else error.eta_s)
            said.eta_s = error.eta_s
            return said
        case EngineUnavailable():
            return server_error(503, error.reason, "engine_unavailable", error.retry_after_s)
        case Cut():
            return server_error(503, f"the request was aborted: {error}", "aborted")


def error_body(error: ApiError, dialect: Dialect) -> dict[str, Any]:
    if dialect is Dialect.ANTHROPIC:
        kind = _ANTHROPIC_TYPES.get(error.status, "api_error")
        return {"type": "error", "error": {"type": kind, "message": error.message, "code": error.code}}
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def error_event(error: ApiError, dialect: Dialect) -> bytes:
    """The error as one whole SSE event."""
    body = error_body(error, dialect)
    if dialect is Dialect.RESPONSES:
        body = {"type": "error", "code": error.code, "message": error.message, "param": error.param, **body}
    name = b"event: error\n" if dialect in (Dialect.RESPONSES, Dialect.ANTHROPIC) else b""
    return name + b"data: " + orjson.dumps(body) + b"\n\n"


def foreign_error_event(status: int, body: bytes, dialect: Dialect) -> bytes:
    """An engine's own error answer, for a stream that has begun: kept as it is where it is JSON with an ``error``."""
    try:
        said = orjson.loads(body)
    except orjson.JSONDecodeError:
        said = None
    if isinstance(said, dict) and isinstance(said.get("error"), dict):
        return b"data: " + orjson.dumps(said) + b"\n\n"
    text = said.get("message") if isinstance(said, dict) else body[:500].decode("utf-8", "replace")
    return error_event(server_error(status, f"the engine answered {status}: {text}", "engine_error"), dialect)


async def send_json(send: Send, status: int, body: Any, headers: list[Header]) -> None:
    data = orjson.dumps(body)
    plain = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(data))]
    await send({"type": "http.response.start", "status": status, "headers": plain + headers})
    await send({"type": "http.response.body", "body": data})


def comment(text: str) -> bytes:
    """An SSE comment. It is no event: clients skip it."""
    return f": {text}\n\n".encode()


def reasoning_chunk(request_id: str, model: str, text: str) -> bytes:
    """A chat chunk whose delta is a thought, so that chat windows show it apart from the answer."""
    choice = {"index": 0, "delta": {"role": "assistant", "reasoning_content": text}, "finish_reason": None}
    chunk = {
        "id": f"chatcmpl-{request_id}",
        "object": "chat.completion.chunk",
        "created": int(time.time()),
        "model": model,
        "choices": [choice],
    }
    return b"data: " + orjson.dumps(chunk) + b"\n\n"
