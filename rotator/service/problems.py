"""Errors as RFC 9457 problem details: every refusal of the operators' API is one JSON object that says what to do."""

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from rotator.config import ConfigError
from rotator.ports import DeviceError, DeviceTimeout, EngineError, EngineTimeout, LaunchError, LedgerError, RotatorError
from rotator.ports_watchdog import BundleGone
from rotator.service.incidents import UnknownIncident
from rotator.service.operations import (
    CommandFailed,
    CommandRefused,
    CommandTimeout,
    ReservationConflict,
    ReservationWrong,
    ShuttingDown,
    UnknownEngine,
    UnknownGpu,
    UnknownReservation,
)

MEDIA_TYPE = "application/problem+json"
log = logging.getLogger(__name__)


class Problem(BaseModel):
    """RFC 9457. ``type`` names the kind of problem, ``detail`` this one; further members depend on the kind."""

    model_config = ConfigDict(extra="allow")

    type: str = Field(description="urn:rotator:problem:<kind>, or about:blank where the status says all")
    title: str
    status: int
    detail: str = Field(description="what happened and what to do")
    instance: str = Field(description="the path that was asked for")
    errors: list[str] = Field(default=[], description="one line each: place, what is wrong")
    close_names: list[str] = Field(default=[], description="known names near to an unknown one")


class ProblemError(Exception):
    """Raised by a route to answer with a problem."""

    def __init__(self, status: int, kind: str, title: str, detail: str, **members: Any) -> None:
        super().__init__(detail)
        self.status, self.kind, self.title, self.detail, self.members = status, kind, title, detail, members


# Most special first. A command that failed did so in an engine behind this service: 502, like a gateway.
_KINDS: tuple[tuple[type[Exception], int, str, str], ...] = (
    (UnknownEngine, 404, "unknown-engine", "No such engine"),
    (UnknownGpu, 404, "unknown-gpu", "No such GPU"),
    (UnknownReservation, 404, "unknown-reservation", "No such reservation"),
    (UnknownIncident, 404, "unknown-incident", "No such incident"),
    (BundleGone, 404, "no-bundle", "No such bundle"),
    (ReservationWrong, 422, "invalid", "The request is wrong"),
    (ReservationConflict, 409, "conflict", "It does not fit beside what is promised"),
    (ShuttingDown, 503, "shutting-down", "Shutting down"),
    (CommandRefused, 409, "refused", "Refused"),
    (CommandTimeout, 504, "timeout", "Not done by the deadline"),
    (CommandFailed, 502, "failed", "Failed"),
    (EngineTimeout, 504, "engine-timeout", "An engine did not answer in time"),
    (EngineError, 502, "engine-error", "An engine failed"),
    (LaunchError, 502, "launch-error", "An engine could not be launched"),
    (DeviceTimeout, 504, "device-timeout", "A GPU did not answer in time"),
    (DeviceError, 502, "device-error", "A GPU's reading failed"),
    (LedgerError, 503, "ledger-error", "The ledger cannot be used"),
    (RotatorError, 500, "error", "Failed"),
)


def as_problem(error: Exception) -> ProblemError:
    """The problem that an error of the tree in ``ports.py`` amounts to."""
    if isinstance(error, ProblemError):
        return error
    if isinstance(error, ConfigError):
        detail = "the configuration file cannot be used; nothing was changed"
        return ProblemError(422, "config", "The configuration file is wrong", detail, errors=error.problems)
    for kind, status, name, title in _KINDS:
        if isinstance(error, kind):
            return ProblemError(status, name, title, str(error) or title)
    return ProblemError(500, "internal", "Internal error", "a fault in the service: its log has the particulars")


def response(problem: ProblemError, instance: str) -> JSONResponse:
    members = {k: v for k, v in problem.members.items() if v}
    headers = {"WWW-Authenticate": "Bearer"} if problem.status == 401 else {}
    kind = f"urn:rotator:problem:{problem.kind}" if problem.kind else "about:blank"
    body = {"type": kind, "title": problem.title, "status": problem.status, "detail": problem.detail}
    return JSONResponse({**body, "instance": instance, **members}, problem.status, headers, MEDIA_TYPE)


def install(app: FastAPI) -> None:
    """Answer every error of ``app`` with a problem."""

    async def on_error(request: Request, error: Exception) -> Response:
        return response(as_problem(error), request.url.path)

    async def on_unforeseen(request: Request, error: Exception) -> Response:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return response(as_problem(error), request.url.path)

    async def on_invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)  # noqa: S101 - it is registered for nothing else
        return response(invalid([_line(e) for e in error.errors()]), request.url.path)

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)  # noqa: S101 - it is registered for nothing else
        answer = response(ProblemError(error.status_code, "", error.detail, _hint(error)), request.url.path)
        answer.headers.update(error.headers or {})
        return answer

    handlers: dict[type[Exception], Callable[[Request, Exception], Awaitable[Response]]] = {
        ProblemError: on_error,
        RotatorError: on_error,
        ConfigError: on_error,
        RequestValidationError: on_invalid,
        HTTPException: on_http,
        Exception: on_unforeseen,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)


def invalid(lines: list[str]) -> ProblemError:
    return ProblemError(422, "invalid", "The request is wrong", "; ".join(lines), errors=lines)


def _line(error: Mapping[str, Any]) -> str:
    """One field's problem: ``body.level: Input should be 1 or 2``."""
    place = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{place}: unknown field: remove it or check its spelling"
    if error["type"] == "json_invalid":
        return f"body: not valid JSON: {error.get('ctx', {}).get('error', error['msg'])}"
    return f"{place}: {error['msg'].removeprefix('Value error, ')}"


def _hint(error: HTTPException) -> str:
    if error.status_code == 404:
        return "nothing lives at this path: see /docs or /openapi.json"
    if error.status_code == 405:
        return "this path takes another method: see /docs or /openapi.json"
    return error.detail


_TITLES = {
    401: ("unauthorized", "A key is needed", "this service needs a key: send 'Authorization: Bearer <key>'"),
    403: ("forbidden", "Not allowed", "key 'ci' lacks scope 'operate': ask for one that has it"),
    404: ("unknown-engine", "No such engine", "there is no engine 'glm'; close: glm-5.1"),
    409: ("refused", "Refused", "glm-5.1 is pinned: unpin it first"),
    413: ("too-large", "Too large", "a body here has at most 65536 bytes"),
    415: ("media-type", "Not JSON", "send the body as JSON with 'content-type: application/json'"),
    421: ("wrong-host", "Wrong host", "host 'example.com' is not this service: add it to bind.hosts if it should be"),
    422: ("invalid", "The request is wrong", "body.level: Input should be 1 or 2"),
    500: ("internal", "Internal error", "a fault in the service: its log has the particulars"),
    502: ("failed", "Failed", "glm-5.1 did not wake: rank 2 ran out of memory; it is being restarted"),
    503: ("not-ready", "Not ready", "the ledger cannot be written: no space left on device"),
    504: ("timeout", "Not done by the deadline", "glm-5.1 is still waking after 60 s; it goes on"),
}


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's description of these problems, each with an example. Refusals by key or host come with every route."""
    return {status: _described(status) for status in sorted({401, 403, 421, 422, 500, *statuses})}


def _described(status: int) -> dict[str, Any]:
    kind, title, detail = _TITLES[status]
    example = {
        "type": f"urn:rotator:problem:{kind}",
        "title": title,
        "status": status,
        "detail": detail,
        "instance": "/wake",
    }
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}, "example": example}}
    return {"description": title, "content": content}
