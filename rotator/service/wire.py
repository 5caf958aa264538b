"""uvicorn's connection, bounded in what it may take, and with an answer's head and the body that follows it at once
sent as one piece.

uvicorn writes them apart, and the event loop sends each write at once: two system calls, and two wake-ups of the
client, for every small answer. What comes later, a stream's events, is written as it comes.
"""

import asyncio
from collections.abc import Callable
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from rotator.config import HttpConfig
from rotator.service.wire_guard import EXCESS_BYTES_MAX, LINGER_S, Alarm, HeadCheck, Places, Refused, answer, too_large


class Corked:
    """A transport that keeps an answer's head for what follows it in the same turn; else it is sent at the turn's end.
    Whatever this is not told to do itself the real transport does. ``lingers`` is asked when it is to be closed:
    whether somebody else will, when the client has stopped sending."""

    __slots__ = ("_closed", "_head", "_lingers", "_loop", "real")

    def __init__(
        self, real: asyncio.Transport, loop: asyncio.AbstractEventLoop, lingers: Callable[[], bool] = lambda: False
    ) -> None:
        self.real = real
        self._loop = loop
        self._lingers = lingers
        self._head = b""
        self._closed = False

    def write(self, data: bytes) -> None:
        if self._head:
            data, self._head = self._head + data, b""
        elif data.startswith(b"HTTP/1.1 "):
            self._head = data
            self._loop.call_soon(self._flush)
            return
        self.real.write(data)

    def is_closing(self) -> bool:
        return self._closed or self.real.is_closing()

    def close(self) -> None:
        self._flush()
        if not self._closed and not self.real.is_closing() and self._lingers():
            self._closed = True
        elif not self._closed:
            self.real.close()

    def abort(self) -> None:
        self._head = b""
        self.real.abort()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def _flush(self) -> None:
        head, self._head = self._head, b""
        if head and not self.real.is_closing():  # a client that left meanwhile needs no answer
            self.real.write(head)


class CorkedProtocol(HttpToolsProtocol):
    """To be given to uvicorn as ``http``; ``bounded`` makes one with other bounds."""

    places = Places(HttpConfig())  # of servers that were given no bounds

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._bounds = self.places.config
        self._check = HeadCheck(self._bounds)
        self._refused: Refused | None = None
        self._deaf = False  # nothing more is read from it
        self._place: str | None = None
        self._stage = ""  # "head" and "body" while that is awaited
        self._whole = 0  # requests that came to their end
        self._fresh = False  # its head began in the piece at hand
        self._head_bytes = self._body_bytes = self._excess_bytes = 0
        self._body_since_s = 0.0
        self._late = Alarm(self.loop, self._on_late)
        self._stall = Alarm(self.loop, self._abort)

    # -- the connection ----------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as in uvicorn itself
        super().connection_made(cast("asyncio.Transport", Corked(transport, self.loop, self._lingers)))
        address = self.client[0] if self.client else ""
        full = self.places.take(address)
        if full is not None:
            self._refuse(Refused(503, full))
            return
        self._place = address
        self._late.set(self._bounds.head_deadline_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._late.clear()
        self._stall.clear()
        self._leave()
        super().connection_lost(exc)

    def _leave(self) -> None:
        if self._place is not None:
            self.places.give_back(self._place)
            self._place = None

    def handle_websocket_upgrade(self) -> None:
        real = cast("Corked", self.transport).real
        self._late.clear()
        self.transport = real  # the socket's own protocol takes it from here
        super().handle_websocket_upgrade()
        socket = cast("asyncio.Protocol", real.get_protocol())
        lost = socket.connection_lost

        def on_lost(error: Exception | None) -> None:
            self._leave()
            lost(error)

        socket.connection_lost = on_lost  # type: ignore[method-assign, assignment] # its place is free when it has gone
        if real.is_closing():
            self._leave()

    def _abort(self) -> None:
        self.transport.abort()

    # -- what comes --------------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        before = self._whole
        super().data_received(data)
        if self._deaf or self.transport.is_closing():
            return
        if self._stage == "head" and not self._fresh:
            self._head_bytes += len(data)
            if self._head_bytes > self._bounds.head_bytes_max:
                self._refuse(too_large(self._bounds))
                return
        self._fresh = False
        if self._stage or self._whole == before:
            if not self._late.is_set:
                deadline_s = self._bounds.body_deadline_s if self._stage == "body" else self._bounds.head_deadline_s
                self._late.set(deadline_s)
        else:
            self._late.clear()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._check.begin()
        self._stage, self._fresh, self._head_bytes = "head", True, 0
        self._late.clear()

    def on_url(self, url: bytes) -> None:
        self._judge(lambda: self._check.url(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        try:
            self._check.header(name, value)
        except Refused as e:
            self._refused = e
            raise
        if name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        self._judge(lambda: self._check.end(self.parser.get_http_version()))
        if self._deaf:
            raise Refused(400, "this connection has ended")
        self._stage, self._body_bytes, self._excess_bytes = "body", 0, 0
        self._body_since_s = self.loop.time()
        self._late.clear()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        if self.cycle is not None and self.cycle.response_complete:
            self._excess_bytes += len(body)
            if self._excess_bytes > EXCESS_BYTES_MAX:
                self.transport.close()
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._stage = ""
        self._whole += 1
        super().on_message_complete()

    def _judge(self, check: Callable[[], None]) -> None:
        try:
            check()
        except Refused as e:
            self._refused = e  # the parser tells only that its callback failed
            raise

    def _unsupported_upgrade_warning(self) -> None:
        """Answered as if nothing had been said of an upgrade, and then closed: what follows may be anything."""
        self._deaf = True
        if self.cycle is not None:
            self.cycle.keep_alive = False

    # -- refusing ----------------------------------------------------------------------------------------------------

    def send_400_response(self, msg: str) -> None:
        if self._deaf:
            return
        self._refuse(self._refused or Refused(400, "this is no HTTP/1.1 request"))

    def _refuse(self, refused: Refused) -> None:
        """Say why and end the connection; without a word where that would come in the middle of an answer."""
        answering = self.cycle is not None and not self.cycle.response_complete
        its_own = self._stage == "body" and answering and not self.cycle.response_started
        silent = bool(self.pipeline) or (answering and not its_own)
        self._refused = refused
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.pipeline.clear()
        if silent:
            self._deaf = True
            self.transport.abort()
            return
        self.transport.write(answer(refused))
        self.transport.close()

    def _lingers(self) -> bool:
        """Whether the client is still sending: then the answer goes first, and the connection a little later."""
        if self._stage == "" and self._refused is None:
            return False
        return self._linger()

    def _linger(self) -> bool:
        real = cast("Corked", self.transport).real
        self._deaf, self._stage = True, ""
        if real.can_write_eof():
            real.write_eof()
        self.flow.resume_reading()
        self._late.clear()
        self.loop.call_later(LINGER_S, real.close)
        return True

    def _on_late(self) -> None:
        if self.flow.read_paused:  # it is us who do not read
            self._late.set(self._bounds.head_deadline_s)
        elif self._stage == "body":
            self._on_late_body()
        elif self._stage == "head":
            self._refuse(Refused(408, f"no whole head within {self._bounds.head_deadline_s:g} s"))
        elif self.cycle is None or self.cycle.response_complete:  # it said nothing, or empty lines
            self._deaf = True
            self.transport.close()

    def _on_late_body(self) -> None:
        bounds = self._bounds
        allowed_s = bounds.body_deadline_s + self._body_bytes / bounds.body_bytes_per_s_min
        left_s = self._body_since_s + allowed_s - self.loop.time()
        if left_s > 0:
            self._late.set(left_s)
        else:
            self._refuse(Refused(408, f"no whole body within {allowed_s:.0f} s"))

    # -- what goes ---------------------------------------------------------------------------------------------------

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall.set(self._bounds.write_stall_s)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stall.clear()


def bounded(config: HttpConfig) -> type[CorkedProtocol]:
    """The protocol with these bounds, its connections counted together."""
    return type("BoundedProtocol", (CorkedProtocol,), {"places": Places(config)})
