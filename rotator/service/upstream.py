"""The way to engines, and to endpoints outside: a request is sent once or not at all."""

from collections.abc import Callable

import aiohttp

from rotator.ports_nodes import Doors
from rotator.service.channel import EngineAnswer, Header, Lost
from rotator.service.pool import KEEPALIVE_S, Pool, Unreachable

_SKIP = frozenset(("Accept", "Accept-Encoding", "User-Agent", "Content-Type"))  # the client's own, or none
_BROKEN = (aiohttp.ClientError, OSError)  # TimeoutError is an OSError


def open_session(connect_s: float) -> aiohttp.ClientSession:
    """A session for sockets and outside endpoints, that passes bodies on as they are, without bound on time."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=connect_s),
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        skip_auto_headers=_SKIP,
        max_line_size=65536,
        max_field_size=65536,
    )


class Upstream:
    """Requests go over our own connections to engines. ``factory`` makes the session for all else when it is first
    needed: it must be made inside the event loop."""

    def __init__(
        self, factory: Callable[[], aiohttp.ClientSession], connect_s: float, doors: Doors = lambda _: None
    ) -> None:
        self.pool = Pool(connect_s, doors)
        self.doors = doors
        self._factory = factory
        self._session: aiohttp.ClientSession | None = None

    @property
    def session(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = self._factory()
        return self._session

    async def open(
        self, method: str, base: str, path: str, query: bytes, headers: list[Header], body: bytes
    ) -> EngineAnswer:
        """Ask an engine; returns its answer's head. Raises Unreachable and Lost. Cancelling closes at once."""
        target = path.encode() + b"?" + query if query else path.encode()
        return await self.pool.ask(method.encode(), base, target, headers, body)

    async def open_outside(self, url: str, headers: dict[str, str], body: bytes) -> "OutsideAnswer":
        """Post to an endpoint that is no engine of ours. Raises Unreachable and Lost."""
        try:
            response = await self.session.post(url, data=body, headers=headers, allow_redirects=False)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError, aiohttp.InvalidURL) as e:
            raise Unreachable(f"no connection to it: {e}") from e
        except _BROKEN as e:
            raise Lost(f"it closed the connection without an answer ({type(e).__name__})") from e
        return OutsideAnswer(response)

    async def close(self) -> None:
        self.pool.close()
        if self._session is not None:
            await self._session.close()
            self._session = None


class OutsideAnswer:
    """An aiohttp response as a channel's ``Answer``."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.status = response.status
        self.headers: list[Header] = [(name.lower(), value) for name, value in response.raw_headers]
        self.kind = response.headers.get("Content-Type", "").lower()
        self.encoded = "Content-Encoding" in response.headers
        self.length = response.content_length

    async def readany(self) -> bytes:
        try:
            return await self._response.content.readany()
        except _BROKEN as e:
            raise Lost(f"it broke off in the middle of its answer ({type(e).__name__})") from e

    async def read(self) -> bytes:
        parts = []
        while chunk := await self.readany():
            parts.append(chunk)
        return b"".join(parts)

    def close(self) -> None:
        self._response.close()
