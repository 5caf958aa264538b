"""A whole agent on loopback, over real TLS, with devices by hand and an engine that says what the test wants."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from rotator.adapters.agents import Agents
from rotator.agent.certs import make
from rotator.agent.run import assemble, listen
from rotator.agent.settings import AgentConfig, read_token
from rotator.config_nodes import NodeConfig
from rotator.core.gpu_faults import GpuHealth
from rotator.ports import DeviceError, GpuInfo, GpuReading

GIB = 1 << 30


@dataclass
class HandDevices:
    """``error`` is raised instead of a reading."""

    error: Exception | None = None
    by_pid: dict[int, int] | None = field(default_factory=lambda: {4711: 5 * GIB})

    async def inventory(self, *, deadline_s: float) -> tuple[GpuInfo, ...]:
        return (GpuInfo("GPU-x", 0, "card", 96 * GIB, (12, 0), "0000:01:00.0"),)

    async def read(self, gpu: str, *, deadline_s: float) -> GpuReading:
        if self.error is not None:
            raise self.error
        if gpu != "GPU-x":
            raise DeviceError("no such GPU")
        return GpuReading(gpu, 6 * GIB, 96 * GIB, self.by_pid, 0.5)


class HandReports:
    async def health(self, gpu: str, *, deadline_s: float) -> GpuHealth:
        return GpuHealth(gpu, xids=(79, 48), ecc_uncorrected=3, remap_pending=True)


@dataclass
class Running:
    """A running agent and the files that belong to it."""

    port: int
    tls: Path
    devices: HandDevices

    def node(self, **more: Any) -> NodeConfig:
        files = {"ca": "ca.pem", "cert": "service.pem", "key": "service.key", "token_file": "token"}
        paths = {name: self.tls / file for name, file in files.items()}
        return NodeConfig(**{"name": "n", "agent": f"https://127.0.0.1:{self.port}", **paths, **more})


@contextlib.asynccontextmanager
async def agent_up(tls: Path, **more: Any) -> AsyncIterator[Running]:
    make(tls, {"n": ["127.0.0.1"]})
    files = {"ca": tls / "ca.pem", "cert": tls / "n.pem", "key": tls / "n.key", "token_file": tls / "token"}
    config = AgentConfig(**{"node": "n", "port": 0, **files, **more})
    listener = listen(config.host, 0)
    port = int(listener.getsockname()[1])
    devices = HandDevices()
    server, relay = assemble(config, read_token(config.token_file), devices, HandReports(), port)
    serving = asyncio.create_task(server.serve([listener]))
    try:
        yield Running(port, tls, devices)
    finally:
        server.should_exit = server.force_exit = True
        await serving
        await relay.close()


@pytest.fixture(scope="session")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tls")


@pytest.fixture
async def agent(tls: Path) -> AsyncIterator[Running]:
    async with agent_up(tls, body_max_mib=1) as running:
        yield running


@pytest.fixture
async def agents(agent: Running) -> AsyncIterator[Agents]:
    made = Agents([agent.node()])
    yield made
    await made.close()


@contextlib.asynccontextmanager
async def engine_up(answer: Callable[[web.Request], Any]) -> AsyncIterator[int]:
    """An engine on loopback that answers everything by ``answer``. Yields its port."""
    app = web.Application(client_max_size=16 << 20)
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield int(runner.addresses[0][1])
    finally:
        await runner.cleanup()
