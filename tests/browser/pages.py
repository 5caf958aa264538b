"""One open page, as a person has it before them: what it shows, by the words on it."""

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from playwright.async_api import Browser, BrowserContext, Locator, Page, expect

SOON_MS = 25_000  # two cores may be shared by many


@dataclass
class Viewer:
    """``asked`` is every address that the page asked for; ``broken`` what its scripts complained of."""

    context: BrowserContext
    page: Page
    asked: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    def engine(self, name: str) -> Locator:
        return self.page.locator(".engine").filter(has=self.page.locator(".name b", has_text=re.compile(f"^{name}$")))

    async def sees(self, engine: str, state: str, within_ms: int = SOON_MS) -> None:
        badge = self.engine(engine).locator(".badge")
        await expect(badge).to_have_text(f"state: {state}", timeout=within_ms)

    def button(self, name: str) -> Locator:
        return self.page.get_by_role("button", name=name, exact=True)

    def section(self, name: str) -> Locator:
        return self.page.locator(f"#{name}")

    async def confirm(self) -> None:
        await self.page.get_by_role("button", name="Do it").click()

    async def close(self) -> None:
        await self.context.close()


Open = Callable[..., Awaitable[Viewer]]


async def open_viewer(browser: Browser, url: str, *, wait: str = ".engine", **context: Any) -> Viewer:
    """Open the page and wait until ``wait`` is on it."""
    made = await browser.new_context(**context)
    page = await made.new_page()
    viewer = Viewer(made, page)
    page.on("request", lambda request: viewer.asked.append(request.url))
    page.on("websocket", lambda socket: viewer.asked.append(socket.url))
    page.on("pageerror", lambda error: viewer.broken.append(str(error)))
    await page.goto(url)
    await page.wait_for_selector(wait, timeout=SOON_MS)
    return viewer
