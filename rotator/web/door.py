"""The page's door, within the service: who may look, and what they may do. Behind it everything is another process.

With keys, a viewer logs in with one and gets a signed cookie that no script can read and no other site can send; it
stands for the key, and every action goes through REST with it. Without keys the rules of loopback hold, as for REST.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import Receive, Scope, Send

from rotator.config import PageConfig
from rotator.service.keys import RANK, Denial, Keys
from rotator.web import plain
from rotator.web.pipe import GUARDS, Pipe
from rotator.web.room import PageDown, Room

COOKIE = "rotator_session"
_ASSETS = ("/_nicegui/", "/_nicegui_ws/")
_LOGIN_BYTES_MAX = 4096
_TRIES_MAX = 10  # wrong keys a minute, over all who try
_TRIES_S = 60.0
_TRUSTED = RANK["admin"]  # without keys, whoever reaches the service over loopback


@dataclass(frozen=True, slots=True)
class Viewer:
    """``name`` of the key and its rank; ``token`` goes with each of the viewer's actions."""

    name: str
    rank: int
    token: str = ""
    ends_wall_s: float | None = None

    def headers(self) -> dict[str, str]:
        return {
            "x-rotator-viewer": self.name.encode().hex(),
            "x-rotator-rank": str(self.rank),
            "x-rotator-token": self.token,
        }


class Door:
    def __init__(self, keys: Keys, room: Room, config: PageConfig) -> None:
        self._keys = keys
        self._room = room
        self._config = config
        self._pipe = Pipe()
        self._wrong: deque[float] = deque(maxlen=_TRIES_MAX)

    @property
    def room(self) -> Room:
        return self._room

    def wants(self, scope: Scope) -> bool:
        """Browsers' requests for the page. ``/`` is the API's index to whoever does not ask for HTML."""
        path = scope["path"]
        if path.startswith(_ASSETS) or path in ("/login", "/logout", "/favicon.ico"):
            return True
        if path != "/" or scope["type"] != "http" or scope["method"] not in ("GET", "HEAD"):
            return False
        return "text/html" in Headers(scope=scope).get("accept", "")

    async def close(self) -> None:
        await self._pipe.close()
        await self._room.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        if (denial := self._denial(scope, headers)) is not None:
            await _refuse(scope, receive, send, denial)
        elif scope["type"] == "websocket":
            await self._websocket(scope, receive, send, headers)
        else:
            await self._http(scope, receive, send, headers)

    # -- who ---------------------------------------------------------------------------------------------------------

    def _denial(self, scope: Scope, headers: Mapping[str, str]) -> Denial | None:
        """A websocket is guarded like a POST, with keys as well: browsers let any page open one to anywhere."""
        method = "POST" if scope["type"] == "websocket" else scope["method"]
        if (denial := self._keys.guard(method, headers)) is not None:
            return denial
        origin = headers.get("origin")
        if method == "POST" and origin is not None and urlsplit(origin).netloc != headers.get("host", ""):
            return Denial("a page of another origin may not do this")
        return None

    def _viewer(self, headers: Mapping[str, str]) -> Viewer | None:
        if not self._keys.configured:
            return Viewer("", _TRUSTED)
        token = _cookie(headers)
        session = self._keys.sessions.read(token) if self._keys.sessions and token else None
        if session is None:
            return None
        return Viewer(session.key, self._keys.rank(session.key), token, session.ends_wall_s)

    # -- HTTP --------------------------------------------------------------------------------------------------------

    async def _http(self, scope: Scope, receive: Receive, send: Send, headers: Headers) -> None:
        path, viewer = scope["path"], self._viewer(headers)
        if path in ("/login", "/logout"):
            answer: Response | None = await self._session(scope, receive)
        elif scope["method"] not in ("GET", "HEAD"):
            answer = PlainTextResponse("only GET here\n", 405, {"allow": "GET, HEAD"})
        elif viewer is None:
            answer = _html(plain.login(), 200 if path == "/" else 401)
        elif path == "/" and self._room.guests >= self._config.viewers_max:
            answer = _html(plain.crowded(self._config.viewers_max), 503)
        else:
            answer = await self._carry(scope, send, viewer)
        if answer is not None:
            answer.raw_headers.extend(GUARDS)
            await answer(scope, receive, send)

    async def _carry(self, scope: Scope, send: Send, viewer: Viewer) -> Response | None:
        try:
            await self._room.ready()
        except PageDown as e:
            return _html(plain.down(str(e)), 503)
        try:
            await self._pipe.request(self._room.socket, scope, send, viewer.headers())
        except PageDown as e:
            self._room.give_up()
            return _html(plain.down(str(e)), 503)
        return None

    async def _session(self, scope: Scope, receive: Receive) -> Response:
        if scope["method"] != "POST":
            return RedirectResponse("/", 303)
        if scope["path"] == "/logout":
            answer: Response = RedirectResponse("/", 303)
            answer.delete_cookie(COOKIE, path="/", httponly=True, samesite="strict")
            return answer
        return await self._login(scope, receive)

    async def _login(self, scope: Scope, receive: Receive) -> Response:
        sessions, now = self._keys.sessions, asyncio.get_running_loop().time()
        if sessions is None or not self._keys.configured:
            return RedirectResponse("/", 303)
        if len(self._wrong) == _TRIES_MAX and now - self._wrong[0] < _TRIES_S:
            return _html(plain.login("Too many wrong keys. Try again in a minute."), 429)
        found = self._keys.login(await _given_key(Request(scope, receive)))
        if found is None:
            self._wrong.append(now)
            return _html(plain.login("This key is not known here."), 401)
        answer = RedirectResponse("/", 303)
        answer.set_cookie(
            COOKIE,
            sessions.issue(found[0]),
            max_age=int(self._config.session_h * 3600),
            path="/",
            httponly=True,
            secure=scope["scheme"] == "https",
            samesite="strict",
        )
        return answer

    # -- websocket ---------------------------------------------------------------------------------------------------

    async def _websocket(self, scope: Scope, receive: Receive, send: Send, headers: Headers) -> None:
        viewer = self._viewer(headers)
        if viewer is None or self._room.guests >= self._config.viewers_max:
            await send({"type": "websocket.close", "code": 1008})
            return
        self._room.enter()
        try:
            await self._room.ready()
            await receive()  # the connect
            over = self._session_over(viewer, headers)
            await self._pipe.websocket(self._room.socket, scope, receive, send, viewer.headers(), over)
        except PageDown:
            await send({"type": "websocket.close", "code": 1013})
        finally:
            self._room.leave()

    async def _session_over(self, viewer: Viewer, headers: Mapping[str, str]) -> None:
        """Return when the viewer's time is over, or when the key behind it is gone or may do other things than then."""
        ends_in_s = None if viewer.ends_wall_s is None else max(0.0, viewer.ends_wall_s - time.time())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ends_in_s):
                await self._keys.lapses(lambda: self._viewer(headers) == viewer)


async def _given_key(request: Request) -> str:
    """The form's one field; empty where the body is none of ours."""
    length = request.headers.get("content-length", "")
    if not length.isdecimal() or int(length) > _LOGIN_BYTES_MAX:
        return ""
    try:
        fields = parse_qs((await request.body()).decode("utf-8", "replace"), max_num_fields=4)
    except (ValueError, ClientDisconnect):
        return ""
    return fields.get("key", [""])[0].strip()


def _cookie(headers: Mapping[str, str]) -> str:
    try:
        morsel = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return ""
    return morsel.value if morsel else ""


def _html(body: str, status: int = 200) -> Response:
    return HTMLResponse(body, status, {"cache-control": "no-store"})


async def _refuse(scope: Scope, receive: Receive, send: Send, denial: Denial) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
    else:
        await PlainTextResponse(f"{denial}\n", denial.status)(scope, receive, send)
