"""A service for those who measure or look: the demo's fleet on simulated GPUs."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp

from rotator.demo.fleet import make_box, write_fleet

_READY_S = 30.0


@contextlib.asynccontextmanager
async def demo_service(folder: Path) -> AsyncIterator[str]:
    """The service with the demo's fleet, nothing started yet, in ``folder``. Yields its address."""
    box, port = make_box(folder), _free_port()
    command = [sys.executable, "-m", "rotator", "serve", "-c", str(write_fleet(folder, box, port))]
    log = await asyncio.to_thread((folder / "service.log").open, "wb")
    process = await asyncio.to_thread(
        subprocess.Popen, command, env={**os.environ, **box.nvml_env()}, stdout=log, stderr=log
    )
    url = f"http://127.0.0.1:{port}"
    try:
        await _ready(url)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        await asyncio.to_thread(process.wait)
        log.close()


async def _ready(url: str) -> None:
    async with asyncio.timeout(_READY_S), aiohttp.ClientSession() as session:
        while True:
            with contextlib.suppress(aiohttp.ClientError):
                async with session.get(f"{url}/readyz") as answer:
                    if answer.status == 200:
                        return
            await asyncio.sleep(0.1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
