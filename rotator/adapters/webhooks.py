"""Tells of incidents by POST: signed, tried again, bounded, and never in anybody's way.

The body is JSON: ``{"event", "id", "at_wall_s", "engine", "incident"}``. With a secret it is signed over time and body:
``X-Rotator-Signature: t=<unix seconds>,sha256=<hex>`` of HMAC-SHA256(secret, "<unix seconds>." + body). ``id`` is the
same at every attempt, so that a receiver can tell a repetition.
"""

import asyncio
import hashlib
import hmac
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import aiohttp
import orjson

from rotator.config_watchdog import WebhookConfig

_log = logging.getLogger(__name__)
WAITING_MAX = 256  # for each receiver; the oldest are dropped
_PAUSE_FIRST_S = 1.0
_PAUSE_MAX_S = 60.0
_AGAIN = frozenset({408, 425, 429})


class Webhooks:
    """``tell`` never blocks and never raises. Each receiver has its own line and its own task: one that hangs holds up
    no other. URLs come from the configuration only, and redirects are not followed."""

    def __init__(
        self, config: Sequence[WebhookConfig], environ: Mapping[str, str], wall: Callable[[], float] = time.time
    ) -> None:
        self._wall = wall
        self._session: aiohttp.ClientSession | None = None
        self._lines = [_Line(c, environ.get(c.secret_env or "", "")) for c in config]
        for line in self._lines:
            if line.config.secret_env and not line.secret:
                _log.error("webhook %s: %s is not set: its messages go unsigned", line.name, line.config.secret_env)

    @property
    def dropped(self) -> int:
        return sum(line.dropped for line in self._lines)

    def tell(self, event: str, id: str, engine: str | None, incident: Mapping[str, Any]) -> None:
        message = {"event": event, "id": id, "at_wall_s": self._wall(), "engine": engine, "incident": dict(incident)}
        body = orjson.dumps(message, default=str)
        for line in self._lines:
            if event in line.config.events:
                line.put(body)
                if line.task is None or line.task.done():
                    line.task = asyncio.create_task(self._deliver(line), name=f"webhook {line.name}")

    async def _deliver(self, line: "_Line") -> None:
        while line.waiting:
            body = line.waiting.popleft()
            pause_s = _PAUSE_FIRST_S
            for attempt in range(1, line.config.attempts_max + 1):
                why = await self._post(line, body)
                if why is None:
                    break
                if why.startswith("refused") or attempt == line.config.attempts_max:
                    line.dropped += 1
                    _log.warning("webhook %s: given up after %d attempts: %s", line.name, attempt, why)
                    break
                await asyncio.sleep(pause_s)
                pause_s = min(_PAUSE_MAX_S, 2 * pause_s)

    async def _post(self, line: "_Line", body: bytes) -> str | None:
        """None when it was taken, else why not; "refused" where it would be refused again."""
        headers = {"Content-Type": "application/json", "User-Agent": "rotator"}
        if line.secret:
            headers["X-Rotator-Signature"] = sign(line.secret, int(self._wall()), body)
        try:
            async with (
                asyncio.timeout(line.config.deadline_s),
                self._open().post(str(line.config.url), data=body, headers=headers, allow_redirects=False) as answer,
            ):
                status = answer.status
        except TimeoutError:
            return f"no answer within {line.config.deadline_s:g} s"
        except (aiohttp.ClientError, OSError, ValueError) as e:
            return type(e).__name__
        if status < 300:
            return None
        return f"HTTP {status}" if status >= 500 or status in _AGAIN else f"refused with HTTP {status}"

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None or self._session.closed:
            self._session = aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar())
        return self._session

    async def close(self) -> None:
        """What still waits is dropped."""
        for line in self._lines:
            if line.task is not None:
                line.task.cancel()
        if self._session is not None:
            await self._session.close()


class _Line:
    def __init__(self, config: WebhookConfig, secret: str) -> None:
        self.config = config
        self.secret = secret
        self.name = config.url.host or "?"  # a URL may hold a secret of its own
        self.waiting: deque[bytes] = deque()
        self.dropped = 0
        self.task: asyncio.Task[None] | None = None

    def put(self, body: bytes) -> None:
        if len(self.waiting) >= WAITING_MAX:
            self.waiting.popleft()
            self.dropped += 1
        self.waiting.append(body)


def sign(secret: str, at_s: int, body: bytes) -> str:
    """The signature's header: when, and HMAC-SHA256 over "<when>.<body>"."""
    digest = hmac.new(secret.encode(), f"{at_s}.".encode() + body, hashlib.sha256).hexdigest()
    return f"t={at_s},sha256={digest}"
