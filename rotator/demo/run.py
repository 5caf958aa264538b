"""`rotator demo`: the whole main job on a machine with no GPU.

Makes a simulated four-GPU box, starts the service and (through it) five engines as processes of their own, plays a
scenario of OpenAI requests that forces swaps, shows it live, and ends with a table and a check of the ledger.
"""

import asyncio
import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import aiohttp
from rich.console import Console

from allocator.box import SimulatedBox
from rotator.demo import result as results
from rotator.demo.client import Client
from rotator.demo.fleet import MODELS, make_box, write_fleet
from rotator.demo.scenario import play
from rotator.demo.screen import Screen

_PORT = 8400
_READY_S = 30.0
_END_S = 20.0
_BOUND_S = 115.0
_PR_SET_PDEATHSIG = 1


class DemoFailed(Exception):
    """The demo could not run; the text says why and what to look at."""


def main(keep: bool, as_json: bool) -> int:
    """Run the demo. Returns 0 when every answer came, every canary passed and the ledger equals the devices."""
    console = Console(stderr=as_json)
    try:
        with _folder() as folder:
            return asyncio.run(_demo(folder, keep, as_json, console))
    except DemoFailed as e:
        console.print(f"the demo failed: {e}", style="bold red", soft_wrap=True)
    except KeyboardInterrupt:
        console.print("stopped")
    return 1


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """A folder of its own, so that two demos never meet. Gone at the end."""
    path = Path(tempfile.mkdtemp(prefix="rotator-demo-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


async def _demo(folder: Path, keep: bool, as_json: bool, console: Console) -> int:
    box = make_box(folder)
    port = _free_port()
    config = write_fleet(folder, box, port)
    async with _service(folder, box, config, port) as url:
        if keep:
            console.print(f"the service is at {url}")
        try:
            async with asyncio.timeout(_BOUND_S):
                result = await _play(url, console)
        except TimeoutError:
            raise DemoFailed(
                f"it was not over after {_BOUND_S:.0f} s; the service's log ends:\n{_tail(folder)}"
            ) from None
        results.show(result, console)
        if as_json:
            print(json.dumps(result, indent=1))
        if keep:
            await _kept(url, console)
    return 0 if results.is_good(result) else 1


# -- the service -----------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def _service(folder: Path, box: SimulatedBox, config: Path, port: int) -> AsyncIterator[str]:
    log = (folder / "service.log").open("wb")
    environment = {**os.environ, **box.nvml_env()}
    command = [sys.executable, "-m", "rotator", "serve", "-c", str(config)]
    service = await asyncio.to_thread(_spawn, command, environment, log)
    try:
        url = f"http://127.0.0.1:{port}"
        await _ready(url, service, folder)
        yield url
    finally:
        service.send_signal(signal.SIGTERM)
        try:
            await asyncio.to_thread(service.wait, _END_S)
        except subprocess.TimeoutExpired:
            service.kill()
            service.wait()
        log.close()


def _spawn(command: list[str], environment: dict[str, str], log: IO[bytes]) -> subprocess.Popen[bytes]:
    # The child runs one C call before exec and takes no lock that a thread of ours could hold.
    return subprocess.Popen(command, stdout=log, stderr=log, env=environment, preexec_fn=_ends_with_us)  # noqa: PLW1509


def _ends_with_us() -> None:
    """If the demo is killed, the service gets SIGTERM and stops its engines: nothing of a demo stays behind."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


async def _ready(url: str, service: subprocess.Popen[bytes], folder: Path) -> None:
    try:
        async with asyncio.timeout(_READY_S), aiohttp.ClientSession() as session:
            while service.poll() is None:
                with contextlib.suppress(aiohttp.ClientError):
                    async with session.get(f"{url}/readyz") as answer:
                        if answer.status == 200:
                            return
                await asyncio.sleep(0.1)
    except TimeoutError:
        raise DemoFailed(f"the service was not ready after {_READY_S:.0f} s; its log ends:\n{_tail(folder)}") from None
    raise DemoFailed(f"the service ended with code {service.returncode}; its log ends:\n{_tail(folder)}")


def _tail(folder: Path) -> str:
    return "\n".join((folder / "service.log").read_text(errors="replace").splitlines()[-15:])


def _free_port() -> int:
    """The usual port if it is free, so that the printed lines look like the documents'; else any."""
    for port in (_PORT, 0):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return int(probe.getsockname()[1])
    raise DemoFailed("there is no free port on 127.0.0.1")


# -- the play --------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Counts:
    """What the event stream told."""

    counts: dict[str, int] = field(default_factory=lambda: {"swaps": 0, "canaries_passed": 0, "canaries_failed": 0})

    def note(self, event: dict[str, Any]) -> None:
        data = event["data"]
        if event["kind"] == "swap.ended" and not data.get("error"):
            self.counts["swaps"] += 1
        if data.get("event") in ("woke", "started"):
            self.counts["canaries_passed"] += 1
        if data.get("event") == "lied":
            self.counts["canaries_failed"] += 1


async def _play(url: str, console: Console) -> dict[str, Any]:
    client, counts = Client(url), _Counts()
    async with aiohttp.ClientSession() as session:
        with Screen(console, [m.name for m in MODELS]) as screen:
            watchers = [
                asyncio.create_task(_follow(session, url, screen, counts)),
                asyncio.create_task(_poll(session, url, screen, client)),
            ]
            try:
                problems = await play(client, screen.say)
                await asyncio.sleep(1.0)  # the last swap's outcome and the next reading of the GPUs
            finally:
                for watcher in watchers:
                    watcher.cancel()
                await asyncio.gather(*watchers, return_exceptions=True)
        engines = await _get(session, f"{url}/engines")
        check = await _get(session, f"{url}/ledger/check")
    return results.summarize(client.outcomes, engines, check, counts.counts, problems)


async def _get(session: aiohttp.ClientSession, url: str) -> Any:
    async with session.get(url) as answer:
        return await answer.json()


async def _follow(session: aiohttp.ClientSession, url: str, screen: Screen, counts: _Counts) -> None:
    loop = asyncio.get_running_loop()
    begun = loop.time()
    timeout = aiohttp.ClientTimeout(total=None)
    async with session.get(f"{url}/events", headers={"last-event-id": "0"}, timeout=timeout) as answer:
        async for raw in answer.content:
            if raw.startswith(b"data: "):
                event = json.loads(raw[6:])
                counts.note(event)
                screen.event(event, loop.time() - begun)


async def _poll(session: aiohttp.ClientSession, url: str, screen: Screen, client: Client) -> None:
    while True:
        engines, gpus = await asyncio.gather(_get(session, f"{url}/engines"), _get(session, f"{url}/gpus"))
        answered = sum(o.done for o in client.outcomes)
        screen.state(engines, gpus, answered, len(client.outcomes))
        await asyncio.sleep(0.25)


async def _kept(url: str, console: Console) -> None:
    console.print("\nIt keeps running. Try, from another terminal:", style="bold")
    body = '{"model": "glm-5.1", "stream": true, "max_tokens": 20, "messages": [{"role": "user", "content": "hello"}]}'
    for line in (
        f"curl -N {url}/v1/chat/completions -H 'content-type: application/json' -d '{body}'",
        f"curl '{url}/plan?model=dsv4-flash'",
        f"curl -X POST '{url}/wake?model=mimo-v2.5-flash&wait=true'",
        f"curl -N {url}/events",
        f"curl {url}/ledger/check",
        f"rotator status --url {url}",
    ):
        console.print(f"  {line}", soft_wrap=True, highlight=False)
    console.print("Ctrl-C ends it.")
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await stop.wait()
