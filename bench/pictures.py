"""The pictures of the page in the README: ``python -m bench.pictures docs/images``.

A demo fleet takes turns for a while, so that there is something to see; then a headless Chromium looks at its page:
light, dark and on a phone. About two minutes.
"""

import argparse
import asyncio
import contextlib
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import aiohttp
from playwright.async_api import Browser, Page, async_playwright

from bench.chromium import FLAGS, executable
from bench.demo_service import demo_service
from rotator.demo.fleet import MODELS

PICTURE_BYTES_MAX = 300_000
_PLAY_S = 75.0
_SETTLE_S = 4.0
_SEED = 7
_WIDE: dict[str, Any] = {"viewport": {"width": 1360, "height": 1130}}
_PHONE: dict[str, Any] = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where page-light.png, page-dark.png and page-phone.png go")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    return asyncio.run(_pictures(arguments.folder))


async def _pictures(folder: Path) -> int:
    with tempfile.TemporaryDirectory(prefix="rotator-pictures-") as work:
        async with demo_service(Path(work)) as url, aiohttp.ClientSession() as session:
            await _prepare(session, url)
            await _play(session, url, _PLAY_S)
            crowd = asyncio.create_task(_crowd(session, url))
            try:
                made = await _take(url, folder)
            finally:
                crowd.cancel()
                await asyncio.gather(crowd, return_exceptions=True)
    sizes = {path: path.stat().st_size for path in made}
    for path, size in sizes.items():
        print(f"{path} {size} bytes")
    return 1 if max(sizes.values()) > PICTURE_BYTES_MAX else 0


# -- the fleet -------------------------------------------------------------------------------------------------------


async def _prepare(session: aiohttp.ClientSession, url: str) -> None:
    body = {"engines": ["glm-5.1"], "start": "2026-12-01T20:00", "duration_s": 7200, "note": "nightly evaluation"}
    await _post(session, f"{url}/reservations", body)


async def _play(session: aiohttp.ClientSession, url: str, for_s: float) -> None:
    """Requests of several clients, each to a model of its own liking for a while."""
    async with asyncio.timeout(for_s + 60):
        end_s = asyncio.get_running_loop().time() + for_s
        await asyncio.gather(*(_client(session, url, random.Random(_SEED + i), end_s) for i in range(3)))


async def _client(session: aiohttp.ClientSession, url: str, chance: random.Random, end_s: float) -> None:
    loop = asyncio.get_running_loop()
    while loop.time() < end_s:
        model = chance.choice(MODELS).name
        for _ in range(chance.randint(1, 3)):
            await _chat(session, url, model, chance.randint(20, 120))
        await asyncio.sleep(chance.uniform(2.0, 9.0))


async def _crowd(session: aiohttp.ClientSession, url: str) -> None:
    """More than can be served at once, for as long as the pictures take; one engine fails to wake."""
    await _chat(session, url, "dsv4-flash", 5)
    async with session.get(f"{url}/engines/mimo-v2.5-flash") as answer:
        engine = await answer.json()
    await _post(session, f"{engine['url']}/stub/misbehave", {"once": True, "fail_wake_rank": 2})
    with contextlib.suppress(aiohttp.ClientError):
        await _post(session, f"{url}/wake", {"model": "mimo-v2.5-flash"})
    names = ("glm-5.1", "glm-5.1", "dsv4-flash", "mimo-v2.5-flash", "qwen3.6-27b", "gemma-4-26b")
    await asyncio.gather(*(_again(session, url, name) for name in names))


async def _again(session: aiohttp.ClientSession, url: str, model: str) -> None:
    while True:
        await _chat(session, url, model, 400)


async def _chat(session: aiohttp.ClientSession, url: str, model: str, tokens: int) -> None:
    body = {"model": model, "max_tokens": tokens, "messages": [{"role": "user", "content": "hello"}]}
    await _post(session, f"{url}/v1/chat/completions", body)


async def _post(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> None:
    async with session.post(url, json=body) as answer:
        await answer.read()


# -- the pictures ----------------------------------------------------------------------------------------------------


async def _take(url: str, folder: Path) -> list[Path]:
    light, dark, phone = (folder / f"page-{name}.png" for name in ("light", "dark", "phone"))
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=executable(), args=list(FLAGS))
        page = await _open(browser, url, **_WIDE)
        await page.locator("#swaps li.failed").first.wait_for(timeout=60_000)
        await page.screenshot(path=light)
        page = await _open(browser, url, color_scheme="dark", **_WIDE)
        await page.get_by_role("button", name="More for glm-5.1").click()
        await page.get_by_role("menuitem", name="Show plan").click()
        await asyncio.sleep(_SETTLE_S)
        await page.evaluate("document.querySelector('#swaps').scrollIntoView()")
        await asyncio.sleep(1)
        await page.screenshot(path=dark)
        page = await _open(browser, url, device_scale_factor=2, **_PHONE)
        await page.screenshot(path=phone)
        await browser.close()
    return [light, dark, phone]


async def _open(browser: Browser, url: str, **how: Any) -> Page:
    page = await (await browser.new_context(**how)).new_page()
    await page.goto(url)
    await page.wait_for_selector(".engine")
    await asyncio.sleep(_SETTLE_S)
    return page


if __name__ == "__main__":
    sys.exit(main())
