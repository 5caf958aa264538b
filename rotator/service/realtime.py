"""``/v1/realtime``: a WebSocket is one request while it lasts: it waits, stands still and is cut as one."""

import asyncio
import contextlib
import time
from collections.abc import Coroutine
from typing import Any
from urllib.parse import parse_qsl, urlencode

import aiohttp
import orjson
from multidict import CIMultiDict
from yarl import URL

from rotator.ports_nodes import UNREACHABLE_HEADER
from rotator.service.events import EventBus
from rotator.service.exchange import Head
from rotator.service.inbox import Inbox
from rotator.service.quotas import Quotas
from rotator.service.responses import ApiError, Message, Receive, Scope, Send, error_body, refusal, server_error
from rotator.service.rewrite import MODEL_CHARS_MAX, rename
from rotator.service.routes import Dialect, Directory, Target
from rotator.service.traffic import Cut, EngineUnavailable, QueueFull, Ticket, Traffic, WaitExpired
from rotator.service.upstream import Upstream

FIRST_WORD_S = 60.0  # a client that names no model in its URL must do so within this
FIRST_WORDS_MAX = 16
MESSAGE_BYTES_MAX = 16 << 20
_PATH = "/v1/realtime"
_TIMEOUT = aiohttp.ClientWSTimeout(ws_close=1.0)
_SOCKET = frozenset(
    (b"sec-websocket-key", b"sec-websocket-version", b"sec-websocket-extensions", b"sec-websocket-protocol", b"origin")
)
_CLIENT_DONE = (1000, 1001, 1005)


class Realtime:
    def __init__(
        self, traffic: Traffic, directory: Directory, upstream: Upstream, bus: EventBus, quotas: Quotas
    ) -> None:
        self._quotas = quotas
        self._traffic = traffic
        self._directory = directory
        self._upstream = upstream
        self._bus = bus

    async def serve(
        self, scope: Scope, receive: Receive, send: Send, denial: ApiError | None, known_path: bool, client: str = ""
    ) -> None:
        """One socket of that client's, from its handshake to its end."""
        if (await receive())["type"] != "websocket.connect":
            return
        try:
            if denial is not None:
                raise denial
            if not known_path:
                raise ApiError(404, f"there is no WebSocket {scope['path'][:200]} here", "unknown_url")
            head = Head(scope["headers"], scope["query_string"])
            model = dict(parse_qsl(head.query.decode("latin-1"))).get("model")
            target = self._find(model, client) if model else None
            with self._quotas.request(client):
                await send({"type": "websocket.accept", "subprotocol": _subprotocol(scope)})
                await _Session(self, Inbox(receive), send, head, scope, client).run(target)
        except ApiError as e:
            await _reject(scope, send, e)

    def _find(self, model: str, client: str) -> Target:
        target = self._directory.resolve(model) if len(model) <= MODEL_CHARS_MAX else None
        if target is None or not self._quotas.allows(client, target):
            raise ApiError(404, f"there is no model '{model[:256]}'", "model_not_found", param="model")
        return target


class _Gone(Exception):
    """The client is gone."""


class _Session:
    def __init__(self, parent: Realtime, inbox: Inbox, send: Send, head: Head, scope: Scope, client: str) -> None:
        self._client = client
        self._parent = parent
        self._inbox = inbox
        self._asgi_send = send
        self._head = head
        self._protocols = [p for p in scope.get("subprotocols", ()) if not p.startswith("openai-insecure-api-key")]
        self._greeted = False
        self._task: asyncio.Task[None] | None = None
        self._cut: str | None = None

    async def run(self, target: Target | None) -> None:
        """Until one side ends it. A failure is told as an error event before the socket closes."""
        filling = asyncio.create_task(self._inbox.fill())
        try:
            await self._while_there(filling, self._serve(target))
        except ApiError as e:
            await self._close_with(e)
        except _Gone:
            return
        except (QueueFull, WaitExpired, EngineUnavailable, Cut) as e:
            await self._close_with(refusal(e))
        finally:
            filling.cancel()
        if self._inbox.overflowed:
            await self._close_with(ApiError(413, "too much was sent before the model was awake", "too_much_waiting"))

    async def _while_there(self, filling: asyncio.Task[None], work: Coroutine[Any, Any, None]) -> None:
        """Do the work, and give it up as soon as the client has gone."""
        self._task = task = asyncio.create_task(work)
        try:
            await asyncio.wait((filling, task), return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not task.done():
                task.cancel()
            await asyncio.wait((task,))
        if self._cut is not None:
            raise Cut(self._cut)
        if not task.cancelled():
            task.result()

    async def _serve(self, target: Target | None) -> None:
        if target is None:
            target = await self._first_word()
        traffic = self._parent._traffic
        ticket = traffic.try_enter(target.engine, target.requested, self._client)
        if ticket is None:
            ticket = await traffic.enter(
                target.engine, target.requested, deadline_s=self._head.deadline_s, client=self._client
            )
            target = self._parent._directory.resolve(target.requested) or target  # a started engine has a new address
        ticket.on_cut(self._on_cut)
        outcome = "failed"
        try:
            await self._connect(target, ticket)
            outcome = "ok"
        except (asyncio.CancelledError, _Gone):
            outcome = "ok" if self._inbox.code in _CLIENT_DONE else "client_left"
            raise
        finally:
            ticket.leave("aborted" if ticket.cut else outcome)

    def _on_cut(self, reason: str) -> None:
        self._cut = reason
        if self._task is not None:
            self._task.cancel()

    async def _first_word(self) -> Target:
        """The model from the client's first messages. Some wait for a greeting before they say anything."""
        self._greeted = True
        await self._say({"type": "session.created", "id": self._parent._traffic.new_id(), "created": int(time.time())})
        try:
            async with asyncio.timeout(FIRST_WORD_S):
                for _ in range(FIRST_WORDS_MAX):
                    content = await self._inbox.get()
                    if model := _model_in(content):
                        self._inbox.put_back(content)
                        return self._parent._find(model, self._client)
                    await self._say(error_message(_no_model()))
        except TimeoutError:
            pass
        raise _no_model()

    async def _connect(self, target: Target, ticket: Ticket) -> None:
        forward = [(n.decode("latin-1"), v.decode("latin-1")) for n, v in self._head.forward if n not in _SOCKET]
        query = _query(self._head.query, target).decode("latin-1")
        url = URL(f"{target.url}{_PATH}?{query}" if query else target.url + _PATH, encoded=True)
        door = self._parent._upstream.doors(target.url)
        if door is not None:
            forward += door.headers.items()
        try:
            connecting = self._parent._upstream.session.ws_connect(
                url,
                headers=CIMultiDict(forward),
                ssl=(door.tls if door else None) or True,
                protocols=self._protocols,
                timeout=_TIMEOUT,
                max_msg_size=MESSAGE_BYTES_MAX,
            )
            async with connecting as socket:
                await self._pump(socket, target, ticket)
        except aiohttp.WSServerHandshakeError as e:
            if e.headers is not None and UNREACHABLE_HEADER in e.headers:
                self._parent._bus.publish("engine.unreachable", target.engine, url=target.url, reason=str(e))
                raise EngineUnavailable(f"'{target.engine}' cannot be reached by its node's agent", 1.0) from None
            raise server_error(502, f"'{target.engine}' refused the socket: {e.status}", "engine_refused") from None
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as e:
            self._parent._bus.publish("engine.unreachable", target.engine, url=target.url, reason=str(e))
            raise EngineUnavailable(f"'{target.engine}' cannot be reached: {e}", 1.0) from None
        except (aiohttp.ClientError, OSError) as e:
            self._parent._bus.publish("engine.unreachable", target.engine, url=target.url, reason=str(e))
            raise server_error(502, f"'{target.engine}' failed: {type(e).__name__}", "engine_failed") from None

    async def _pump(self, socket: aiohttp.ClientWebSocketResponse, target: Target, ticket: Ticket) -> None:
        self._inbox.flowing = True
        up = asyncio.create_task(self._up(socket, target))
        try:
            await self._down(socket, target, ticket)
        finally:
            up.cancel()
            await asyncio.wait((up,))
        code = socket.close_code
        if code is None or code in (1005, 1006):
            raise server_error(502, f"'{target.engine}' closed the socket without a word", "engine_failed")
        await self._send({"type": "websocket.close", "code": code})

    async def _up(self, socket: aiohttp.ClientWebSocketResponse, target: Target) -> None:
        while True:
            content = await self._inbox.get()
            if isinstance(content, bytes):
                await socket.send_bytes(content)
            else:
                await socket.send_str(_renamed(content, target, target.served_model))

    async def _down(self, socket: aiohttp.ClientWebSocketResponse, target: Target, ticket: Ticket) -> None:
        async for message in socket:
            if not ticket.flowing:
                await ticket.wait_flow()
            if message.type is aiohttp.WSMsgType.BINARY:
                await self._send({"type": "websocket.send", "bytes": message.data})
            elif message.type is aiohttp.WSMsgType.TEXT:
                if self._greeted and '"session.created"' in message.data:
                    self._greeted = False  # the client had ours
                    continue
                await self._send({"type": "websocket.send", "text": _renamed(message.data, target, target.requested)})

    async def _send(self, message: Message) -> None:
        try:
            await self._asgi_send(message)
        except OSError:  # ASGI's way to say that the client is gone
            raise _Gone from None

    async def _say(self, body: dict[str, Any]) -> None:
        await self._send({"type": "websocket.send", "text": orjson.dumps(body).decode()})

    async def _close_with(self, error: ApiError) -> None:
        code = 1013 if error.status in (429, 503) else 1008 if error.status < 500 else 1011
        with contextlib.suppress(_Gone):
            await self._say(error_message(error))
            await self._send({"type": "websocket.close", "code": code, "reason": error.message[:100]})


def error_message(error: ApiError) -> dict[str, Any]:
    return {"type": "error", **error_body(error, Dialect.OPENAI)}


def _no_model() -> ApiError:
    text = "name a model: in the URL (?model=…) or in a session.update message"
    return ApiError(400, text, "missing_model", param="model")


async def _reject(scope: Scope, send: Send, error: ApiError) -> None:
    """Refuse the handshake, with a body where the server can send one."""
    if "websocket.http.response" not in scope.get("extensions", {}):
        await send({"type": "websocket.close", "code": 1008, "reason": error.message[:100]})
        return
    body = orjson.dumps(error_body(error, Dialect.OPENAI))
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "websocket.http.response.start", "status": error.status, "headers": headers})
    await send({"type": "websocket.http.response.body", "body": body})


def _subprotocol(scope: Scope) -> str | None:
    offered: list[str] = list(scope.get("subprotocols", ()))
    return "realtime" if "realtime" in offered else None


def _query(query: bytes, target: Target) -> bytes:
    if b"model=" not in query or target.requested == target.served_model:
        return query
    pairs = parse_qsl(query.decode("latin-1"), keep_blank_values=True)
    return urlencode([(k, target.served_model if k == "model" else v) for k, v in pairs]).encode()


def _model_in(content: str | bytes) -> str | None:
    try:
        data = orjson.loads(content)
    except orjson.JSONDecodeError:
        return None
    for part in (data, data.get("session")) if isinstance(data, dict) else ():
        if isinstance(part, dict) and isinstance(part.get("model"), str) and part["model"]:
            return str(part["model"])
    return None


def _renamed(text: str, target: Target, name: str) -> str:
    if target.requested == target.served_model or '"model"' not in text:
        return text
    try:
        data = orjson.loads(text)
    except orjson.JSONDecodeError:
        return text
    return orjson.dumps(data).decode() if rename(data, name) else text
