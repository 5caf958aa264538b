"""What stands before every operators' route: foreign pages and odd bodies are refused, scopes are asked for."""

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rotator.service import api_docs, problems
from rotator.service.keys import Authorize, Denial, Guard
from rotator.service.keys import Scope as KeyScope
from rotator.service.problems import ProblemError

BODY_MAX_BYTES = 64 * 1024
_BEARER = HTTPBearer(
    auto_error=False,
    description="A key of the configuration file. Scopes: infer < operate < admin. Without configured keys the service "
    "listens on loopback only and trusts who reaches it there.",
)


_READS = ("GET", "HEAD", "OPTIONS")
# For browsers: an answer is neither a page nor a script, belongs to nobody's frame and tells no other site of itself.
HEADERS = (
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
_DOCS = ((b"content-security-policy", api_docs.POLICY), *HEADERS[1:])


class Gate:
    """ASGI middleware. A JSON body needs a preflight that a foreign page does not get; a form would not. Every answer
    carries what browsers are to do with it."""

    def __init__(self, app: ASGIApp, guard: Guard | None) -> None:
        self._app = app
        self._guard = guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        guarded = _with_headers(send, _DOCS if scope["path"].startswith("/docs") else HEADERS)
        refused = self._refusal(scope)
        if refused is None:
            await self._app(scope, receive, guarded)
        else:
            await problems.response(refused, scope["path"])(scope, receive, guarded)

    def _refusal(self, scope: Scope) -> ProblemError | None:
        headers = Headers(scope=scope)
        denial = self._guard(scope["method"], headers) if self._guard else None
        if denial is not None:
            return denied(denial)
        if scope["method"] in _READS:
            return None
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            return denied(Denial("a page of another site may change nothing here", 403))
        return _body_refusal(headers)


def _with_headers(send: Send, more: Sequence[tuple[bytes, bytes]]) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), *more]
        await send(message)

    return sending


def _body_refusal(headers: Headers) -> ProblemError | None:
    length = headers.get("content-length", "0")
    if "transfer-encoding" in headers:
        return ProblemError(411, "length", "Length required", "send the body with a content-length")
    if not length.isdecimal() or int(length) > BODY_MAX_BYTES:
        return ProblemError(413, "too-large", "Too large", f"a body here has at most {BODY_MAX_BYTES} bytes")
    media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if int(length) and media_type != "application/json":
        detail = "send the body as JSON with 'content-type: application/json'"
        return ProblemError(415, "media-type", "Not JSON", detail)
    return None


def denied(denial: Denial) -> ProblemError:
    kind, title = {
        401: ("unauthorized", "A key is needed"),
        421: ("wrong-host", "Wrong host"),
    }.get(denial.status, ("forbidden", "Not allowed"))
    return ProblemError(denial.status, kind, title, str(denial))


class Need:
    """Makes the dependency that asks for a scope: ``dependencies=[need("operate")]``."""

    def __init__(self, authorize: Authorize) -> None:
        self._authorize = authorize

    def __call__(self, scope: KeyScope) -> Any:
        return Security(self._checker(scope), scopes=[scope])

    def check(self, request: Request, scope: KeyScope) -> None:
        """Raises ProblemError where the request's key lacks the scope."""
        denial = self._authorize(request.headers, scope)
        if denial is not None:
            raise denied(denial)

    async def while_allowed(
        self, request: Request, scope: KeyScope, chunks: AsyncGenerator[bytes]
    ) -> AsyncGenerator[bytes]:
        """A stream that may last for ever, for as long as its key is good; looked at with each piece."""
        async with aclosing(chunks):
            async for chunk in chunks:
                if self._authorize(request.headers, scope) is not None:
                    return
                yield chunk

    def _checker(self, scope: KeyScope) -> Callable[..., Awaitable[None]]:
        async def has_scope(
            request: Request, _: Annotated[HTTPAuthorizationCredentials | None, Security(_BEARER)]
        ) -> None:
            self.check(request, scope)

        return has_scope
