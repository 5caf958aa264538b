"""uvicorn's connection, with what one turn of the event loop writes sent as one piece.

uvicorn writes an answer's head and its body apart, and the event loop sends each write at once: two system calls, and
two wake-ups of the client, for every small answer. Held together until the turn's end they are one.
"""

import asyncio
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


class Corked:
    """A transport that sends at the end of the turn. Whatever it is not told to do itself the real one does."""

    __slots__ = ("_loop", "_pieces", "real")

    def __init__(self, real: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self.real = real
        self._loop = loop
        self._pieces: list[bytes] = []

    def write(self, data: bytes) -> None:
        if not self._pieces:
            self._loop.call_soon(self._flush)
        self._pieces.append(data)

    def close(self) -> None:
        self._flush()
        self.real.close()

    def abort(self) -> None:
        self._pieces.clear()
        self.real.abort()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def _flush(self) -> None:
        if not self._pieces:
            return
        data = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces.clear()
        if not self.real.is_closing():  # a client that left meanwhile needs no answer
            self.real.write(data)


class CorkedProtocol(HttpToolsProtocol):
    """To be given to uvicorn as ``http``."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as in uvicorn itself
        super().connection_made(cast("asyncio.Transport", Corked(transport, self.loop)))

    def handle_websocket_upgrade(self) -> None:
        self.transport = cast("Corked", self.transport).real  # the socket's own protocol takes it from here
        super().handle_websocket_upgrade()
