"""What the way through a node's agent costs: ``python -m bench.agent [--json] [--requests N]``.

Engine stub, agent (over mutual TLS) and asker are processes of this machine, on loopback: what is seen is the agent's
work, and no network. Direct and through the agent take turns; a figure is the median of all requests of its path. A
chunk's figure is the time from its writing by the engine to its reading, of one stream of 200 events/s.
"""

import argparse
import asyncio
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import uvloop
from rich.console import Console
from rich.table import Table

from bench.planner import machine
from rotator.adapters.agents import Agents
from rotator.agent.certs import make
from rotator.config_nodes import NodeConfig
from rotator.service.pool import Pool

ROUNDS = 5
EVENTS = 400
GAP_MS = 5
BODY = json.dumps({"model": "bench", "prompt": "x" * 1000}).encode()
STREAM = json.dumps({"model": "bench", "stream": True, "n": EVENTS, "gap_ms": GAP_MS}, separators=(",", ":")).encode()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def ask(pool: Pool, base: str, count: int) -> list[float]:
    """Milliseconds of requests one after another."""
    took = []
    for _ in range(count):
        began = time.perf_counter()
        answer = await pool.ask(b"POST", base, b"/v1/completions", [(b"content-type", b"application/json")], BODY)
        await answer.read()
        took.append((time.perf_counter() - began) * 1e3)
    return took


async def stream(pool: Pool, base: str) -> list[float]:
    """Milliseconds from each event's writing to its reading."""
    answer = await pool.ask(b"POST", base, b"/v1/completions", [(b"content-type", b"application/json")], STREAM)
    took, rest = [], b""
    while chunk := await answer.readany():
        now_ns = time.monotonic_ns()
        *events, rest = (rest + chunk).split(b"\n\n")
        took += [(now_ns - int(e.partition(b'"t":')[2].partition(b",")[0])) / 1e6 for e in events if b'"t":' in e]
    return took


async def measure(folder: Path, engine_port: int, requests: int) -> dict[str, dict[str, float]]:
    """Medians by path: ``request_ms`` and ``chunk_ms``."""
    node, agent = start_agent(folder)
    agents = Agents([node])
    pool = Pool(5.0, agents.door)
    try:
        url = agents.declare("n", "bench", engine_port)
        await until_up(agents)
        paths = {"direct": f"http://127.0.0.1:{engine_port}", "agent": url}
        asked: dict[str, list[float]] = {path: [] for path in paths}
        chunks: dict[str, list[float]] = {path: [] for path in paths}
        for _ in range(ROUNDS):
            for path, base in paths.items():
                asked[path] += await ask(pool, base, requests // ROUNDS)
                chunks[path] += await stream(pool, base)
        return {
            path: {"request_ms": statistics.median(asked[path]), "chunk_ms": statistics.median(chunks[path])}
            for path in paths
        }
    finally:
        pool.close()
        await agents.close()
        agent.terminate()
        agent.wait()


async def until_up(agents: Agents) -> None:
    async with asyncio.timeout(30):
        while not agents.known("n").reachable:
            await asyncio.sleep(0.1)
            await agents.look(deadline_s=1.0)


def start_agent(folder: Path) -> tuple[NodeConfig, "subprocess.Popen[bytes]"]:
    make(folder, {"n": ["127.0.0.1"]})
    port = free_port()
    files = {"ca": "ca.pem", "cert": "n.pem", "key": "n.key", "token_file": "token"}
    (folder / "agent.yaml").write_text(json.dumps({"node": "n", "port": port, **files}))
    command = [sys.executable, "-m", "rotator.agent", "-c", str(folder / "agent.yaml")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    own = {"ca": "ca.pem", "cert": "service.pem", "key": "service.key", "token_file": "token"}
    paths = {name: folder / file for name, file in own.items()}
    return NodeConfig.model_validate({"name": "n", "agent": f"https://127.0.0.1:{port}", **paths}), process


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--requests", type=int, default=2000, help="one after another, on each path")
    arguments = parser.parse_args()
    engine = subprocess.Popen([sys.executable, "-m", "bench.gateway_stub"], stdout=subprocess.PIPE)
    try:
        with tempfile.TemporaryDirectory() as folder:
            assert engine.stdout is not None
            port = int(engine.stdout.readline())
            figures = uvloop.run(measure(Path(folder), port, arguments.requests))
    finally:
        engine.kill()
        engine.wait()
    if arguments.json:
        print(json.dumps({**machine(), "paths": figures}, indent=1))
        return 0
    table = Table("path", "request, ms", "chunk, ms", title="median", box=None)
    for path, found in figures.items():
        table.add_row(path, f"{found['request_ms']:.3f}", f"{found['chunk_ms']:.3f}")
    Console().print(*(f"{k}: {v}" for k, v in machine().items()), sep="\n")
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
