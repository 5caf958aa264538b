"""Copies requests and websockets to the page's process and back. Bounded in time and size; understands nothing."""

import asyncio
import contextlib
from collections.abc import Coroutine, Mapping
from typing import Any

import aiohttp
from starlette.types import Message, Receive, Scope, Send

from rotator.web.room import PageDown

ANSWER_S = 20.0  # an asset or the page itself: drawn in a fraction of it, or not at all
MESSAGE_MAX_BYTES = 1 << 20
_HOP = frozenset({b"connection", b"keep-alive", b"te", b"trailer", b"transfer-encoding", b"upgrade", b"host"})
_PRIVATE = frozenset(
    {b"cookie", b"authorization", b"x-api-key", b"x-rotator-viewer", b"x-rotator-rank", b"x-rotator-token"}
)
# What a browser may do with this page: nothing is fetched from elsewhere, nobody frames it. The interface's library
# compiles its templates in the browser, which is what the two 'unsafe' are for.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; font-src 'self' data:; connect-src 'self'; object-src 'none'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'"
)
GUARDS = (
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"same-origin"),  # with none at all a browser hides the origin of its own forms
)


class Pipe:
    """Connections to one socket; closed and made anew with its process."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None
        self._socket = ""

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def request(self, socket: str, scope: Scope, send: Send, more: Mapping[str, str]) -> None:
        """Carry a GET or HEAD. Raises PageDown where the process does not answer in time."""
        session = await self._to(socket)
        begun = False
        try:
            async with (
                asyncio.timeout(ANSWER_S),
                session.request(
                    scope["method"], _url(scope), headers=_headers(scope, more), skip_auto_headers=("Accept-Encoding",)
                ) as answer,
            ):
                headers = [(k.lower(), v) for k, v in answer.raw_headers if k.lower() not in _HOP]
                await send({"type": "http.response.start", "status": answer.status, "headers": [*headers, *GUARDS]})
                begun = True
                async for chunk in answer.content.iter_any():
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                await send({"type": "http.response.body", "body": b""})
        except (aiohttp.ClientError, OSError, TimeoutError) as e:
            if not begun:
                raise PageDown(f"the page's process did not answer: {type(e).__name__}") from None

    async def websocket(
        self,
        socket: str,
        scope: Scope,
        receive: Receive,
        send: Send,
        more: Mapping[str, str],
        over: Coroutine[Any, Any, None],
    ) -> None:
        """Carry a websocket until either side ends it, or ``over`` returns. Raises PageDown where the process does not
        take it."""
        ending = asyncio.ensure_future(over)
        try:
            there = await self._dial(socket, scope, more)
            try:
                await send({"type": "websocket.accept"})
                await _both_ways(there, receive, send, ending)
            finally:
                with contextlib.suppress(aiohttp.ClientError, OSError):
                    await there.close()
        finally:
            ending.cancel()

    async def _dial(self, socket: str, scope: Scope, more: Mapping[str, str]) -> aiohttp.ClientWebSocketResponse:
        session = await self._to(socket)
        timeout = aiohttp.ClientWSTimeout(ws_close=2.0)
        try:
            async with asyncio.timeout(ANSWER_S):
                return await session.ws_connect(
                    _url(scope), headers=_headers(scope, more), max_msg_size=MESSAGE_MAX_BYTES * 16, timeout=timeout
                )
        except (aiohttp.ClientError, OSError, TimeoutError) as e:
            raise PageDown(f"the page's process did not answer: {type(e).__name__}") from None

    async def _to(self, socket: str) -> aiohttp.ClientSession:
        if self._session is None or self._socket != socket:
            await self.close()
            self._socket = socket
            self._session = aiohttp.ClientSession(
                connector=aiohttp.UnixConnector(socket, limit=0),
                timeout=aiohttp.ClientTimeout(total=None),
                auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return self._session


async def _both_ways(
    there: aiohttp.ClientWebSocketResponse, receive: Receive, send: Send, ending: "asyncio.Future[None]"
) -> None:
    outward, inward = asyncio.ensure_future(_outward(there, receive)), asyncio.ensure_future(_inward(there, send))
    await asyncio.wait((outward, inward, ending), return_when=asyncio.FIRST_COMPLETED)
    done = [way for way in (outward, inward) if way.done()]
    for way in (outward, inward):
        way.cancel()
    await asyncio.gather(outward, inward, return_exceptions=True)
    if all(way.result() for way in done if not way.exception()):  # the browser is still there
        with contextlib.suppress(RuntimeError):
            await send({"type": "websocket.close", "code": 1001})


async def _outward(there: aiohttp.ClientWebSocketResponse, receive: Receive) -> bool:
    """Browser to page, until the browser is gone (False)."""
    while True:
        message: Message = await receive()
        if message["type"] == "websocket.disconnect":
            return False
        if (text := message.get("text")) is not None:
            await there.send_str(text)
        elif data := message.get("bytes"):
            await there.send_bytes(data)


async def _inward(there: aiohttp.ClientWebSocketResponse, send: Send) -> bool:
    """Page to browser, until the page is gone (True)."""
    async for message in there:
        if message.type is aiohttp.WSMsgType.TEXT:
            await send({"type": "websocket.send", "text": message.data})
        elif message.type is aiohttp.WSMsgType.BINARY:
            await send({"type": "websocket.send", "bytes": message.data})
    return True


def _url(scope: Scope) -> str:
    query = scope["query_string"].decode("latin-1")
    return f"http://page{scope['path']}" + (f"?{query}" if query else "")


def _headers(scope: Scope, more: Mapping[str, str]) -> dict[str, str]:
    kept = {
        name.decode("latin-1"): value.decode("latin-1")
        for name, value in scope["headers"]
        if name not in _HOP and name not in _PRIVATE and not name.startswith(b"sec-websocket-")
    }
    return {**kept, **more}
