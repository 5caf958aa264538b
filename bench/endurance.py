"""Load and endurance: many clients over eight models, engines killed every minute, the service every five.

    python -m bench.endurance --clients 1000 --minutes 30

Eight stub engines on a simulated four-GPU box, the real service, and clients of their own process that ask again and
again, streamed and not. Every --kill-engine-s one engine that has processes is killed with -9, and every
--kill-service-s the service, which is started again at once. Every request must end: in the whole answer (the same as
this prompt had the first time), in an error that says so, or in a connection that visibly broke. An answer that looks
whole and is not, or no end at all, fails the run; so does a ledger that differs from the devices once all is quiet, and
memory of the service that grows while it lives. Prints a table, and one JSON line with --json.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from allocator.box import SimulatedBox
from bench.endurance_clients import Tally, clients

GPU_GIB, HOST_GIB = 96, 1400
READY_S = 60.0
QUIET_S = 90.0  # for the last swaps, burials and readings once nobody asks any more
GROWTH_MAX_MIB = 64.0  # within one life of the service, after its first minute
WARM_S = 60.0
# name, GPUs, weights and KV cache in GiB a GPU: three that want the whole box, five that want one GPU
MODELS: tuple[tuple[str, tuple[int, ...], int, int], ...] = (
    ("heavy-a", (0, 1, 2, 3), 36, 44),
    ("heavy-b", (0, 1, 2, 3), 60, 20),
    ("heavy-c", (0, 1, 2, 3), 40, 36),
    ("light-a", (0,), 28, 16),
    ("light-b", (1,), 28, 16),
    ("light-c", (2,), 28, 16),
    ("light-d", (3,), 28, 16),
    ("light-e", (3,), 26, 16),
)
NAMES = [name for name, *_ in MODELS]


def write_fleet(folder: Path, box: SimulatedBox, port: int, tokens_per_s: float) -> Path:
    engines = []
    for name, gpus, weights, kv in MODELS:
        command = [sys.executable, "-m", "rotator.demo.engine", "--name", "{name}", "--port", "{port}", "--tp", "{tp}"]
        command += ["--gpus", ",".join(map(str, gpus)), "--tokens-per-s", str(tokens_per_s), "--residue-gib", "0.5"]
        command += ["--weights-gib", str(weights), "--kv-gib", str(kv)]
        footprint = {"awake_gib": weights + kv + 1.5, "residue_gib": 1.5, "host_gib": weights * len(gpus)}
        engines.append({"name": name, "gpus": list(gpus), "command": command, "env": box.env(), "stop_grace_s": 2,
                        "start_deadline_s": 120, "footprint": footprint})  # fmt: skip
    fleet = {
        "bind": {"port": port},
        "state_dir": "state",
        "host_memory_gib": HOST_GIB,
        "gateway": {"wait_deadline_s": 240, "queue_max": 1024},
        # An engine that is shot every few minutes is no crash loop.
        "recovery": {"on_shutdown": "stop", "backoff_first_s": 1, "breaker_failures": 1000},
        "policies": {"longest_wait_s": 120},
        "engines": engines,
    }
    path = folder / "fleet.yaml"
    path.write_text(json.dumps(fleet))
    return path


@dataclass
class Life:
    """One life of the service: its memory every few seconds, (seconds since its start, MiB)."""

    begun_s: float
    memory: list[tuple[float, float]] = field(default_factory=list)

    @property
    def growth_mib(self) -> float | None:
        """From the first warm sample to the last ones' median; None where it did not live long enough."""
        warm = [mib for at, mib in self.memory if at >= WARM_S]
        return statistics.median(warm[-5:]) - statistics.median(warm[:5]) if len(warm) >= 10 else None


class Service:
    """`rotator serve`, killed and started again."""

    def __init__(self, folder: Path, box: SimulatedBox, config: Path, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.lives: list[Life] = []
        self._command = [sys.executable, "-m", "rotator", "serve", "-c", str(config)]
        self._env, self._log = {**os.environ, **box.nvml_env()}, folder / "service.log"
        self._process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = await asyncio.to_thread(
                subprocess.Popen, self._command, stdout=log, stderr=log, env=self._env
            )
        self.lives.append(Life(time.monotonic()))
        deadline = time.monotonic() + READY_S
        async with aiohttp.ClientSession() as session:
            while time.monotonic() < deadline:
                with contextlib.suppress(aiohttp.ClientError):
                    async with session.get(f"{self.url}/readyz") as answer:
                        if answer.status == 200:
                            return
                await asyncio.sleep(0.2)
        raise SystemExit(f"the service was not ready after {READY_S:.0f} s: see {self._log}")

    async def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        await asyncio.to_thread(self._process.wait)
        await self.start()

    def sample(self) -> None:
        assert self._process is not None
        with contextlib.suppress(psutil.Error):
            mib = psutil.Process(self._process.pid).memory_info().rss / (1 << 20)
            self.lives[-1].memory.append((time.monotonic() - self.lives[-1].begun_s, mib))

    async def stop(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        try:
            await asyncio.to_thread(self._process.wait, 60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    async def get(self, path: str) -> Any:
        async with aiohttp.ClientSession() as session, session.get(self.url + path) as answer:
            return await answer.json()


def engine_processes(box: SimulatedBox) -> dict[str, list[psutil.Process]]:
    """Of this run's box, by engine: found by their command line, as an accident finds them."""
    mine = box.env()
    found: dict[str, list[psutil.Process]] = {}
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if "rotator.demo.engine" not in line:
            continue
        with contextlib.suppress(psutil.Error, ValueError):
            environment = process.environ()
            if all(environment.get(key) == value for key, value in mine.items()):
                found.setdefault(line[line.index("--name") + 1], []).append(process)
    return found


class Accidents:
    def __init__(self, service: Service, box: SimulatedBox, draw: random.Random) -> None:
        self._service, self._box, self._draw = service, box, draw
        self.engines_killed: Counter[str] = Counter()

    async def kill_engines(self, every_s: float) -> None:
        while True:
            await asyncio.sleep(every_s)
            running = await asyncio.to_thread(engine_processes, self._box)
            if running:
                name = self._draw.choice(sorted(running))
                for process in running[name]:
                    with contextlib.suppress(psutil.Error):
                        process.kill()
                self.engines_killed[name] += 1

    async def kill_service(self, every_s: float) -> None:
        while True:
            await asyncio.sleep(every_s)
            await self._service.kill()

    async def sample(self) -> None:
        while True:
            await asyncio.sleep(3)
            self._service.sample()


@contextlib.asynccontextmanager
async def running(*coroutines: Any) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(one) for one in coroutines]
    try:
        yield
        for task in tasks:
            if task.done():
                task.result()  # an accident that could not go on is told
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def quiet(service: Service) -> dict[str, Any]:
    """The ledger's comparison with the devices, once it is the same; else as it is after QUIET_S."""
    deadline = time.monotonic() + QUIET_S
    while True:
        check: dict[str, Any] = await service.get("/ledger/check")
        if check["matches"] or time.monotonic() > deadline:
            return check
        await asyncio.sleep(2)


async def endure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    box = SimulatedBox.create(folder / "box", devices=4, memory_bytes=GPU_GIB << 30, context_bytes=1 << 29)
    service = Service(folder, box, write_fleet(folder, box, args.port, args.tokens_per_s), args.port)
    accidents = Accidents(service, box, random.Random(args.seed))
    await service.start()
    tally = Tally(NAMES)
    try:
        async with running(
            accidents.kill_engines(args.kill_engine_s), accidents.kill_service(args.kill_service_s), accidents.sample()
        ):
            await clients(service.url, args.clients, args.minutes * 60, args.seed, tally)
        check = await quiet(service)
        engines = await service.get("/engines")
    finally:
        await service.stop()
    growth = [g for life in service.lives if (g := life.growth_mib) is not None]
    return {
        "clients": args.clients, "minutes": args.minutes, "requests": tally.requests, **tally.outcomes(),
        "dishonest": tally.dishonest[:20], "wait_p50_s": tally.quantile(0.5), "wait_p99_s": tally.quantile(0.99),
        "engines_killed": sum(accidents.engines_killed.values()), "service_killed": len(service.lives) - 1,
        "wakes_of_last_life": sum(e["wakes"] for e in engines), "ledger_matches_devices": check["matches"],
        "differences": check["differences"], "memory_growth_mib": [round(g, 1) for g in growth],
        "memory_max_mib": round(max(mib for life in service.lives for _, mib in life.memory), 1),
        "ledger_mib": round((folder / "state" / "ledger.db").stat().st_size / (1 << 20), 1),
    }  # fmt: skip


def problems(result: dict[str, Any]) -> list[str]:
    found = list(result["dishonest"])
    if not result["answered"]:
        found.append("nobody got an answer")
    if not result["ledger_matches_devices"]:
        found.append(f"ledger and devices differ: {result['differences']}")
    # Each life's growth has its own accidents; what leaks grows in most of them.
    if result["memory_growth_mib"] and statistics.median(result["memory_growth_mib"]) > GROWTH_MAX_MIB:
        found.append(f"the service's memory grew by {result['memory_growth_mib']} MiB in its lives")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--kill-engine-s", type=float, default=60.0)
    parser.add_argument("--kill-service-s", type=float, default=300.0)
    parser.add_argument("--tokens-per-s", type=float, default=4.0, help="of each stream")
    parser.add_argument("--port", type=int, default=8477)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--folder", type=Path, help="kept afterwards; else a temporary one")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rotator-endurance-")))
        folder.mkdir(parents=True, exist_ok=True)
        result = asyncio.run(endure(args, folder.resolve()))
    if args.json:
        print(json.dumps(result))
    for key, value in result.items():
        print(f"{key:24} {value}")
    found = problems(result)
    print("\n".join(found) or "every request ended in an answer, an honest error or a visible break; ledger = devices")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
