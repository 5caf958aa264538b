"""One kept HTTP/1.1 connection to an engine: a request out, its answer in, as bytes.

httptools parses; what is ours is only what lies between its callbacks and a reader: a bounded buffer, and the certainty
that an answer which broke off is told from one that ended. Nothing here sends a request a second time.
"""

import asyncio
from collections.abc import Callable
from typing import Any, Protocol, cast

import httptools

from rotator.ports import RotatorError

BUFFER_BYTES_MAX = 128 << 10  # an engine that is ahead of its client by this is not read from
HEADER_BYTES_MAX = 256 << 10

Header = tuple[bytes, bytes]


class Lost(RotatorError):
    """The connection broke after the request may have reached the engine: it must not be sent again."""


class Answer(Protocol):
    """What an engine (or an endpoint outside) answers. ``headers`` have lower-case names."""

    status: int
    headers: list[Header]
    kind: str  # its content type, lower-case
    encoded: bool  # compressed, so that nobody here can read it
    length: int | None  # of its body, where the head says it

    async def readany(self) -> bytes:
        """What has arrived, at least one byte; empty at the end. Raises Lost where it broke off. May be cancelled and
        called again."""
        ...

    async def read(self) -> bytes:
        """All of it."""
        ...

    def close(self) -> None:
        """Give up what has not been read: the engine sees its connection close."""
        ...


class EngineAnswer:
    """An answer as it arrives over a channel."""

    __slots__ = (
        "_channel",
        "_chunks",
        "_ended",
        "_error",
        "_paused",
        "_size",
        "_waiter",
        "encoded",
        "headers",
        "kind",
        "length",
        "status",
    )  # fmt: skip

    def __init__(self, channel: "Channel", status: int, headers: list[Header]) -> None:
        self.status = status
        self.headers = headers
        self.kind = ""
        self.encoded = False
        self.length: int | None = None
        self._channel: Channel | None = channel
        self._chunks: list[bytes] = []
        self._size = 0
        self._ended = False
        self._paused = False
        self._error: Lost | None = None
        self._waiter: asyncio.Future[None] | None = None
        for name, value in headers:
            if name == b"content-type":
                self.kind = value.decode("latin-1").lower()
            elif name == b"content-length":
                self.length = int(value)
            elif name == b"content-encoding":
                self.encoded = value.lower() != b"identity"

    async def readany(self) -> bytes:
        while not self._chunks:
            if self._error is not None:
                raise self._error
            if self._ended:
                return b""
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        data = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks.clear()
        self._size = 0
        if self._paused and self._channel is not None:
            self._paused = False
            self._channel.transport.resume_reading()
        return data

    async def read(self) -> bytes:
        parts = []
        while chunk := await self.readany():
            parts.append(chunk)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        if self._channel is not None:
            self._channel.transport.abort()

    # -- from the channel --------------------------------------------------------------------------------------------

    def feed(self, data: bytes) -> None:
        self._chunks.append(data)
        self._size += len(data)
        if self._size > BUFFER_BYTES_MAX and not self._paused and self._channel is not None:
            self._paused = True
            self._channel.transport.pause_reading()
        self._wake()

    def end(self, error: Lost | None) -> None:
        """No more comes: it is whole, or it broke off with ``error``."""
        if self._paused and error is None and self._channel is not None:
            self._channel.transport.resume_reading()
        self._channel = None
        self._ended = True
        self._error = error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Channel(asyncio.Protocol):
    """``on_idle(channel)`` is called when an answer is whole and the connection can carry another request."""

    def __init__(self, on_idle: "Callable[[Channel], None]") -> None:
        self.idle_since_s = 0.0
        self.transport: asyncio.Transport
        self._on_idle = on_idle
        self._parser: Any = httptools.HttpResponseParser(self)
        self._head: asyncio.Future[EngineAnswer] | None = None
        self._answer: EngineAnswer | None = None
        self._headers: list[Header] = []
        self._header_bytes = 0
        self._until_close = False
        self._keep = False

    @property
    def usable(self) -> bool:
        return not self.transport.is_closing()

    async def ask(self, head: bytes, body: bytes) -> EngineAnswer:
        """Send a request and return its answer's head. Raises Lost. Cancelling closes the connection at once."""
        answered: asyncio.Future[EngineAnswer] = asyncio.get_running_loop().create_future()
        self._head = answered
        if len(body) < BUFFER_BYTES_MAX:
            self.transport.write(head + body)
        else:
            self.transport.writelines((head, body))
        try:
            return await answered
        except BaseException:
            if self._head is answered:
                self.transport.abort()
            elif answered.done() and not answered.cancelled() and answered.exception() is None:
                answered.result().close()  # the channel may carry another's request by now: only ours is given up
            raise

    # -- from the event loop -----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is none by class

    def data_received(self, data: bytes) -> None:
        if self._head is None and self._answer is None:
            self.transport.abort()  # nobody asked: what it says now must not answer the next request
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade, ValueError) as e:
            self._broke(f"it answered something that is no HTTP ({type(e).__name__})")
            self.transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        if self._answer is not None and self._until_close and error is None:
            self._answer.end(None)
            self._answer = None
        else:
            self._broke("it closed the connection")

    def _broke(self, reason: str) -> None:
        if self._answer is not None:
            self._answer.end(Lost(f"{reason} in the middle of its answer"))
            self._answer = None
        elif self._head is not None:
            head, self._head = self._head, None
            if not head.done():
                head.set_exception(Lost(f"{reason} without an answer"))

    # -- from the parser ---------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._headers = []
        self._header_bytes = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        self._header_bytes += len(name) + len(value)
        if self._header_bytes > HEADER_BYTES_MAX:
            raise ValueError("headers too large")
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        head = self._head
        if status < 200 or head is None or head.done():
            return  # an interim answer: the real one follows; or one that nobody waits for
        answer = EngineAnswer(self, status, self._headers)
        self._keep = self._parser.should_keep_alive()
        framed = answer.length is not None or status in (204, 304)
        self._until_close = not framed and all(name != b"transfer-encoding" for name, _ in self._headers)
        self._answer, self._head = answer, None
        head.set_result(answer)

    def on_body(self, data: bytes) -> None:
        if self._answer is not None:
            self._answer.feed(data)

    def on_message_complete(self) -> None:
        answer, self._answer = self._answer, None
        if answer is None:
            return
        answer.end(None)
        if self._keep:
            self._on_idle(self)
        else:
            self.transport.close()
