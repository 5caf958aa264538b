"""The clients of the gateway's benchmark: kept HTTP/1.1 connections that read no more of an answer than they must."""

import asyncio
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

_BODY = b'{"model":"bench","prompt":"The capital of France is","max_tokens":1,"temperature":0}'
_TIME = re.compile(rb'"t":(\d+)')
_HEADERS = b"content-type: application/json\r\nuser-agent: bench\r\naccept: */*\r\n"


def request(path: bytes, body: bytes) -> bytes:
    return b"POST %b HTTP/1.1\r\nhost: 127.0.0.1\r\n%bcontent-length: %d\r\n\r\n%b" % (path, _HEADERS, len(body), body)


SMALL = request(b"/v1/completions", _BODY)


def streaming(events: int, gap_ms: float) -> bytes:
    body = b'{"model":"bench","stream":true,"n":%d,"gap_ms":%.3f,"messages":[]}' % (events, gap_ms)
    return request(b"/v1/chat/completions", body)


@dataclass
class Streams:
    """``delays_ms`` are from an event's writing by the engine to its reading here."""

    delays_ms: list[float] = field(default_factory=list)
    whole: int = 0
    lost: int = 0
    seconds: float = 0.0


class Connection(asyncio.Protocol):
    """One request at a time. ``on_event`` sees what arrives of a stream, ``on_end`` whether the answer was whole."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._needed: int | None = None  # bytes of the whole answer, None until its head is here, 0 if chunked
        self._on_end: Callable[[bool], None] | None = None
        self._on_data: Callable[[bytes], None] | None = None
        self._tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is none by class

    def connection_lost(self, error: Exception | None) -> None:
        self._end(False)

    def send(self, data: bytes, on_end: Callable[[bool], None], on_data: Callable[[bytes], None] | None = None) -> None:
        self._on_end, self._on_data, self._needed, self._tail = on_end, on_data, None, b""
        self._buffer.clear()
        self.transport.write(data)

    def data_received(self, data: bytes) -> None:
        if self._needed == 0:
            self._stream(data)
            return
        self._buffer += data
        if self._needed is None and (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = bytes(self._buffer[:end]).lower()
            if not head.startswith(b"http/1.1 200"):
                self._end(False)
                return
            at = head.find(b"content-length:")
            self._needed = end + 4 + int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            if not self._needed:
                self._stream(bytes(self._buffer[end + 4 :]))
        if self._needed and len(self._buffer) >= self._needed:
            self._end(True)

    def _stream(self, data: bytes) -> None:
        if self._on_data is not None:
            self._on_data(data)
        self._tail = (self._tail + data)[-64:]
        if self._tail.endswith(b"\r\n0\r\n\r\n"):
            self._end(b"[DONE]" in self._tail)

    def _end(self, whole: bool) -> None:
        if (on_end := self._on_end) is not None:
            self._on_end = None
            on_end(whole)


async def connect(port: int, count: int) -> list[Connection]:
    loop = asyncio.get_running_loop()
    connections = []
    for _ in range(count):
        _, connection = await loop.create_connection(Connection, "127.0.0.1", port)
        connections.append(connection)
    return connections


def close(connections: list[Connection]) -> None:
    for connection in connections:
        connection.transport.abort()


async def at_rate(port: int, per_s: float, seconds: float) -> list[float]:
    """Small requests at a steady rate; returns each one's latency in milliseconds. Raises if one was lost."""
    loop = asyncio.get_running_loop()
    idle = await connect(port, 16)
    everyone = list(idle)
    await _spin(everyone, 64)
    latencies_ms: list[float] = []
    lost = 0

    def fire(connection: Connection) -> None:
        begun = time.perf_counter()

        def ended(whole: bool) -> None:
            nonlocal lost
            latencies_ms.append((time.perf_counter() - begun) * 1e3)
            lost += not whole
            idle.append(connection)

        connection.send(SMALL, ended)

    begun_at_s = loop.time()
    for n in range(int(per_s * seconds)):
        await asyncio.sleep(begun_at_s + n / per_s - loop.time())
        fire(idle.pop(0))
    while len(idle) < len(everyone):  # noqa: ASYNC110 # the last few answers of a round, once
        await asyncio.sleep(0.01)
    close(everyone)
    if lost:
        raise RuntimeError(f"{lost} requests were lost")
    return latencies_ms


async def flat_out(port: int, clients: int, *, seconds: float = 0.0, requests: int = 0) -> float:
    """As many small requests as ``clients`` connections can ask, one after the other; returns requests/s."""
    connections = await connect(port, clients)
    await _spin(connections, clients * 4)
    until_s = time.perf_counter() + seconds if seconds else float("inf")
    begun_s = time.perf_counter()
    done = await _spin(connections, requests or (1 << 60), until_s)
    took_s = time.perf_counter() - begun_s
    close(connections)
    return done / took_s


async def _spin(connections: list[Connection], requests: int, until_s: float = float("inf")) -> int:
    """Closed loop until so many were asked or it is late. Raises if one was lost."""
    finished = asyncio.get_running_loop().create_future()
    asked = done = busy = 0

    def again(connection: Connection) -> None:
        nonlocal asked, busy
        asked += 1
        busy += 1
        connection.send(SMALL, lambda whole: ended(connection, whole))

    def ended(connection: Connection, whole: bool) -> None:
        nonlocal done, busy
        busy -= 1
        done += 1
        if not whole and not finished.done():
            finished.set_exception(RuntimeError("a request was lost"))
        if asked < requests and (done & 15 or time.perf_counter() < until_s):
            again(connection)
        elif busy == 0 and not finished.done():
            finished.set_result(None)

    for connection in connections[:requests]:
        again(connection)
    await finished
    return done


async def streams(port: int, count: int, events: int, gap_ms: float) -> Streams:
    """``count`` streams at once, each ``events`` long."""
    result = Streams()
    connections = await connect(port, count)
    finished = asyncio.get_running_loop().create_future()
    left = count
    data = streaming(events, gap_ms)

    def one(connection: Connection) -> None:
        seen = 0

        def arrived(piece: bytes) -> None:
            nonlocal seen
            now_ns = time.monotonic_ns()
            for sent in _TIME.findall(piece):
                seen += 1
                result.delays_ms.append((now_ns - int(sent)) / 1e6)

        def ended(whole: bool) -> None:
            nonlocal left
            left -= 1
            if whole and seen == events:
                result.whole += 1
            else:
                result.lost += 1
            if left == 0:
                finished.set_result(None)

        connection.send(data, ended, arrived)

    begun_s = time.perf_counter()
    spread_s = gap_ms / 1e3 / count  # over one gap, as evenly as timers of a millisecond allow
    for n, connection in enumerate(connections):
        if (ahead_s := begun_s + n * spread_s - time.perf_counter()) >= 0.001:
            await asyncio.sleep(ahead_s)
        one(connection)
    await finished
    result.seconds = time.perf_counter() - begun_s
    close(connections)
    return result
