"""The way to engines: one pool of connections, and a request that is sent once or not at all."""

from collections.abc import Callable

import aiohttp
from aiohttp.client_middlewares import ClientHandlerType
from multidict import CIMultiDict
from yarl import URL

from rotator.ports import RotatorError

# Shorter than vLLM's own 5 s, so that we, not it, close an idle connection: no request meets a closing one.
KEEPALIVE_S = 3.0
READ_BUFFER_BYTES = 64 << 10  # an engine that is ahead of its client is stopped at twice this
URLS_MAX = 1024
_SKIP = frozenset(("Accept", "Accept-Encoding", "User-Agent", "Content-Type"))  # the client's own, or none


class Unreachable(RotatorError):
    """No connection: not one byte of the request was sent."""


class Lost(RotatorError):
    """The connection broke after the request may have reached the engine: it must not be sent again."""


def open_session(connect_s: float) -> aiohttp.ClientSession:
    """A session that passes bodies on as they are, without bound on time or number."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=connect_s),
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        skip_auto_headers=_SKIP,
        read_bufsize=READ_BUFFER_BYTES,
        max_line_size=65536,
        max_field_size=65536,
    )


class Upstream:
    """``factory`` makes the session when it is first needed: it must be made inside the event loop."""

    def __init__(self, factory: Callable[[], aiohttp.ClientSession]) -> None:
        self._factory = factory
        self._session: aiohttp.ClientSession | None = None
        self._urls: dict[tuple[str, str], URL] = {}

    @property
    def session(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = self._factory()
        return self._session

    def url(self, base: str, path: str, query: bytes = b"") -> URL:
        if query:
            return URL(f"{base}{path}?{query.decode('latin-1')}", encoded=True)
        if (url := self._urls.get((base, path))) is None:
            if len(self._urls) >= URLS_MAX:
                self._urls.clear()
            url = self._urls[base, path] = URL(base + path, encoded=True)
        return url

    async def open(self, method: str, url: URL, headers: CIMultiDict[str], body: bytes) -> aiohttp.ClientResponse:
        """Send the request and return its answer's head. Raises Unreachable and Lost. Cancelling closes at once."""
        try:
            if method == "POST":
                return await self.session.request(method, url, data=body, headers=headers, allow_redirects=False)
            # aiohttp sends these again by itself when a kept connection breaks
            once = (_once,)
            return await self.session.request(method, url, headers=headers, allow_redirects=False, middlewares=once)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError, aiohttp.InvalidURL) as e:
            raise Unreachable(f"no connection to it: {e}") from e
        except (TimeoutError, aiohttp.ClientError, OSError) as e:
            raise Lost(f"it closed the connection without an answer ({type(e).__name__})") from e

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None


async def _once(request: aiohttp.ClientRequest, handler: ClientHandlerType) -> aiohttp.ClientResponse:
    try:
        return await handler(request)
    except aiohttp.ClientConnectorError:
        raise
    except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as e:
        raise aiohttp.ClientError(str(e)) from e
