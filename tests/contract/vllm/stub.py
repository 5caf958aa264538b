"""A stub engine in the test's own process, on a loopback port, over plain memory."""

from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from rotator.demo.core import Core
from rotator.demo.dialects import stub_dialect
from rotator.demo.engine import build_app
from rotator.demo.memory import PlainMemory
from rotator.demo.misbehave import Misbehaviour
from rotator.demo.sequences import Speed

MODEL = "m"


@dataclass
class Stub:
    core: Core
    ranks: list[PlainMemory]
    runner: web.AppRunner
    url: str = ""
    deaths: list[int] = field(default_factory=list)
    asked: list[tuple[str, str, bytes]] = field(default_factory=list)  # method, path with query, body

    def misbehave(self, **ways: Any) -> None:
        self.core.misbehaviour = Misbehaviour(**ways)

    def asked_paths(self) -> list[str]:
        return [path for _, path, _ in self.asked]


async def start_stub(version: str, *, task: str = "generate", dev_mode: bool = True, tp: int = 2, **ways: Any) -> Stub:
    ranks = [PlainMemory() for _ in range(tp)]
    deaths: list[int] = []
    core = Core(
        ranks,
        seed=MODEL,
        dialect=stub_dialect(version),
        speed=Speed(tokens_per_s=1000.0),
        misbehaviour=Misbehaviour(**ways),
        die=deaths.append,
    )
    core.load()
    app = build_app(core, [MODEL], version=version, dev_mode=dev_mode, task=task)
    asked: list[tuple[str, str, bytes]] = []

    @web.middleware
    async def record(request: web.Request, handler: Any) -> Any:
        # A multipart body can be read only once, and that is the route's to do.
        body = b"" if request.content_type.startswith("multipart/") else await request.read()
        asked.append((request.method, request.path_qs, body))
        return await handler(request)

    app.middlewares.insert(0, record)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    return Stub(core, ranks, runner, f"http://127.0.0.1:{port}", deaths, asked)
