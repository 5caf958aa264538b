"""What the page costs the requests: ``python -m bench.page``.

Three figures. What the front door spends on a request to a model, with a page and without. How long the page's process
draws one page: that long nothing else would run, were it drawn in the service. And what a client of the gateway waits
for ``/v1/models`` while nobody looks, while pages are open, and while they are opened all the time.
"""

import asyncio
import contextlib
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
from playwright.async_api import async_playwright
from rich.console import Console
from rich.table import Table
from starlette.types import Receive, Scope, Send

from bench.chromium import FLAGS, executable
from bench.demo_service import demo_service
from bench.planner import machine
from rotator.config import PageConfig
from rotator.service.front import Front
from rotator.service.gateway import Gateway
from rotator.service.keys import Keys
from rotator.web.door import Door
from rotator.web.room import Room

_CALLS = 200_000
_DRAWS = 30
_ROUND_S = 8.0
_EVERY_S = 0.005
_VIEWERS = 4
_OPEN_EVERY_S = 0.5
_HTML = {"accept": "text/html"}


class _NullGateway:
    handles = staticmethod(Gateway.handles)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        return None


async def _nothing(*_: Any) -> None:
    return None


def main() -> int:
    return asyncio.run(_main())


async def _main() -> int:
    door = Door(Keys(), Room(_nothing, Path("/dev/null")), PageConfig())
    table = Table("figure", "value", title=", ".join(machine().values()))
    for name, page in (("front door, no page", None), ("front door, with a page", door)):
        table.add_row(name, f"{await _dispatch_ns(page):.0f} ns a request")
    with tempfile.TemporaryDirectory(prefix="rotator-page-bench-") as folder:
        async with demo_service(Path(folder)) as url, aiohttp.ClientSession() as session:
            draws = await _draws_ms(session, url)
            table.add_row("one page drawn, p50 / max", f"{statistics.median(draws):.0f} / {max(draws):.0f} ms")
            table.add_row("gateway, nobody looks", _told(await _gateway_ms(session, url)))
            async with async_playwright() as playwright:
                browser = await playwright.chromium.launch(executable_path=executable(), args=list(FLAGS))
                for _ in range(_VIEWERS):
                    await (await browser.new_page()).goto(url)
                table.add_row(f"gateway, {_VIEWERS} pages open", _told(await _gateway_ms(session, url)))
                await browser.close()
            opening = asyncio.create_task(_open_all_the_time(url))
            table.add_row("gateway, two pages opened a second", _told(await _gateway_ms(session, url)))
            opening.cancel()
            await asyncio.gather(opening, return_exceptions=True)
    Console().print(table)
    return 0


async def _dispatch_ns(page: Door | None) -> float:
    front = Front(_NullGateway(), _nothing, page)  # type: ignore[arg-type] # one that does nothing
    scope: Scope = {"type": "http", "path": "/v1/chat/completions", "method": "POST", "headers": []}
    rounds = []
    for _ in range(5):
        begun = time.perf_counter_ns()
        for _ in range(_CALLS // 5):
            await front(scope, _nothing, _nothing)  # type: ignore[arg-type]
        rounds.append((time.perf_counter_ns() - begun) / (_CALLS // 5))
    return statistics.median(rounds)


async def _draws_ms(session: aiohttp.ClientSession, url: str) -> list[float]:
    await _get(session, url)  # begins the process
    found = []
    for _ in range(_DRAWS):
        begun = time.perf_counter()
        await _get(session, url)
        found.append((time.perf_counter() - begun) * 1000)
    return found


async def _open_all_the_time(url: str) -> None:
    async with aiohttp.ClientSession() as session:
        while True:
            await _get(session, url)
            await asyncio.sleep(_OPEN_EVERY_S)


async def _get(session: aiohttp.ClientSession, url: str) -> None:
    async with session.get(url, headers=_HTML) as answer:
        await answer.read()


async def _gateway_ms(session: aiohttp.ClientSession, url: str) -> list[float]:
    loop, found = asyncio.get_running_loop(), []
    end_s = loop.time() + _ROUND_S
    while loop.time() < end_s:
        begun = time.perf_counter()
        with contextlib.suppress(aiohttp.ClientError):
            async with session.get(f"{url}/v1/models") as answer:
                await answer.read()
            found.append((time.perf_counter() - begun) * 1000)
        await asyncio.sleep(_EVERY_S)
    return found


def _told(times_ms: list[float]) -> str:
    cuts = statistics.quantiles(times_ms, n=100)
    return f"p50 {cuts[49]:.2f} ms, p99 {cuts[98]:.2f} ms, max {max(times_ms):.1f} ms"


if __name__ == "__main__":
    sys.exit(main())
