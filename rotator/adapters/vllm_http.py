"""One HTTP call to an engine, with a deadline, and every way it can go wrong as one of our own errors."""

import asyncio
import json
import ssl
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson

from rotator.ports import EngineRefused, EngineTimeout, EngineUnreachable
from rotator.ports_nodes import UNREACHABLE_HEADER, Doors

ANSWER_BYTES_MAX = 8 << 20
CONNECTIONS_MAX = 1024
_QUOTED_CHARS_MAX = 300
_DEV_MODE_HINT = (
    "it does not know this route: start it with VLLM_SERVER_DEV_MODE=1 in its environment and --enable-sleep-mode"
)


# method, URL, query, body -> status, raw body; raises as aiohttp does
Exchange = Callable[
    [str, str, Sequence[tuple[str, str]], Mapping[str, Any] | None],
    Awaitable[tuple[int, bytes]],
]


class Deadline:
    """One deadline over the several calls of an operation, on the running loop's clock."""

    def __init__(self, deadline_s: float) -> None:
        self.total_s = deadline_s
        self._at_s = asyncio.get_running_loop().time() + deadline_s

    @property
    def left_s(self) -> float:
        return max(0.0, self._at_s - asyncio.get_running_loop().time())


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back with a status below 400."""

    where: str
    body: bytes

    def json(self) -> Any:
        """The body as JSON, None where it is empty. Raises EngineUnreachable: no vLLM answers there with that."""
        if not self.body.strip():
            return None
        try:
            return json.loads(self.body)  # not orjson: a NaN among log-probabilities must be read to be judged
        except ValueError:
            raise EngineUnreachable(f"{self.where} answered with what is no JSON: is it really vLLM?") from None

    def mapping(self) -> Mapping[str, Any]:
        """The body as a JSON object. Raises EngineUnreachable where it is something else."""
        value = self.json()
        if not isinstance(value, dict):
            raise EngineUnreachable(f"{self.where} answered with no JSON object: is it really vLLM?")
        return value


class EngineHttp:
    """A session whose connections live for one call each: an engine that was relaunched at the same URL is never
    spoken to over a connection to its former self. ``exchange`` takes the session's place where it is given."""

    def __init__(
        self, *, connect_s: float = 5.0, exchange: Exchange | None = None, doors: Doors = lambda _: None
    ) -> None:
        self._connect_s = connect_s
        self._doors = doors
        self._exchange = exchange or self._over_http
        self._session: aiohttp.ClientSession | None = None

    async def call(
        self,
        method: str,
        base_url: str,
        path: str,
        deadline: Deadline,
        *,
        query: Sequence[tuple[str, str]] = (),
        body: Mapping[str, Any] | None = None,
    ) -> Answer:
        """Ask, and return the answer. Raises EngineTimeout, EngineUnreachable, EngineRefused (status 400 and above).
        A cancelled call closes its connection."""
        where = f"{method} {base_url.rstrip('/')}{path}"
        try:
            async with asyncio.timeout(deadline.left_s):
                status, raw = await self._exchange(method, base_url.rstrip("/") + path, query, body)
        except aiohttp.ConnectionTimeoutError:
            raise EngineUnreachable(f"{where}: no connection within {self._connect_s:g} s") from None
        except TimeoutError:
            raise EngineTimeout(f"{where}: no answer within {deadline.total_s:g} s") from None
        except (aiohttp.ClientError, OSError, ValueError) as e:
            raise EngineUnreachable(f"{where}: {_first_line(e)}") from None
        if status >= 300:
            raise EngineRefused(f"{where}: {_refusal(path, status, raw)}", status)
        return Answer(where, raw)

    async def _over_http(
        self, method: str, url: str, query: Sequence[tuple[str, str]], body: Mapping[str, Any] | None
    ) -> tuple[int, bytes]:
        data = None if body is None else orjson.dumps(body)
        headers = {} if body is None else {"Content-Type": "application/json"}
        tls: ssl.SSLContext | bool = True
        if (door := self._doors(url)) is not None:
            headers |= door.headers
            tls = door.tls or True
        async with self._open().request(
            method, url, params=list(query), data=data, headers=headers, allow_redirects=False, ssl=tls
        ) as response:
            if door is not None and (word := response.headers.get(UNREACHABLE_HEADER)):
                raise ValueError(f"its node's agent could not reach it ({word}): {await response.text()}"[:300])
            raw = bytearray()
            async for piece in response.content.iter_any():
                raw += piece
                if len(raw) > ANSWER_BYTES_MAX:
                    raise ValueError(f"the answer is larger than {ANSWER_BYTES_MAX} bytes: is it really vLLM?")
            return response.status, bytes(raw)

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None or self._session.closed:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(force_close=True, limit=CONNECTIONS_MAX),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._connect_s),
            )
        return self._session

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


def _refusal(path: str, status: int, raw: bytes) -> str:
    if status == 404 and not path.startswith("/v1/"):
        return _DEV_MODE_HINT
    return f"it answered {status}: {_message(raw)}"


def _message(raw: bytes) -> str:
    """The reason in an error body of vLLM's (``error.message``), of FastAPI's (``detail``), or its first words."""
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError:
        value = None
    if isinstance(value, dict):
        inner = value.get("error", value)
        found = inner.get("message", inner.get("detail")) if isinstance(inner, dict) else inner
        if found is not None:
            return str(found)[:_QUOTED_CHARS_MAX]
    return raw.decode("utf-8", "replace").strip()[:_QUOTED_CHARS_MAX] or "without a reason"
