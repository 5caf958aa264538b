"""The page's process: when it begins, when it ends, and what stays of it."""

import asyncio
import contextlib
import os
import signal
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import psutil
import pytest
import pytest_asyncio
from playwright.async_api import Browser, expect
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from rotator.web import room as rooms
from rotator.web.room import PageDown, Room
from tests.browser.pages import SOON_MS, open_viewer
from tests.system.service.rig import Rig, engine, eventually, rig_up

pytestmark = [pytest.mark.browser, pytest.mark.asyncio(loop_scope="session")]


@pytest_asyncio.fixture(loop_scope="session")
async def room(tmp_path: Path) -> AsyncIterator[Room]:
    made = Room(_no_feed, tmp_path / "page.log")
    yield made
    await made.close()


async def test_many_visits_at_once_begin_one_process_and_the_end_leaves_nothing(room: Room, tmp_path: Path) -> None:
    await asyncio.gather(*(room.ready() for _ in range(8)))
    pid = room.pid
    assert pid is not None
    folder = Path(room.socket).parent
    assert folder.stat().st_mode & 0o777 == 0o700
    assert "PATH" in psutil.Process(pid).environ()
    assert not {k for k in psutil.Process(pid).environ() if "KEY" in k or "PYTEST" in k}
    await room.close()
    assert not psutil.pid_exists(pid)
    assert not folder.exists()


async def test_it_goes_when_nobody_looks_and_comes_back_with_the_next_visit(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rooms, "IDLE_S", 0.2)
    await room.ready()
    first = room.pid
    room.enter()
    await asyncio.sleep(0.4)
    assert room.pid == first  # somebody looks
    room.leave()
    await eventually(lambda: room.pid is None, what="its end")
    await room.ready()
    assert room.pid not in (None, first)


async def test_one_that_cannot_begin_is_said_so_and_not_tried_all_the_time(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rooms.sys, "executable", "/nonexistent/python")
    with pytest.raises(PageDown, match=r"page\.log"):
        await room.ready()
    with pytest.raises(PageDown, match="tried again in"):
        await room.ready()


async def test_a_page_that_hangs_holds_up_nobody_and_the_services_end_leaves_nothing(
    browser: Browser, tmp_path: Path
) -> None:
    async with rig_up(tmp_path, [engine("a")]) as rig:
        await rig.say("a")
        viewer = await open_viewer(browser, rig.url)
        (page,) = _pages(rig)
        folder = Path(page.cmdline()[-1])
        os.kill(page.pid, signal.SIGSTOP)
        await asyncio.gather(*(rig.say("a") for _ in range(5)))
        os.kill(page.pid, signal.SIGCONT)
        await expect(viewer.page.locator(".status")).to_contain_text("ready", timeout=SOON_MS)
        assert await rig.terminate() == 0
        await eventually(lambda: not page.is_running() or page.status() == psutil.STATUS_ZOMBIE, what="the page's end")
        await eventually(lambda: not folder.exists(), what="the end of its folder")
        await viewer.close()


async def test_a_killed_service_leaves_no_page_behind(tmp_path: Path) -> None:
    async with rig_up(tmp_path, [engine("a")]) as rig:
        async with aiohttp.ClientSession() as session, session.get(rig.url, headers={"accept": "text/html"}) as answer:
            assert answer.status == 200
        (page,) = _pages(rig)
        folder = Path(page.cmdline()[-1])
        assert folder.parent == Path(tempfile.gettempdir())
        await rig.kill()
        await eventually(lambda: not page.is_running() and not folder.exists(), what="the page's end")


async def _no_feed(scope: Scope, receive: Receive, send: Send) -> None:
    await PlainTextResponse("nothing here", 404)(scope, receive, send)


def _pages(rig: Rig) -> list[psutil.Process]:
    assert rig.service is not None
    children = psutil.Process(rig.service.pid).children()
    with contextlib.suppress(psutil.NoSuchProcess):
        return [c for c in children if "rotator.web" in c.cmdline()]
    return []
