"""One request and its answer, as the parts of the gateway hand it on: what was asked, and how far the answer is."""

import asyncio
import math
from collections.abc import Iterable
from urllib.parse import parse_qsl, urlencode

from rotator.service.bodies import Bodies
from rotator.service.responses import ApiError, Header, Receive, Scope, Send, error_body, error_event, send_json
from rotator.service.rewrite import Events
from rotator.service.routes import Dialect, Route
from rotator.service.tracing import RequestTrace
from rotator.service.traffic import Ticket
from rotator.service.watch import Watch

LAST_WORD_S = 5.0  # how long a client may take to read why its stream breaks

_HOP = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade")
)
# Ours to know, ours to set, or not meant for engines: our keys are no engine's business.
_NOT_SENT = _HOP | {b"host", b"content-length", b"expect", b"authorization", b"proxy-authorization", b"x-api-key"}
# uvicorn writes its own date and server.
_NOT_RETURNED = _HOP | {b"date", b"server", b"content-length", b"proxy-authenticate"}
_PREFIX = b"x-rotator-"
_USUAL = frozenset((b"close", b"keep-alive"))  # what connection says when it names no header
_NOTICES = "x-rotator-notices"


class ClientGone(Exception):
    """The client left while it was sending its request."""


class Head:
    """A request's headers: those for the engine, and those for us."""

    __slots__ = ("content_length", "content_type", "deadline_s", "forward", "notices", "query")

    def __init__(self, headers: Iterable[Header], query: bytes) -> None:
        self.forward: list[Header] = []
        self.content_type = ""
        self.content_length: int | None = None
        self.deadline_s: float | None = None
        self.notices: str | None = None
        self.query = query
        named: set[bytes] = set()
        for name, value in headers:
            if name in _NOT_SENT:
                if name == b"content-length":
                    self.content_length = int(value)
                elif name == b"connection":
                    named |= {word.strip() for word in value.lower().split(b",")}
            elif name.startswith(_PREFIX):
                self._ours(name, value.decode("latin-1"))
            else:
                self.forward.append((name, value))
                if name == b"content-type":
                    self.content_type = value.decode("latin-1")
        if not named <= _USUAL:
            self.drop(*named)
        if _PREFIX in query:
            self._read_query(query)

    def drop(self, *names: bytes) -> None:
        self.forward = [header for header in self.forward if header[0] not in names]

    def _ours(self, name: bytes, value: str) -> None:
        if name == b"x-rotator-deadline-s":
            self.deadline_s = _seconds(value)
        elif name == _NOTICES.encode():
            self.notices = _notices(value)

    def _read_query(self, query: bytes) -> None:
        pairs = parse_qsl(query.decode("latin-1"), keep_blank_values=True)
        for name, value in pairs:
            if name == _NOTICES:
                self.notices = _notices(value)
        self.query = urlencode([pair for pair in pairs if not pair[0].startswith(_PREFIX.decode())]).encode()


class Exchange:
    """``clean`` is whether a failure may still end the answer as whole: while only our own notices were written."""

    __slots__ = ("_bodies", "_held_bytes", "_receive", "_send", "clean", "client", "dialect", "eta_s", "events",
                 "fallback", "head", "id", "method", "route", "started", "status", "trace", "watch")  # fmt: skip

    head: Head  # set first of all, but where its own error can be told
    route: Route

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, dialect: Dialect, bodies: Bodies | None = None
    ) -> None:
        self._bodies = bodies
        self._held_bytes = 0
        self.method: str = scope["method"]
        self.dialect = dialect
        self.id = ""
        self.client = ""  # whose request it is, where keys tell
        self.watch = Watch(receive)
        self.started = False
        self.status = 0  # of the answer, once it has one
        self.trace: RequestTrace | None = None
        self.clean = False
        self.events: Events | None = None  # set once the answer is a stream of events
        self.eta_s: float | None = None  # what was expected when it began to wait
        self.fallback: str | None = None
        self._receive = receive
        self._send = send

    async def body(self, bytes_max: int) -> bytes:
        """The whole request body. Raises ApiError (413, 503) and ClientGone. What comes in one piece is small."""
        if (self.head.content_length or 0) > bytes_max:
            raise _too_large(bytes_max)
        message = await self._receive()
        if message["type"] == "http.request" and not message.get("more_body"):
            first: bytes = message.get("body", b"")
            if len(first) > bytes_max:
                raise _too_large(bytes_max)
            return first
        parts, size = [], 0
        while message["type"] == "http.request":
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > bytes_max:
                raise _too_large(bytes_max)
            if self._bodies is not None:
                self._bodies.hold(len(parts[-1]))
                self._held_bytes = size
            if not message.get("more_body"):
                return b"".join(parts)
            message = await self._receive()
        raise ClientGone

    def log_fields(self) -> dict[str, str]:
        """What a line of the log that is written for this request says of it."""
        fields = {"request_id": self.id} if self.id else {}
        return fields if self.trace is None else {**fields, "trace_id": self.trace.trace_id}

    def forget_body(self) -> None:
        """The request is over: its body no longer counts."""
        if self._bodies is not None and self._held_bytes:
            self._bodies.let_go(self._held_bytes)
            self._held_bytes = 0

    def tags(self, engine: str, ticket: Ticket | None) -> list[Header]:
        """The headers that say what happened to the request here."""
        waited_s = ticket.waited_s if ticket is not None else 0.0
        tags = [
            (b"x-rotator-engine", engine.encode("ascii", "replace")),
            (b"x-rotator-request-id", (self.id or (ticket.id if ticket is not None else "")).encode()),
            (b"x-rotator-waited-ms", b"%d" % (waited_s * 1000)),
        ]
        if self.eta_s is not None:
            tags.append((b"x-rotator-eta-s", b"%.1f" % self.eta_s))
        if self.fallback is not None:
            tags.append((b"x-rotator-fallback", self.fallback.encode("ascii", "replace")))
        return tags

    async def start(self, status: int, headers: list[Header]) -> None:
        self.started = True
        self.status = status
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def write(self, data: bytes) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self, data: bytes = b"") -> None:
        await self._send({"type": "http.response.body", "body": data})

    async def fail(self, error: ApiError) -> None:
        """Say why, as far as the answer still lets us. An answer that had begun is left without its end: the server
        then drops the connection, and no client takes it for whole."""
        if not self.started:
            headers = error.headers()
            if self.id:
                headers.append((b"x-rotator-request-id", self.id.encode()))
            self.started = True
            self.status = error.status
            await send_json(self._send, error.status, error_body(error, self.dialect), headers)
        elif self.clean:
            await self.end(error_event(error, self.dialect))
        elif self.events is not None and self.events.whole:
            try:
                async with asyncio.timeout(LAST_WORD_S):
                    await self.write(error_event(error, self.dialect))
            except TimeoutError:
                return  # it does not read: the broken connection says enough


def answer_headers(raw: Iterable[Header], *, length: int | None) -> list[Header]:
    """An engine's headers (lower-case names) for the client. ``length`` is that of the body we send, where known."""
    kept, named = [], b""
    for header in raw:
        name = header[0]
        if name == b"connection":
            named = header[1].lower()
        if name not in _NOT_RETURNED and not name.startswith(_PREFIX):
            kept.append(header)
    if named and named not in _USUAL:
        words = {word.strip() for word in named.split(b",")}
        kept = [header for header in kept if header[0] not in words]
    if length is not None:
        kept.append((b"content-length", b"%d" % length))
    return kept


def _too_large(bytes_max: int) -> ApiError:
    return ApiError(413, f"the request body is larger than {bytes_max} bytes: send less", "body_too_large", closes=True)


def _seconds(value: str) -> float:
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ApiError(400, "x-rotator-deadline-s must be a positive number of seconds", "invalid_header")
    return seconds


def _notices(value: str) -> str | None:
    if value not in ("comments", "reasoning", "none"):
        raise ApiError(400, f"{_NOTICES} must be 'comments', 'reasoning' or 'none'", "invalid_header")
    return None if value == "none" else value


def plain_dialect(raw_path: bytes) -> Dialect:
    """Whose errors a path's clients understand, also where it is no route."""
    return Dialect.ANTHROPIC if raw_path.startswith(b"/v1/messages") else Dialect.OPENAI
