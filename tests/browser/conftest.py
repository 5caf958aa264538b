from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from playwright.async_api import Browser, async_playwright

from bench.chromium import FLAGS, executable
from tests.browser.pages import Open, Viewer, open_viewer
from tests.system.service.rig import Rig, engine, rig_up


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def browser() -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        made = await playwright.chromium.launch(executable_path=executable(), args=list(FLAGS))
        yield made
        await made.close()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Rig]:
    """Three engines over two GPUs, of which ``a`` and ``b`` cannot be awake together."""
    deadlines = {"wake_deadline_s": 3, "sleep_deadline_s": 3}
    engines = [engine(name, gpus=[0, 1], **deadlines) for name in ("a", "b")] + [
        engine("small", gpus=[1], weights_gib=1, kv_gib=2)
    ]
    async with rig_up(tmp_path_factory.mktemp("page"), engines, gpus=2) as rig:
        yield rig


@pytest_asyncio.fixture(loop_scope="session")
async def rig(shared: Rig) -> AsyncIterator[Rig]:
    """``a`` is awake and ``b`` asleep; nothing misbehaves."""
    for name in ("b", "a"):
        await shared.say(name)
    await shared.settled()
    yield shared


@pytest_asyncio.fixture(loop_scope="session")
async def open_page(browser: Browser, rig: Rig) -> AsyncIterator[Open]:
    """Opens a page; each is closed at the end, and must have complained of nothing."""
    opened: list[Viewer] = []

    async def open(url: str | None = None, **more: object) -> Viewer:
        viewer = await open_viewer(browser, url or rig.url, **more)
        opened.append(viewer)
        return viewer

    yield open
    for viewer in opened:
        await viewer.close()
        assert viewer.broken == []
