"""What the gateway's benchmark measures: ``rotator``, the gateway as the service builds it, and ``bare``, a
pass-through with no features on the same libraries (raw ASGI on uvicorn, aiohttp's client)."""

import asyncio
import gc
import socket
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import aiohttp
import uvicorn
import uvloop

from rotator.config import BindConfig, GatewayConfig, OverridesConfig
from rotator.service.events import EventBus
from rotator.service.front import Front
from rotator.service.gateway import Gateway
from rotator.service.keys import Keys
from rotator.service.metrics import Metrics
from rotator.service.responses import Receive, Scope, Send
from rotator.service.routes import Target
from rotator.service.traffic import Limits, Traffic
from rotator.service.wire import CorkedProtocol


class OneEngine:
    """A fleet of one engine, always awake."""

    def __init__(self, url: str) -> None:
        self._target = Target("bench", url, "bench", "bench", OverridesConfig())

    def resolve(self, model: str) -> Target | None:
        return self._target if model == "bench" else None

    def targets(self) -> Iterable[Target]:
        return (self._target,)

    def running(self) -> Sequence[Target]:
        return (self._target,)

    def state(self, engine: str) -> str:
        return "awake"


def rotator(url: str) -> Any:
    metrics = Metrics()
    traffic = Traffic(
        queue_total_max=4096, on_demand=lambda _: None, on_request_end=metrics.request_ended, eta=lambda _: 0.0
    )
    traffic.configure({"bench": Limits(256, 600, 8)})
    traffic.open("bench")
    keys = Keys((), BindConfig())
    gateway = Gateway(
        traffic=traffic,
        directory=OneEngine(url),
        config=GatewayConfig(),
        bus=EventBus(),
        metrics=metrics,
        authorize=keys.authorize,
        guard=keys.guard,
    )
    return Front(gateway, _nothing)


async def _nothing(scope: Scope, receive: Receive, send: Send) -> None:
    raise AssertionError("the benchmark asks the gateway only")


class Bare:
    def __init__(self, url: str) -> None:
        self._url = url
        self._session: aiohttp.ClientSession | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),
                timeout=aiohttp.ClientTimeout(total=None),
                auto_decompress=False,
            )
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        headers = {"content-type": "application/json"}
        async with self._session.post(self._url + scope["path"], data=body, headers=headers) as response:
            kept = [(k, v) for k, v in response.raw_headers if k.lower() != b"transfer-encoding"]
            await send({"type": "http.response.start", "status": response.status, "headers": kept})
            async for chunk in response.content.iter_any():
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def serve(kind: str, url: str) -> None:
    """Listen on a free loopback port, print it, and serve until the process is ended."""
    app = rotator(url) if kind == "rotator" else Bare(url)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    config = uvicorn.Config(
        app,
        http=CorkedProtocol if kind == "rotator" else "httptools",
        lifespan="off",
        access_log=False,
        log_level="warning",
        server_header=False,
        backlog=4096,
        timeout_keep_alive=75,
    )
    gc.freeze()
    await uvicorn.Server(config).serve([listener])


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(sys.argv[1], sys.argv[2]))
