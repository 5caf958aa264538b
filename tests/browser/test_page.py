"""The page before people: live, true, and usable by eye, ear, thumb and key."""

import os
import re
import signal
from typing import Any

import aiohttp
import psutil
import pytest
from playwright.async_api import Locator, expect

from tests.browser.pages import SOON_MS, Open, Viewer
from tests.system.service.rig import Rig, eventually

pytestmark = [pytest.mark.browser, pytest.mark.asyncio(loop_scope="session")]
PHONE: dict[str, Any] = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}


async def test_a_swap_shows_on_an_open_page_with_its_phases(rig: Rig, open_page: Open) -> None:
    viewer = await open_page()
    await viewer.sees("a", "awake")
    await rig.say("b")
    await viewer.sees("b", "awake")
    await viewer.sees("a", "asleep")
    newest = viewer.section("swaps").locator("li").first
    await expect(newest).to_contain_text("a sleeps → b wakes", timeout=SOON_MS)
    for phase in ("drain", "sleep", "verify", "wake", "canary"):
        await expect(newest).to_contain_text(phase)
    await expect(newest).to_contain_text("loaded")
    await expect(newest).to_contain_text("request waits for b")
    await expect(viewer.page.locator("[role=status]").first).to_contain_text("b is awake")


async def test_a_waiting_request_is_in_the_queue_with_its_eta_and_gone_after_it(rig: Rig, open_page: Open) -> None:
    viewer = await open_page()
    await expect(viewer.section("queue")).to_contain_text("Nobody waits")
    await rig.misbehave("b", slow_wake_s=2.0)
    waits = rig.chat("b")
    row = viewer.section("queue").locator("tbody tr")
    await expect(row).to_contain_text("b", timeout=SOON_MS)
    await expect(row.locator("time[data-since]")).to_have_text(re.compile(r"\d+ s"))
    await expect(row.locator("td").nth(4)).to_have_text(re.compile(r"\d"))
    assert (await waits.end()).status == 200
    await expect(viewer.section("queue")).to_contain_text("Nobody waits", timeout=SOON_MS)


async def test_a_failed_wake_is_shown_with_its_cause(rig: Rig, open_page: Open) -> None:
    viewer = await open_page()
    await rig.misbehave("b", fail_wake_rank=1)
    await viewer.button("Wake b").click()
    told = viewer.page.locator(".q-notification").filter(has_text="failed")
    await expect(told).to_be_visible(timeout=SOON_MS)
    failed = viewer.section("swaps").locator("li.failed").first
    await expect(failed).to_contain_text("its wake failed", timeout=SOON_MS)
    await expect(viewer.section("incidents").locator("li").first).to_contain_text("its wake failed", timeout=SOON_MS)
    await viewer.sees("b", "awake")  # it comes back by itself, and the page says so


async def test_two_viewers_see_what_either_does(rig: Rig, open_page: Open) -> None:
    one, other = await open_page(), await open_page()
    await one.button("More for a").click()
    await one.page.get_by_role("menuitem", name="Pin", exact=True).click()
    for viewer in (one, other):
        await expect(viewer.engine("a").locator(".tag")).to_have_text("pinned", timeout=SOON_MS)
    await other.button("More for a").click()
    await other.page.get_by_role("menuitem", name="Unpin", exact=True).click()
    for viewer in (one, other):
        await expect(viewer.engine("a").locator(".tag")).to_have_count(0, timeout=SOON_MS)


async def test_an_open_page_outlives_the_service_and_then_shows_what_is_true(rig: Rig, open_page: Open) -> None:
    viewer = await open_page()
    await viewer.sees("a", "awake")
    await rig.kill()
    await expect(viewer.page.locator("#popup")).to_have_attribute("aria-hidden", "false", timeout=SOON_MS)
    await rig.serve()
    await rig.say("b")  # what the page showed is no longer so
    await viewer.sees("b", "awake", 2 * SOON_MS)
    await viewer.sees("a", "asleep")
    await expect(viewer.page.locator("#popup")).to_have_attribute("aria-hidden", "true")


async def test_the_page_may_crash_and_nothing_else_notices(rig: Rig, open_page: Open) -> None:
    viewer = await open_page()
    (pid,) = rig_pages(rig)
    stream = rig.chat("a", tokens=200)
    await stream.begun()
    kill(pid)
    assert await rig.say("a")
    answer = await stream.end()
    assert answer.claims_to_be_complete
    await expect(viewer.page.locator(".status")).to_contain_text("ready", timeout=SOON_MS)
    await eventually(lambda: any(p != pid for p in rig_pages(rig)), what="another process of the page")
    await viewer.sees("a", "awake")


async def test_a_swap_is_planned_with_reasons_asked_for_and_carried_out(rig: Rig, open_page: Open) -> None:
    viewer = await open_page()
    await viewer.button("More for b").click()
    await viewer.page.get_by_role("menuitem", name="Show plan").click()
    plan = viewer.section("plan")
    await expect(plan.locator("ol.plan")).to_contain_text("sleep a", timeout=SOON_MS)
    await expect(plan.locator("ol.plan")).to_contain_text("an operator asked", timeout=SOON_MS)
    await viewer.sees("b", "asleep")  # a dry run does nothing
    stream = await rig.chat("a", tokens=3000).begun()
    await viewer.button("Swap now").click()
    question = viewer.page.locator(".ask")
    await expect(question).to_contain_text("Requests in flight: a 1", timeout=SOON_MS)
    await question.get_by_role("button", name="Cancel").click()
    await viewer.sees("a", "awake")
    await viewer.button("Swap now").click()
    await viewer.confirm()
    told = viewer.page.locator(".q-notification").filter(has_text="b is awake")
    await expect(told).to_be_visible(timeout=SOON_MS)  # and the frozen stream brings a back at once
    await stream.leave()


async def test_a_stop_is_asked_for_twice_and_a_start_brings_it_back(rig: Rig, open_page: Open) -> None:
    viewer = await open_page()
    await viewer.button("More for b").click()
    await viewer.page.get_by_role("menuitem", name="Stop").click()
    await expect(viewer.page.locator(".ask")).to_contain_text("Stop b?", timeout=SOON_MS)
    assert await rig.state("b") == "asleep"
    await viewer.confirm()
    await viewer.sees("b", "stopped")
    await viewer.button("More for b").click()
    await viewer.page.get_by_role("menuitem", name="Start", exact=True).click()
    await viewer.sees("b", "awake")


async def test_every_gpu_has_a_plot_that_moves_and_the_same_in_figures(rig: Rig, open_page: Open) -> None:
    viewer = await open_page()
    charts = viewer.page.locator(".gpu .chart")
    await expect(charts).to_have_count(2)
    await expect(charts.first).to_have_attribute("aria-label", re.compile(r"VRAM of GPU 0 .* a 1\d"), timeout=SOON_MS)
    drawn = charts.first.locator("svg path")
    await eventually(lambda: _more_than(drawn, 3), what="areas in the plot")
    await rig.say("b")
    await expect(charts.first).to_have_attribute("aria-label", re.compile(r"b 1\d"), timeout=SOON_MS)
    await viewer.page.get_by_text("GPU 0 in figures").click()
    row = viewer.page.locator(".gpu").first.locator("tbody tr").filter(has_text="b").first
    await expect(row).to_contain_text(re.compile(r"b1\d\.\d"), timeout=SOON_MS)
    await expect(viewer.section("memory")).to_contain_text("foreign processes")
    await expect(viewer.section("memory").locator(".host")).to_contain_text("GiB")


async def test_an_engines_log_is_shown_and_followed(rig: Rig, open_page: Open) -> None:
    viewer = await open_page()
    await viewer.button("More for b").click()
    await viewer.page.get_by_role("menuitem", name="Show log").click()
    log = viewer.page.locator("#logbox")
    await expect(log).to_contain_text("--name b", timeout=SOON_MS)
    before = await log.inner_text()
    await rig.say("b")
    await rig.say("a")
    await viewer.button("More for b").click()
    await viewer.page.get_by_role("menuitem", name="Restart").click()
    await viewer.confirm()
    await eventually(lambda: _longer(log, before), what="lines that were written meanwhile")
    await rig.settled()


async def test_on_a_phone_nothing_hangs_over_and_thumbs_hit_the_buttons(rig: Rig, open_page: Open) -> None:
    viewer = await open_page(**PHONE)
    wide = await viewer.page.evaluate("document.documentElement.scrollWidth")
    assert wide <= 390
    box = await viewer.button("Wake b").bounding_box()
    assert box is not None
    assert box["height"] >= 40
    await viewer.button("Wake b").tap()
    await viewer.sees("b", "awake")


async def test_colours_follow_the_system_until_one_chooses(rig: Rig, open_page: Open) -> None:
    viewer = await open_page(color_scheme="dark")
    assert await _brightness(viewer) < 60
    await viewer.page.emulate_media(color_scheme="light")
    await eventually(lambda: _is_light(viewer), what="light colours")
    await viewer.page.keyboard.press("t")
    await viewer.page.keyboard.press("t")
    await expect(viewer.page.locator("#theme")).to_have_text("Dark")
    await viewer.page.reload()
    await viewer.page.wait_for_selector(".engine")
    await expect(viewer.page.locator("#theme")).to_have_text("Dark")
    assert await _brightness(viewer) < 60


async def test_everything_can_be_done_with_the_keyboard_alone(rig: Rig, open_page: Open) -> None:
    viewer = await open_page()
    keyboard = viewer.page.keyboard
    await keyboard.press("?")
    await expect(viewer.page.locator("#helpbox")).to_be_visible()
    await keyboard.press("Escape")
    await expect(viewer.page.locator("#helpbox")).to_be_hidden()
    for number, name in enumerate(("engines", "memory", "swaps", "queue", "plan", "calendar", "incidents", "log"), 1):
        await keyboard.press(str(number))
        await viewer.page.wait_for_function("id => document.activeElement.id === id", arg=f"h-{name}")
    await keyboard.press("1")
    await _tab_to(viewer, "Wake b")
    await keyboard.press("Enter")
    await viewer.sees("b", "awake")
    await _tab_to(viewer, "More for b")
    await keyboard.press("Enter")
    await viewer.page.get_by_role("menuitem", name="Pin", exact=True).wait_for()
    await keyboard.press("Escape")
    await expect(viewer.page.get_by_role("menuitem", name="Pin", exact=True)).to_be_hidden()


async def test_a_key_pressed_right_behind_the_helps_escape_is_not_lost(rig: Rig, open_page: Open) -> None:
    viewer = await open_page()
    press = """key => document.querySelector("#helpbox button").dispatchEvent(
        new KeyboardEvent("keydown", {key, bubbles: true}))"""
    focus = "document.activeElement.id"
    await viewer.page.evaluate(press, "3")  # the browser still has the focus in there, for a frame
    assert await viewer.page.evaluate(focus) == "h-swaps"
    await viewer.page.keyboard.press("?")
    await expect(viewer.page.locator("#helpbox")).to_be_visible()
    await viewer.page.evaluate(press, "4")
    assert await viewer.page.evaluate(focus) != "h-queue"


async def test_every_control_says_its_name_to_a_screen_reader(rig: Rig, open_page: Open) -> None:
    viewer = await open_page()
    await viewer.button("More for b").click()
    await viewer.page.get_by_role("menuitem", name="Pin", exact=True).wait_for()
    session = await viewer.context.new_cdp_session(viewer.page)
    tree = await session.send("Accessibility.getFullAXTree")
    roles = {"button", "link", "combobox", "textbox", "checkbox", "menuitem", "img", "image", "region", "list", "table"}
    controls = [n for n in tree["nodes"] if not n["ignored"] and n.get("role", {}).get("value") in roles]
    assert len(controls) > 30
    nameless = [n["role"]["value"] for n in controls if not n.get("name", {}).get("value", "").strip()]
    assert [role for role in nameless if role != "list"] == []
    names = [n["name"]["value"] for n in controls if n["role"]["value"] == "button"]
    assert {"Wake b", "Sleep a", "More for small", "Swap now"} <= set(names)
    assert await viewer.page.locator(".badge .sr").count() >= 5


async def test_nothing_is_asked_of_another_host_and_the_browser_would_refuse_it(rig: Rig, open_page: Open) -> None:
    viewer = await open_page()
    await viewer.sees("a", "awake")
    ours = (rig.url, rig.url.replace("http", "ws"), "data:")
    assert [url for url in viewer.asked if not url.startswith(ours)] == []
    assert len(viewer.asked) > 10
    async with aiohttp.ClientSession() as session, session.get(rig.url, headers={"accept": "text/html"}) as answer:
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]


async def test_a_page_of_another_site_cannot_open_the_pages_socket(rig: Rig, open_page: Open) -> None:
    await open_page()
    address = f"{rig.url}/_nicegui_ws/socket.io/?EIO=4&transport=websocket"
    async with aiohttp.ClientSession() as session:
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await session.ws_connect(address, origin="http://evil.example")
        assert refused.value.status == 403
        async with session.get(rig.url, headers={"host": "evil.example", "accept": "text/html"}) as answer:
            assert answer.status == 421


# -- what the tests ask ------------------------------------------------------------------------------------------------


def rig_pages(rig: Rig) -> list[int]:
    """Processes of the page that this rig's service started."""
    assert rig.service is not None
    children = psutil.Process(rig.service.pid).children()
    return [c.pid for c in children if "rotator.web" in c.cmdline() and c.status() != psutil.STATUS_ZOMBIE]


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


async def _more_than(found: Locator, count: int) -> bool:
    return await found.count() > count


async def _longer(found: Locator, before: str) -> bool:
    return len(await found.inner_text()) > len(before)


async def _brightness(viewer: Viewer) -> float:
    color = await viewer.page.evaluate("getComputedStyle(document.body).backgroundColor")
    return sum(map(int, re.findall(r"\d+", color)[:3])) / 3


async def _is_light(viewer: Viewer) -> bool:
    return await _brightness(viewer) > 200


async def _tab_to(viewer: Viewer, name: str) -> None:
    """Press Tab until the control of that name has the focus."""
    for _ in range(80):
        await viewer.page.keyboard.press("Tab")
        if await viewer.page.evaluate("document.activeElement.getAttribute('aria-label')") == name:
            return
    raise AssertionError(f"Tab does not reach {name}")
