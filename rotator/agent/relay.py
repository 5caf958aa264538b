"""``/engines/<name>/...``: a request for an engine that listens on this machine's loopback, bytes unchanged.

The engine's host and port never come from the request. A request that did not reach its engine, and an answer that
broke off, are told apart by a header, so that the gateway can treat them as if it had asked the engine itself.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import unquote

import aiohttp
import orjson

from rotator.agent.engines import Engines
from rotator.ports_nodes import TOKEN_HEADER, UNREACHABLE_HEADER
from rotator.service.channel import EngineAnswer, Lost
from rotator.service.pool import Pool, Unreachable

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Header = tuple[bytes, bytes]

PREFIX = b"/engines/"
MESSAGE_BYTES_MAX = 16 << 20
SOCKET_OPENS_S = 30.0  # one that stands still accepts connections all the same: its kernel does
_HOP = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade")
)
_NOT_SENT = _HOP | {b"host", b"content-length", b"expect", TOKEN_HEADER.encode()}
_NOT_RETURNED = _HOP | {b"date", b"server", UNREACHABLE_HEADER.encode()}
_SOCKET = frozenset(
    (b"sec-websocket-key", b"sec-websocket-version", b"sec-websocket-extensions", b"sec-websocket-protocol")
)


class Relay:
    """``bytes_max`` bounds a request's body, ``requests_max`` how many are under way."""

    def __init__(self, engines: Engines, *, bytes_max: int, requests_max: int, connect_s: float) -> None:
        self._engines = engines
        self._bytes_max = bytes_max
        self._requests_max = requests_max
        self._connect_s = connect_s
        self._under_way = 0
        self._pool = Pool(connect_s)
        self._session: aiohttp.ClientSession | None = None

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request or socket whose path begins with PREFIX."""
        is_socket = scope["type"] == "websocket"
        place = self._place(scope["raw_path"])
        if isinstance(place, str):
            await refuse(send, 503, place, "unsent", is_socket=is_socket)
            return
        if self._under_way >= self._requests_max:
            words = f"{self._requests_max} requests to engines are under way here already"
            await refuse(send, 503, words, "unsent", is_socket=is_socket)
            return
        self._under_way += 1
        try:
            if is_socket:
                await self._socket(scope, receive, send, *place)
            else:
                await self._request(scope, receive, send, *place)
        finally:
            self._under_way -= 1

    async def close(self) -> None:
        self._pool.close()
        if self._session is not None:
            await self._session.close()

    def _place(self, raw_path: bytes) -> tuple[int, bytes] | str:
        """The engine's port and the path there; in words where there is none."""
        quoted, slash, rest = raw_path[len(PREFIX) :].partition(b"/")
        name = unquote(quoted.decode("latin-1"))
        port = self._engines.port(name)
        if port is None:
            return f"this agent knows no engine '{name[:128]}'"
        return port, slash + rest if slash else b"/"

    # -- requests ----------------------------------------------------------------------------------------------------

    async def _request(self, scope: Scope, receive: Receive, send: Send, port: int, path: bytes) -> None:
        body = await self._body(scope, receive)
        if body is None:
            await refuse(send, 413, f"the request is larger than {self._bytes_max} bytes", None)
            return
        gone = asyncio.ensure_future(_left(receive))
        carrying = asyncio.ensure_future(self._carry(scope, send, port, path, body))
        try:
            await asyncio.wait({gone, carrying}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (gone, carrying):
                if not task.done():
                    task.cancel()
            await asyncio.gather(gone, return_exceptions=True)
        with contextlib.suppress(asyncio.CancelledError):
            await carrying

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None where it is too large."""
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > self._bytes_max:
            return None
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] != "http.request":
                raise asyncio.CancelledError  # it left before it had said all
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._bytes_max:
                return None
            if not message.get("more_body"):
                return b"".join(parts)

    async def _carry(self, scope: Scope, send: Send, port: int, path: bytes, body: bytes) -> None:
        query = scope["query_string"]
        target = path + b"?" + query if query else path
        headers = [(k, v) for k, v in scope["headers"] if k not in _NOT_SENT]
        method = scope["method"].encode()
        try:
            answer = await self._pool.ask(method, f"http://127.0.0.1:{port}", target, headers, body)
        except Unreachable as e:
            await refuse(send, 503, str(e), "unsent")
            return
        except Lost as e:
            await refuse(send, 502, str(e), "lost")
            return
        try:
            await _pass_on(answer, send)
        except Lost:
            return  # no end is written: whoever reads it sees it break off here, as it did there
        finally:
            answer.close()

    # -- sockets -----------------------------------------------------------------------------------------------------

    async def _socket(self, scope: Scope, receive: Receive, send: Send, port: int, path: bytes) -> None:
        await receive()  # the handshake
        query = scope["query_string"].decode("latin-1")
        url = f"http://127.0.0.1:{port}{path.decode('latin-1')}" + (f"?{query}" if query else "")
        headers = [
            (k.decode("latin-1"), v.decode("latin-1"))
            for k, v in scope["headers"]
            if k not in _NOT_SENT and k not in _SOCKET
        ]
        if self._session is None:
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=self._connect_s)
            self._session = aiohttp.ClientSession(timeout=timeout)
        protocols = tuple(scope.get("subprotocols", ()))
        try:
            async with asyncio.timeout(SOCKET_OPENS_S):
                there = await self._session.ws_connect(
                    url, headers=headers, protocols=protocols, max_msg_size=MESSAGE_BYTES_MAX
                )
        except (aiohttp.ClientError, OSError) as e:
            why = str(e) or f"it did not answer within {SOCKET_OPENS_S:g} s"
            await refuse(send, 503, f"no connection to it: {why}", "unsent", is_socket=True)
            return
        await send({"type": "websocket.accept", "subprotocol": there.protocol})
        ways = [asyncio.ensure_future(_inwards(receive, there)), asyncio.ensure_future(_outwards(there, send))]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            await there.close()


async def _pass_on(answer: EngineAnswer, send: Send) -> None:
    headers = [header for header in answer.headers if header[0] not in _NOT_RETURNED]
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    while chunk := await answer.readany():
        await send({"type": "http.response.body", "body": chunk, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def _left(receive: Receive) -> None:
    """Return when whoever asked has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _inwards(receive: Receive, there: aiohttp.ClientWebSocketResponse) -> None:
    while (message := await receive())["type"] == "websocket.receive":
        if message.get("text") is not None:
            await there.send_str(message["text"])
        else:
            await there.send_bytes(message["bytes"])


async def _outwards(there: aiohttp.ClientWebSocketResponse, send: Send) -> None:
    async for message in there:
        if message.type is aiohttp.WSMsgType.TEXT:
            await send({"type": "websocket.send", "text": message.data})
        elif message.type is aiohttp.WSMsgType.BINARY:
            await send({"type": "websocket.send", "bytes": message.data})
    await send({"type": "websocket.close", "code": there.close_code or 1011})


async def refuse(send: Send, status: int, words: str, sent: str | None, *, is_socket: bool = False) -> None:
    """Answer with an error of the agent's own. ``sent`` says what became of the request, for the gateway."""
    headers: list[Header] = [(b"content-type", b"application/json")]
    if sent is not None:
        headers.append((UNREACHABLE_HEADER.encode(), sent.encode()))
    body = orjson.dumps({"error": {"message": words, "type": "agent", "code": status}})
    kind = "websocket.http.response" if is_socket else "http.response"
    await send(
        {"type": f"{kind}.start", "status": status, "headers": [*headers, (b"content-length", b"%d" % len(body))]}
    )
    await send({"type": f"{kind}.body", "body": body})
