"""The page of a service with keys: who sees what, who may do what, and what the browser keeps of it."""

import signal
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from playwright.async_api import Browser, expect

from rotator.service.keys import digest
from tests.browser.pages import SOON_MS, Viewer, open_viewer
from tests.system.service.rig import Rig, engine, eventually, rig_up

pytestmark = [pytest.mark.browser, pytest.mark.asyncio(loop_scope="session")]
SCOPES = ("infer", "operate", "admin")


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def rig(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Rig]:
    keys = [{"name": f"the {s}", "sha256": digest(f"secret-{s}"), "scopes": [s]} for s in SCOPES]
    engines = [engine("a"), engine("b", misbehave={"lie_sleep": True})]
    settings: dict[str, Any] = {"keys": keys, "page": {"viewers_max": 2}}
    async with rig_up(tmp_path_factory.mktemp("keys"), engines, **settings) as made:
        yield made


async def logged_in(browser: Browser, rig: Rig, scope: str) -> Viewer:
    viewer = await open_viewer(browser, rig.url, wait="#key")
    await viewer.page.get_by_label("Key").fill(f"secret-{scope}")
    await viewer.page.keyboard.press("Enter")
    await viewer.page.wait_for_selector(".engine", timeout=SOON_MS)
    return viewer


async def test_without_a_key_there_is_a_login_and_nothing_else(browser: Browser, rig: Rig) -> None:
    viewer = await open_viewer(browser, rig.url, wait="#key")
    buttons = await viewer.page.get_by_role("button").all_inner_texts()
    assert buttons == ["Log in"]
    text = await viewer.page.locator("body").inner_text()
    assert "b" not in text.split()
    await viewer.page.get_by_label("Key").fill("a guess")
    await viewer.page.keyboard.press("Enter")
    await expect(viewer.page.get_by_role("alert")).to_contain_text("not known")
    assert await viewer.context.cookies() == []
    await viewer.close()


async def test_a_key_for_requests_sees_the_fleet_and_has_no_buttons(browser: Browser, rig: Rig) -> None:
    viewer = await logged_in(browser, rig, "infer")
    await viewer.sees("a", "stopped")
    assert await viewer.button("Wake a").count() == 0
    assert await viewer.button("More for a").count() == 0
    assert await viewer.button("Swap now").count() == 0
    for hidden in ("swaps", "incidents", "log"):
        await expect(viewer.section(hidden)).to_contain_text("scope operate")
    await viewer.close()


async def test_the_cookie_is_all_that_the_browser_keeps_and_no_script_reads_it(browser: Browser, rig: Rig) -> None:
    viewer = await logged_in(browser, rig, "operate")
    (cookie,) = await viewer.context.cookies()
    assert (cookie["httpOnly"], cookie["sameSite"], cookie["path"]) == (True, "Strict", "/")
    kept = await viewer.page.evaluate("JSON.stringify([document.cookie, {...localStorage}, {...sessionStorage}])")
    page = await viewer.page.content()
    for secret in ("secret-operate", cookie["value"]):
        assert secret not in kept
        assert secret not in page
    assert "secret-operate" not in cookie["value"]
    await viewer.page.get_by_role("button", name="Log out").click()
    await viewer.page.wait_for_selector("#key")
    assert await viewer.context.cookies() == []
    await viewer.close()


async def test_a_liar_is_released_by_an_admin_and_by_nobody_below(browser: Browser, rig: Rig) -> None:
    operator = await logged_in(browser, rig, "operate")
    await operator.button("Wake b").click()
    await operator.sees("b", "awake")
    await operator.button("Sleep b").click()
    await operator.sees("b", "quarantined")
    await expect(operator.engine("b")).to_contain_text("said it sleeps")
    assert await operator.button("Release b").count() == 0
    admin = await logged_in(browser, rig, "admin")
    await admin.button("Release b").click()
    await expect(admin.page.locator(".ask")).to_contain_text("Release b?", timeout=SOON_MS)
    await admin.confirm()
    await operator.sees("b", "stopped")
    for viewer in (operator, admin):
        await viewer.close()


async def test_a_session_lasts_over_a_restart_of_the_service(browser: Browser, rig: Rig) -> None:
    viewer = await logged_in(browser, rig, "admin")
    await rig.restart()
    await expect(viewer.page.locator("#popup")).to_have_attribute("aria-hidden", "true", timeout=2 * SOON_MS)
    await viewer.page.wait_for_selector(".engine", timeout=SOON_MS)
    await expect(viewer.button("More for a")).to_be_visible(timeout=SOON_MS)
    await viewer.close()


async def test_an_open_page_is_asked_for_a_key_as_soon_as_its_own_is_gone(browser: Browser, rig: Rig) -> None:
    viewer, stays = await logged_in(browser, rig, "operate"), await logged_in(browser, rig, "admin")
    keys = rig.settings["keys"]
    rig.settings["keys"] = [k for k in keys if k["scopes"] != ["operate"]]
    rig.write_fleet()
    assert rig.service is not None
    rig.service.send_signal(signal.SIGHUP)
    await expect(viewer.page.locator("#key")).to_be_visible(timeout=SOON_MS)
    await stays.sees("a", "stopped")
    rig.settings["keys"] = keys
    rig.write_fleet()
    rig.service.send_signal(signal.SIGHUP)
    for each in (viewer, stays):
        await each.close()


async def test_one_page_too_many_is_told_so_and_let_in_when_there_is_room(browser: Browser, rig: Rig) -> None:
    first, second = await logged_in(browser, rig, "infer"), await logged_in(browser, rig, "infer")
    late = await open_viewer(browser, rig.url, wait="#key")
    await late.page.get_by_label("Key").fill("secret-infer")
    await late.page.keyboard.press("Enter")
    await expect(late.page.locator("h1")).to_have_text("Too many open pages", timeout=SOON_MS)
    await first.close()

    async def is_in() -> bool:
        await late.page.reload()
        return await late.page.locator(".engine").count() > 0

    await eventually(is_in, what="room for the third")
    for viewer in (second, late):
        await viewer.close()
