"""What a connection may take before anybody has looked at what it says: bytes of headers, time, its place among others.

llhttp refuses what makes two readers disagree where a request ends (two lengths, a length beside chunks, folded
headers). What it lets through is refused here: other transfer codings, chunks in HTTP/1.0, other versions, none or
several Host headers. Every refusal ends the connection: nothing after a doubtful request is read as another one.
"""

import asyncio
from collections import Counter
from typing import Any

import orjson

from rotator.config import HttpConfig

LINGER_S = 1.0  # a refused client may go on sending so long: a reset would take our answer from it
EXCESS_BYTES_MAX = 1 << 20  # of a body that is still sent after its answer has ended
_PHRASES = {
    400: b"Bad Request",
    408: b"Request Timeout",
    414: b"URI Too Long",
    431: b"Request Header Fields Too Large",
    501: b"Not Implemented",
    503: b"Service Unavailable",
    505: b"HTTP Version Not Supported",
}


class Refused(Exception):
    """Of a request by its head. ``status`` and the words are what its sender gets."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Places:
    """Who is connected, over all connections of one server."""

    def __init__(self, config: HttpConfig) -> None:
        self.config = config
        self._by_address: Counter[str] = Counter()
        self._total = 0

    def take(self, address: str) -> str | None:
        """A place; or why there is none."""
        if self._total >= self.config.connections_max:
            return f"{self._total} connections are open: come again later"
        if self._by_address[address] >= self.config.connections_per_address_max:
            return f"{self._by_address[address]} connections are open from your address: close some"
        self._by_address[address] += 1
        self._total += 1
        return None

    def give_back(self, address: str) -> None:
        self._total -= 1
        self._by_address[address] -= 1
        if not self._by_address[address]:
            del self._by_address[address]


class HeadCheck:
    """Counts one request's head as it comes, and judges it when it is whole. Raises Refused."""

    __slots__ = ("_bytes", "_codings", "_config", "_count", "_hosts", "_line_bytes")

    def __init__(self, config: HttpConfig) -> None:
        self._config = config
        self.begin()

    def begin(self) -> None:
        self._bytes = self._count = self._hosts = self._line_bytes = 0
        self._codings: list[bytes] = []

    def url(self, piece: bytes) -> None:
        self._line_bytes += len(piece)
        self._bytes += len(piece)
        if self._line_bytes > self._config.line_bytes_max:
            raise Refused(414, f"the path is longer than {self._config.line_bytes_max} bytes")

    def header(self, name: bytes, value: bytes) -> None:
        config, size = self._config, len(name) + len(value)
        self._count += 1
        self._bytes += size
        if size > config.line_bytes_max or self._bytes > config.head_bytes_max or self._count > config.headers_max:
            raise too_large(config)
        if name == b"host":
            self._hosts += 1
        elif name == b"transfer-encoding":
            self._codings.append(value)

    def end(self, version: str) -> None:
        if version not in ("1.1", "1.0"):
            raise Refused(505, "this service speaks HTTP/1.1")
        if self._hosts > 1 or (not self._hosts and version == "1.1"):
            raise Refused(400, "a request has one Host header")
        if self._codings and (version == "1.0" or [c.strip().lower() for c in self._codings] != [b"chunked"]):
            raise Refused(501, "the one transfer coding here is 'chunked', in HTTP/1.1")


def too_large(config: HttpConfig) -> Refused:
    return Refused(
        431,
        f"headers take at most {config.head_bytes_max} bytes in {config.headers_max} headers, "
        f"of {config.line_bytes_max} bytes each",
    )


def answer(refused: Refused) -> bytes:
    """A whole answer that ends its connection, in the shape that clients of models understand."""
    kind = "server_error" if refused.status >= 500 else "invalid_request_error"
    error: dict[str, Any] = {"message": str(refused), "type": kind, "param": None, "code": "bad_http"}
    body = orjson.dumps({"error": error})
    lines = [
        b"HTTP/1.1 %d %b" % (refused.status, _PHRASES[refused.status]),
        b"content-type: application/json",
        b"content-length: %d" % len(body),
        b"x-content-type-options: nosniff",
        b"connection: close",
    ]
    if refused.status == 503:
        lines.append(b"retry-after: 1")
    return b"\r\n".join((*lines, b"", body))


class Alarm:
    """One timer that can be set, moved and taken back."""

    __slots__ = ("_handle", "_loop", "_ring")

    def __init__(self, loop: asyncio.AbstractEventLoop, ring: Any) -> None:
        self._loop = loop
        self._ring = ring
        self._handle: asyncio.TimerHandle | None = None

    @property
    def is_set(self) -> bool:
        return self._handle is not None

    def set(self, in_s: float) -> None:
        self.clear()
        self._handle = self._loop.call_later(in_s, self._due)

    def clear(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _due(self) -> None:
        self._handle = None
        self._ring()
