"""A gateway on a real server with engines on real sockets, all in one event loop, for the tests in this folder."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import uvicorn
from aiohttp import web

from rotator.config import FallbackConfig, GatewayConfig, OverridesConfig
from rotator.service.events import EventBus
from rotator.service.gateway import Gateway
from rotator.service.metrics import Metrics
from rotator.service.routes import Target
from rotator.service.traffic import Limits, Traffic
from rotator.service.wire import CorkedProtocol

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


async def until(condition: Callable[[], bool], bound_s: float = 5.0) -> None:
    """Wait for what must come true by itself soon."""
    async with asyncio.timeout(bound_s):
        while not condition():  # noqa: ASYNC110 # the condition is another part's state, with no event to wait on
            await asyncio.sleep(0.002)


@dataclass
class Seen:
    method: str
    path: str  # with the query, as it came
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class FakeEngine:
    """Answers whatever ``answer`` says, records what it got, and counts the requests whose client left."""

    def __init__(self) -> None:
        self.seen: list[Seen] = []
        self.left = 0
        self.open = 0
        self.answer: Answer = _echo
        self.url = ""
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{tail:.*}", self._handle)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body = b"" if request.headers.get("Upgrade") else await request.read()
        self.seen.append(Seen(request.method, request.raw_path, dict(request.headers), body))
        self.open += 1
        try:
            return await self.answer(request)
        except (asyncio.CancelledError, ConnectionResetError):
            self.left += 1
            raise
        finally:
            self.open -= 1


async def _echo(request: web.Request) -> web.StreamResponse:
    return web.Response(body=await request.read(), content_type="application/json")


class Script:
    """An SSE answer that a test writes event by event."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self._queue: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._request: web.Request | None = None

    def say(self, data: bytes) -> None:
        self._queue.put_nowait(data)

    def end(self) -> None:
        self._queue.put_nowait(None)

    def die(self) -> None:
        """Break the connection in the middle of the answer."""
        assert self._request is not None
        assert self._request.transport is not None
        self._request.transport.close()

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        self._request = request
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        self.begun.set()
        while (data := await self._queue.get()) is not None:
            await response.write(data)
        await response.write_eof()
        return response


class FakeDirectory:
    def __init__(self) -> None:
        self.names: dict[str, Target] = {}
        self.states: dict[str, str] = {}

    def resolve(self, model: str) -> Target | None:
        return self.names.get(model)

    def targets(self) -> list[Target]:
        return list(self.names.values())

    def state(self, engine: str) -> str:
        return self.states.get(engine, "awake")

    def running(self) -> list[Target]:
        return [t for name, t in self.names.items() if name == t.engine and self.state(name) != "stopped"]


@dataclass
class Rig:
    traffic: Traffic
    directory: FakeDirectory
    bus: EventBus
    metrics: Metrics
    gateway: Gateway
    engines: dict[str, FakeEngine]
    url: str
    port: int
    client: aiohttp.ClientSession
    demands: list[str] = field(default_factory=list)
    ends: list[tuple[str, str]] = field(default_factory=list)

    def post(self, path: str, body: Any = None, **options: Any) -> Any:
        """A request as a context manager. ``body`` is JSON, or raw bytes."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **options.pop("headers", {})}
        return self.client.post(self.url + path, data=data, headers=headers, **options)

    async def posted(self, path: str, body: Any = None, **options: Any) -> tuple[aiohttp.ClientResponse, bytes]:
        async with self.post(path, body, **options) as response:
            return response, await response.read()

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [{"engine": e.engine, **e.data} for e in self.bus.since(0) if e.kind == kind]


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.asynccontextmanager
async def rig_up(
    engines: tuple[str, ...] = ("a", "b"),
    *,
    aliases: dict[str, str] | None = None,
    served: dict[str, str] | None = None,
    overrides: dict[str, OverridesConfig] | None = None,
    fallbacks: dict[str, FallbackConfig] | None = None,
    environ: dict[str, str] | None = None,
    config: GatewayConfig | None = None,
    eta_s: float | None = 5.0,
    is_open: bool = True,
    **gateway_options: Any,
) -> AsyncIterator[Rig]:
    """A running gateway over fake engines, gates open unless told otherwise."""
    config = config or GatewayConfig()
    bus, metrics, directory = EventBus(), Metrics(), FakeDirectory()
    demands: list[str] = []
    ends: list[tuple[str, str]] = []

    def ended(model: str, waited_s: float, outcome: str) -> None:
        ends.append((model, outcome))
        metrics.request_ended(model, waited_s, outcome)

    traffic = Traffic(
        queue_total_max=config.queue_total_max, on_demand=demands.append, on_request_end=ended, eta=lambda _: eta_s
    )
    traffic.configure({e: Limits(config.queue_max, config.wait_deadline_s, config.freezes_max) for e in engines})
    fakes = {name: FakeEngine() for name in engines}
    for name, fake in fakes.items():
        await fake.start()
        names = [name, *(alias for alias, engine in (aliases or {}).items() if engine == name)]
        for requested in names:
            directory.names[requested] = Target(
                name,
                fake.url,
                (served or {}).get(name, name),
                requested,
                (overrides or {}).get(name, OverridesConfig()),
                (fallbacks or {}).get(name),
            )
        if is_open:
            traffic.open(name)
    gateway = Gateway(
        traffic=traffic,
        directory=directory,
        config=config,
        bus=bus,
        metrics=metrics,
        environ=environ or {},
        **gateway_options,
    )
    async with _serving(gateway) as port, aiohttp.ClientSession(auto_decompress=False) as client:
        url = f"http://127.0.0.1:{port}"
        yield Rig(traffic, directory, bus, metrics, gateway, fakes, url, port, client, demands, ends)
    await gateway.close()
    for fake in fakes.values():
        await fake.stop()


@contextlib.asynccontextmanager
async def _serving(app: Any) -> AsyncIterator[int]:
    server = _Server(
        uvicorn.Config(
            app,
            host="127.0.0.1",
            port=0,
            http=CorkedProtocol,
            ws="websockets-sansio",
            lifespan="off",
            log_level="critical",
            timeout_graceful_shutdown=1,
        )
    )
    serving = asyncio.create_task(server.serve())
    await until(lambda: server.started)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        await serving


class RawClient:
    """A connection whose bytes a test writes and reads itself."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def request(self, method: str, target: str, body: bytes = b"", **headers: str) -> None:
        lines = [f"{method} {target} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        self.writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        await self.writer.drain()

    async def everything(self) -> bytes:
        """All bytes until the server closes."""
        async with asyncio.timeout(10):
            return await self.reader.read()

    async def until(self, mark: bytes) -> bytes:
        async with asyncio.timeout(10):
            return await self.reader.readuntil(mark)

    async def status(self) -> int:
        return int((await self.until(b"\r\n")).split()[1])

    def leave(self) -> None:
        self.writer.transport.abort()


@contextlib.asynccontextmanager
async def raw_client(rig: Rig) -> AsyncIterator[RawClient]:
    reader, writer = await asyncio.open_connection("127.0.0.1", rig.port, limit=1 << 24)
    try:
        yield RawClient(reader, writer)
    finally:
        writer.transport.abort()


def chat(model: str = "a", **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": "hi"}], **more}
