"""Who gets through the page's door, without the page behind it."""

import asyncio
import contextlib
from collections.abc import Coroutine, Iterator, Mapping
from typing import Any

import pytest
from fastapi.testclient import TestClient
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocketDisconnect

from rotator.config import BindConfig, KeyConfig, PageConfig
from rotator.service.front import Front
from rotator.service.keys import Keys
from rotator.service.sessions import Sessions
from rotator.web.door import COOKIE, Door
from rotator.web.room import PageDown
from tests.unit.api.conftest import key

HTML = {"accept": "text/html"}
URL = "http://127.0.0.1:8400"


class FakeRoom:
    def __init__(self) -> None:
        self.guests = 0
        self.down = ""
        self.begun = 0
        self.given_up = False

    @property
    def socket(self) -> str:
        return "/nowhere"

    async def ready(self) -> None:
        self.begun += 1
        if self.down:
            raise PageDown(self.down)

    def enter(self) -> None:
        self.guests += 1

    def leave(self) -> None:
        self.guests -= 1

    def give_up(self) -> None:
        self.given_up = True

    async def close(self) -> None:
        return None


class FakePipe:
    """Answers with what it was told of the viewer."""

    async def request(self, socket: str, scope: Scope, send: Send, more: Mapping[str, str]) -> None:
        if scope["path"] == "/_nicegui/hangs":
            raise PageDown("it did not answer")
        headers = [(k.encode(), v.encode()) for k, v in more.items()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"the page"})

    async def websocket(
        self,
        socket: str,
        scope: Scope,
        receive: Receive,
        send: Send,
        more: Mapping[str, str],
        over: Coroutine[Any, Any, None],
    ) -> None:
        """Open until the browser leaves or it is over."""
        await send({"type": "websocket.accept"})
        ending, leaving = asyncio.ensure_future(over), asyncio.ensure_future(receive())
        await asyncio.wait((ending, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not leaving.done():
            await send({"type": "websocket.close", "code": 1001})
        for task in (ending, leaving):
            task.cancel()

    async def close(self) -> None:
        return None


@pytest.fixture
def room() -> FakeRoom:
    return FakeRoom()


def door(room: FakeRoom, *keys: KeyConfig, **config: Any) -> Door:
    known = Keys(keys, BindConfig(), Sessions("s" * 32, keys, 3600.0))
    made = Door(known, room, PageConfig(**config))  # type: ignore[arg-type] # a room by hand
    made._pipe = FakePipe()  # type: ignore[assignment]
    return made


@contextlib.contextmanager
def browser(room: FakeRoom, *keys: KeyConfig, url: str = URL, **config: Any) -> Iterator[TestClient]:
    yield TestClient(door(room, *keys, **config), base_url=url, follow_redirects=False)


def log_in(client: TestClient, secret: str, **headers: str) -> Any:
    return client.post("/login", data={"key": secret}, headers=headers)


def test_without_keys_whoever_reaches_loopback_is_let_in_as_over_rest(room: FakeRoom):
    with browser(room) as client:
        answer = client.get("/", headers=HTML)
        assert (answer.text, answer.headers["x-rotator-rank"]) == ("the page", "3")
        assert client.get("/", headers={**HTML, "host": "evil.example"}).status_code == 421
        assert client.post("/login", headers={"origin": "http://evil.example"}).status_code == 403


def test_with_keys_nothing_is_begun_before_a_login(room: FakeRoom):
    with browser(room, key("admin")) as client:
        assert "Log in" in client.get("/", headers=HTML).text
        assert client.get("/_nicegui/x.js").status_code == 401
        assert room.begun == 0


def test_a_login_sets_a_cookie_that_no_script_reads_and_no_other_site_sends(room: FakeRoom):
    with browser(room, key("operate")) as client:
        answer = log_in(client, "operate-secret")
        assert answer.status_code == 303
        words = {w.strip().lower().split("=")[0] for w in answer.headers["set-cookie"].split(";")}
        assert {"httponly", "samesite", "path"} <= words
        assert "secure" not in words
        assert "samesite=strict" in answer.headers["set-cookie"].lower()
        page = client.get("/", headers=HTML)
        assert page.headers["x-rotator-rank"] == "2"
        assert bytes.fromhex(page.headers["x-rotator-viewer"]).decode() == "a operate"
        client.post("/logout")
        assert "Log in" in client.get("/", headers=HTML).text


def test_over_tls_the_cookie_goes_over_nothing_else(room: FakeRoom):
    with browser(room, key("admin"), url="https://127.0.0.1:8400") as client:
        assert "secure" in log_in(client, "admin-secret").headers["set-cookie"].lower()


def test_a_forged_cookie_is_as_good_as_none(room: FakeRoom):
    with browser(room, key("admin")) as client:
        client.cookies.set(COOKIE, "rs-forged")
        assert "Log in" in client.get("/", headers=HTML).text


def test_guessing_keys_is_slow(room: FakeRoom):
    with browser(room, key("admin")) as client:
        answers = [log_in(client, f"guess {i}").status_code for i in range(12)]
        assert answers == [401] * 10 + [429] * 2
        assert log_in(client, "admin-secret").status_code == 429


@pytest.mark.parametrize("body", [b"key=" + b"x" * 9000, b"\xff\xfe", b"key=a&key=b&c=d&e=f&g=h&i=j", b""])
def test_an_odd_login_is_refused_and_breaks_nothing(room: FakeRoom, body: bytes):
    with browser(room, key("admin")) as client:
        assert client.post("/login", content=body).status_code == 401


def test_a_login_that_another_site_sends_is_refused(room: FakeRoom):
    with browser(room, key("admin")) as client:
        assert log_in(client, "admin-secret", origin="http://evil.example").status_code == 403
        assert log_in(client, "admin-secret", origin=URL).status_code == 303


def test_a_websocket_needs_the_session_and_the_same_origin(room: FakeRoom):
    path = URL.replace("http", "ws") + "/_nicegui_ws/socket.io/"
    with browser(room, key("admin")) as client:
        with pytest.raises(WebSocketDisconnect), client.websocket_connect(path):
            pass
        log_in(client, "admin-secret")
        with (
            pytest.raises(WebSocketDisconnect),
            client.websocket_connect(path, headers={"origin": "http://evil.example"}),
        ):
            pass
        with client.websocket_connect(path, headers={"origin": URL}):
            pass
    assert (room.begun, room.guests) == (1, 0)


class OpenPage:
    """A page's websocket, open; what the browser is sent is in ``told``."""

    def __init__(self, front: Door, token: str) -> None:
        headers = [(b"host", b"127.0.0.1:8400"), (b"cookie", f"{COOKIE}={token}".encode())]
        self._scope = {"type": "websocket", "path": "/_nicegui_ws/socket.io/", "query_string": b"", "headers": headers}
        self._browser: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._browser.put_nowait({"type": "websocket.connect"})
        self.told: asyncio.Queue[str] = asyncio.Queue()
        self.task = asyncio.create_task(front(self._scope, self._browser.get, self._send))

    async def _send(self, message: Any) -> None:
        self.told.put_nowait(message["type"])

    async def hears(self, what: str) -> None:
        async with asyncio.timeout(5):
            assert await self.told.get() == what

    async def opened(self) -> None:
        await self.hears("websocket.accept")
        await _settled()

    async def leave(self) -> None:
        self._browser.put_nowait({"type": "websocket.disconnect"})
        await self.task


async def _settled() -> None:
    """Everybody who can go on has gone on."""
    for _ in range(10):
        await asyncio.sleep(0)


@pytest.mark.parametrize(
    "later", [(), (key("infer"),), (KeyConfig(name="a admin", sha256="0" * 64, scopes=("admin",)),)]
)
async def test_an_open_page_ends_with_its_key(room: FakeRoom, later: tuple[KeyConfig, ...]):
    front = door(room, key("admin"))
    assert front._keys.sessions is not None
    page = OpenPage(front, front._keys.sessions.issue("a admin"))
    await page.opened()
    front._keys.replace(later)
    await page.hears("websocket.close")
    await page.task
    assert room.guests == 0


async def test_an_open_page_ends_when_its_key_may_do_less(room: FakeRoom):
    front = door(room, key("admin"))
    assert front._keys.sessions is not None
    page = OpenPage(front, front._keys.sessions.issue("a admin"))
    await page.opened()
    front._keys.replace([key("admin").model_copy(update={"scopes": ("infer",)})])
    await page.hears("websocket.close")


async def test_an_open_page_stays_when_other_keys_change(room: FakeRoom):
    front = door(room, key("admin"))
    assert front._keys.sessions is not None
    page = OpenPage(front, front._keys.sessions.issue("a admin"))
    await page.opened()
    front._keys.replace([key("admin"), key("infer")])
    await _settled()
    await page.leave()
    assert page.told.empty()


async def test_a_page_opened_without_keys_ends_when_there_are_some(room: FakeRoom):
    front = door(room)
    page = OpenPage(front, "")
    await page.opened()
    front._keys.replace([key("admin")])
    await page.hears("websocket.close")


def test_viewers_beyond_the_bound_are_told(room: FakeRoom):
    room.guests = 2
    with browser(room, viewers_max=2) as client:
        answer = client.get("/", headers=HTML)
        assert answer.status_code == 503
        assert "viewers_max" in answer.text
        with pytest.raises(WebSocketDisconnect), client.websocket_connect("/_nicegui_ws/socket.io/"):
            pass


def test_while_the_page_is_down_the_browser_is_told_and_asks_again(room: FakeRoom):
    room.down = "its process ended with <code> 1"
    with browser(room) as client:
        answer = client.get("/", headers=HTML)
        assert answer.status_code == 503
        assert "&lt;code&gt;" in answer.text
        assert 'http-equiv="refresh"' in answer.text


def test_a_page_that_does_not_answer_is_given_up_so_that_the_next_visit_begins_another(room: FakeRoom):
    with browser(room) as client:
        assert client.get("/_nicegui/hangs").status_code == 503
    assert room.given_up


def test_what_a_viewer_claims_to_be_is_not_believed(room: FakeRoom):
    with browser(room, key("infer")) as client:
        log_in(client, "infer-secret")
        answer = client.get("/", headers={**HTML, "x-rotator-rank": "3"})
        assert answer.headers["x-rotator-rank"] == "1"


class FakeGateway:
    def handles(self, path: str, method: str = "GET") -> bool:
        return path.startswith("/v1")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await _say(b"gateway", scope, receive, send)


async def _api(scope: Scope, receive: Receive, send: Send) -> None:
    await _say(b"api", scope, receive, send)


async def _say(what: bytes, scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": what})


@pytest.mark.parametrize(
    ("method", "path", "accept", "who"),
    [
        ("GET", "/", "text/html,*/*", "the page"),
        ("GET", "/", "*/*", "api"),
        ("POST", "/", "text/html", "api"),
        ("GET", "/engines", "text/html", "api"),
        ("GET", "/docs", "text/html", "api"),
        ("GET", "/v1/models", "text/html", "gateway"),
        ("GET", "/_nicegui/a.js", "*/*", "the page"),
    ],
)
def test_the_front_sends_browsers_to_the_page_and_nothing_else(
    room: FakeRoom, method: str, path: str, accept: str, who: str
):
    front = Front(FakeGateway(), _api, door(room))  # type: ignore[arg-type] # a gateway by hand
    client = TestClient(front, base_url=URL)
    assert client.request(method, path, headers={"accept": accept}).text == who
