"""HTTP/1.1 as Nomad speaks it: JSON or text/plain, and an event stream without chunks and without a length."""

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

BODY_BYTES_MAX = 8 << 20


@dataclass(frozen=True)
class Request:
    method: str
    path: str  # decoded by segment: an encoded slash stays within its segment
    segments: tuple[str, ...]
    query: dict[str, str]
    topics: tuple[str, ...]
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Refusal(Exception):
    """Answered as Nomad does: the text alone, as text/plain, without a newline."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status, self.text = status, text


@dataclass
class Reply:
    body: Any = None
    index: int = 0
    text: bytes | None = None
    stream: AsyncIterator[bytes] | None = None
    headers: dict[str, str] = field(default_factory=dict)


Answer = Callable[[Request], Awaitable[Reply]]


class Server:
    """One listening socket; ``stop`` also breaks every connection, as a killed agent does."""

    def __init__(self, answer: Answer, tls: ssl.SSLContext | None = None, port: int = 0) -> None:
        self._answer = answer
        self._tls = tls
        self._server: asyncio.Server | None = None
        self._writers: dict[asyncio.StreamWriter, bool] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = port

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, ssl=self._tls)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in list(self._writers):
            writer.transport.abort()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut_streams(self) -> int:
        """Break the event streams only. How many there were."""
        streams = [writer for writer, is_stream in self._writers.items() if is_stream]
        for writer in streams:
            writer.transport.abort()
        return len(streams)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers[writer] = False
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, ssl.SSLError):
                while (request := await _read(reader)) is not None:
                    if not await self._reply(request, writer):
                        break
        except asyncio.CancelledError:
            if self._server is not None:
                raise  # else by stop(): asyncio would tell of it as of a fault
        finally:
            self._tasks.discard(task)
            self._writers.pop(writer, None)
            writer.close()

    async def _reply(self, request: Request, writer: asyncio.StreamWriter) -> bool:
        """Whether the connection stays."""
        try:
            reply = await self._answer(request)
        except Refusal as e:
            await _send(writer, e.status, e.text.encode(), "text/plain; charset=utf-8", {})
            return True
        if reply.stream is not None:
            self._writers[writer] = True
            await _stream(writer, reply)
            return False
        headers = {
            "X-Nomad-Index": str(reply.index),
            "X-Nomad-LastContact": "0",
            "X-Nomad-KnownLeader": "true",
            **reply.headers,
        }
        if reply.text is not None:
            await _send(writer, 200, reply.text, "text/plain", headers)
        else:
            body = json.dumps(reply.body, separators=(",", ":")).encode()
            await _send(writer, 200, body, "application/json", headers)
        return True


async def _read(reader: asyncio.StreamReader) -> Request | None:
    line = await reader.readline()
    if not line:
        return None
    method, target, _ = line.decode().split(" ")
    headers: dict[str, str] = {}
    while (line := await reader.readline()).strip():
        name, _, value = line.decode().partition(":")
        headers[name.strip().lower()] = value.strip()
    length = int(headers.get("content-length", "0"))
    assert length <= BODY_BYTES_MAX
    body = await reader.readexactly(length)
    parts = urlsplit(target)
    pairs = parse_qsl(parts.query, keep_blank_values=True)
    topics = tuple(value for name, value in pairs if name == "topic")
    query = {name: value for name, value in pairs if name != "topic"}
    segments = tuple(unquote(s) for s in parts.path.split("/")[1:])
    return Request(method, parts.path, segments, query, topics, headers, body)


async def _send(writer: asyncio.StreamWriter, status: int, body: bytes, kind: str, headers: dict[str, str]) -> None:
    reason = {200: "OK", 400: "Bad Request", 403: "Forbidden", 404: "Not Found", 405: "Method Not Allowed"}
    head = [f"HTTP/1.1 {status} {reason.get(status, 'Internal Server Error')}", f"Content-Type: {kind}"]
    head += [f"Content-Length: {len(body)}", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    writer.write("\r\n".join(head).encode() + body)
    await writer.drain()


async def _stream(writer: asyncio.StreamWriter, reply: Reply) -> None:
    assert reply.stream is not None
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n")
    async with contextlib.aclosing(reply.stream) as lines:  # type: ignore[type-var]
        async for line in lines:
            writer.write(line)
            await writer.drain()
