"""The service as the page sees it: JSON over one private socket."""

from collections.abc import AsyncIterator, Mapping
from typing import Any
from urllib.parse import quote

import aiohttp
import orjson

LOOK_S = 10.0
ACT_S = 960.0  # longer than any command's own deadline
EVENT_BYTES_MAX = 4 << 20


class Unanswered(Exception):
    """The service did not answer, or said no; the text is for people."""


class Source:
    def __init__(self, socket: str) -> None:
        self._session = aiohttp.ClientSession(
            "http://localhost", connector=aiohttp.UnixConnector(socket, limit=64), read_bufsize=EVENT_BYTES_MAX
        )

    async def close(self) -> None:
        await self._session.close()

    async def look(self) -> dict[str, Any]:
        """Raises Unanswered, as all of these do."""
        return dict(await self._call("GET", "/feed/look"))

    async def rows(self, table: str, **filters: str) -> tuple[list[dict[str, Any]], str | None]:
        """One page of the ledger, newest first, and the cursor of the next."""
        page = await self._call("GET", f"/feed/rows/{table}", params=filters)
        return list(page["rows"]), page["next_cursor"]

    async def events(self, after: int) -> AsyncIterator[dict[str, Any]]:
        timeout = aiohttp.ClientTimeout(total=None, sock_read=30.0)
        try:
            async with self._session.get("/feed/events", params={"after": str(after)}, timeout=timeout) as answer:
                async for line in answer.content:
                    if line.startswith(b"data: "):
                        yield orjson.loads(line[6:])
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as e:
            raise Unanswered(f"the stream of events broke: {e}") from None

    async def log(self, token: str, engine: str, lines: int, follow: bool) -> AsyncIterator[str]:
        """The last lines of an engine's log and, where followed, those that come, in pieces that end with a line."""
        headers = {"authorization": f"Bearer {token}"} if token else {}
        params = {"lines": str(lines), "follow": str(follow).lower()}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=LOOK_S)
        try:
            async with self._session.get(
                engine_path(engine, "logs"), params=params, headers=headers, timeout=timeout
            ) as answer:
                if answer.status >= 400:
                    raise Unanswered(_problem(await answer.read(), answer.status))
                rest = b""
                async for chunk in answer.content.iter_any():
                    whole, newline, rest = (rest + chunk).rpartition(b"\n")
                    if newline:
                        yield whole.decode("utf-8", "replace")
        except (aiohttp.ClientError, OSError, TimeoutError) as e:
            raise Unanswered(f"the log broke off: {type(e).__name__}") from None

    # -- with the viewer's own session -------------------------------------------------------------------------------

    async def plan(self, token: str, model: str | None) -> dict[str, Any]:
        params = {} if model is None else {"model": model}
        return dict(await self._call("GET", "/plan", token=token, params=params))

    async def act(self, token: str, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """An operator's POST. Returns its answer."""
        return dict(await self._call("POST", path, token=token, body=body, deadline_s=ACT_S))

    async def _call(
        self,
        method: str,
        path: str,
        *,
        token: str = "",
        params: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        deadline_s: float = LOOK_S,
    ) -> Any:
        headers = {"authorization": f"Bearer {token}"} if token else {}
        timeout = aiohttp.ClientTimeout(total=deadline_s)
        try:
            async with self._session.request(
                method, path, params=params, json=body, headers=headers, timeout=timeout
            ) as answer:
                status, told = answer.status, await answer.read()
            said = orjson.loads(told) if status < 400 else None
        except TimeoutError:
            raise Unanswered(f"the service did not answer within {deadline_s:.0f} s") from None
        except (aiohttp.ClientError, OSError, ValueError) as e:
            raise Unanswered(f"the service cannot be reached: {e}") from None
        if status >= 400:
            raise Unanswered(_problem(told, status))
        return said


def _problem(body: bytes, status: int) -> str:
    """What the service said against it, in words."""
    try:
        said = orjson.loads(body)
        return str(said.get("detail") or said.get("title") or status)
    except (ValueError, AttributeError):
        return f"the service answered with status {status}"


def engine_path(name: str, action: str) -> str:
    return f"/engines/{quote(name)}/{action}"
