"""uvicorn's connection, with an answer's head and the body that follows it at once sent as one piece.

uvicorn writes them apart, and the event loop sends each write at once: two system calls, and two wake-ups of the
client, for every small answer. What comes later, a stream's events, is written as it comes.
"""

import asyncio
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


class Corked:
    """A transport that keeps an answer's head for what follows it in the same turn; else it is sent at the turn's end.
    Whatever this is not told to do itself the real transport does."""

    __slots__ = ("_head", "_loop", "real")

    def __init__(self, real: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self.real = real
        self._loop = loop
        self._head = b""

    def write(self, data: bytes) -> None:
        if self._head:
            data, self._head = self._head + data, b""
        elif data.startswith(b"HTTP/1.1 "):
            self._head = data
            self._loop.call_soon(self._flush)
            return
        self.real.write(data)

    def close(self) -> None:
        self._flush()
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
    """To be given to uvicorn as ``http``."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as in uvicorn itself
        super().connection_made(cast("asyncio.Transport", Corked(transport, self.loop)))

    def handle_websocket_upgrade(self) -> None:
        self.transport = cast("Corked", self.transport).real  # the socket's own protocol takes it from here
        super().handle_websocket_upgrade()
