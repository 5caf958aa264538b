"""What the gateway costs: ``python -m bench.gateway [--json] [--quick]``.

Client, proxy and engine stub are processes of this machine, talking over loopback. Each figure is taken on the direct
path, through a bare pass-through on the same libraries and through the gateway, in rounds that take turns; a figure is
the median of its rounds. Exit code 1 if a target is missed.

A chunk's figure is the mean time from its writing by the engine to its reading by the client, at 100 streams of 20
events/s each; 50 events/s each is shown too, without a bound: on two cores the three processes then wait for each other
more than for their work (a proxy that only copies bytes adds 0.2 to 0.5 ms there).
"""

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

import uvloop
from rich.console import Console
from rich.table import Table

from bench.gateway_load import Streams, at_rate, flat_out, streams
from bench.planner import machine

T = TypeVar("T")
PATHS = ("direct", "bare", "rotator")
CLIENTS = 32
MEMORY_GROWTH_MAX_MIB = 4.0


@dataclass(frozen=True)
class Scale:
    """How much load: seconds a round, rounds, and the shape of the streams."""

    rounds: int
    rate_s: float
    flat_out_s: float
    events: int
    memory_requests: int


FULL = Scale(rounds=5, rate_s=5.0, flat_out_s=4.0, events=100, memory_requests=100_000)
QUICK = Scale(rounds=3, rate_s=2.0, flat_out_s=1.0, events=30, memory_requests=10_000)


@dataclass(frozen=True)
class Verdict:
    name: str
    value: float
    bound: float
    unit: str
    met: bool


@dataclass
class Result:
    latency_p50_ms: dict[str, float] = field(default_factory=dict)
    latency_p99_ms: dict[str, float] = field(default_factory=dict)
    requests_per_s: dict[str, float] = field(default_factory=dict)
    chunk_mean_ms: dict[str, float] = field(default_factory=dict)
    fast_chunk_mean_ms: dict[str, float] = field(default_factory=dict)
    thousand_streams_s: dict[str, float] = field(default_factory=dict)
    streams_lost: dict[str, int] = field(default_factory=dict)
    rss_early_mib: float = 0.0
    rss_late_mib: float = 0.0
    verdicts: list[Verdict] = field(default_factory=list)


@dataclass(frozen=True)
class Rig:
    ports: dict[str, int]
    proxy_pid: int


@contextlib.contextmanager
def running() -> Iterator[Rig]:
    """The stub and both proxies as processes; they end with the block."""
    processes: list[subprocess.Popen[str]] = []

    def start(module: str, *args: str) -> int:
        command = [sys.executable, "-m", module, *args]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent)
        processes.append(process)
        assert process.stdout is not None
        return int(process.stdout.readline())

    try:
        stub = start("bench.gateway_stub")
        url = f"http://127.0.0.1:{stub}"
        ports = {"direct": stub, "bare": start("bench.gateway_proxy", "bare", url)}
        ports["rotator"] = start("bench.gateway_proxy", "rotator", url)
        yield Rig(ports, processes[-1].pid)
    finally:
        for process in processes:
            process.kill()
            process.wait()


async def in_turns(rig: Rig, rounds: int, measure: Callable[[int], Awaitable[T]]) -> dict[str, list[T]]:
    """Every path once a round, each round in another order: what the machine does meanwhile hits all alike."""
    taken: dict[str, list[T]] = {path: [] for path in PATHS}
    for n in range(rounds):
        for path in (*PATHS[n % 3 :], *PATHS[: n % 3]):
            taken[path].append(await measure(rig.ports[path]))
    return taken


async def measure_all(rig: Rig, scale: Scale) -> Result:
    result = Result()
    await in_turns(rig, 1, lambda port: flat_out(port, CLIENTS, seconds=0.5))  # warm caches and connections
    latencies = await in_turns(rig, scale.rounds, lambda port: at_rate(port, 100, scale.rate_s))
    for path, rounds in latencies.items():
        result.latency_p50_ms[path] = statistics.median(map(statistics.median, rounds))
        result.latency_p99_ms[path] = statistics.median(sorted(r)[int(len(r) * 0.99) - 1] for r in rounds)
    rates = await in_turns(rig, scale.rounds, lambda port: flat_out(port, CLIENTS, seconds=scale.flat_out_s))
    result.requests_per_s = {path: statistics.median(rounds) for path, rounds in rates.items()}
    hundred = await in_turns(rig, scale.rounds, lambda port: streams(port, 100, scale.events, 50))
    result.chunk_mean_ms = _mean_delays_ms(hundred)
    fast = await in_turns(rig, scale.rounds, lambda port: streams(port, 100, scale.events, 20))
    result.fast_chunk_mean_ms = _mean_delays_ms(fast)
    thousand = await in_turns(rig, min(3, scale.rounds), lambda port: streams(port, 1000, scale.events // 2, 100))
    result.thousand_streams_s = {path: statistics.median(s.seconds for s in r) for path, r in thousand.items()}
    all_streams = {path: (*hundred[path], *fast[path], *thousand[path]) for path in PATHS}
    result.streams_lost = {path: sum(s.lost for s in all_streams[path]) for path in PATHS}
    await flat_out(rig.ports["rotator"], CLIENTS, requests=scale.memory_requests // 10)
    result.rss_early_mib = _rss_mib(rig.proxy_pid)
    await flat_out(rig.ports["rotator"], CLIENTS, requests=scale.memory_requests)
    result.rss_late_mib = _rss_mib(rig.proxy_pid)
    result.verdicts = list(_judge(result))
    return result


def _mean_delays_ms(taken: dict[str, list[Streams]]) -> dict[str, float]:
    return {path: statistics.median(statistics.fmean(s.delays_ms) for s in rounds) for path, rounds in taken.items()}


def _judge(r: Result) -> Iterator[Verdict]:
    def at_most(name: str, value: float, bound: float, unit: str) -> Verdict:
        return Verdict(name, value, bound, unit, value <= bound)

    def at_least(name: str, value: float, bound: float, unit: str) -> Verdict:
        return Verdict(name, value, bound, unit, value >= bound)

    yield at_most("added latency p50 at 100/s", _added(r.latency_p50_ms), 0.5, "ms")
    yield at_most("added latency p99 at 100/s", _added(r.latency_p99_ms), 1.5, "ms")
    yield at_least("small requests", r.requests_per_s["rotator"], 4000, "/s")
    share = r.requests_per_s["rotator"] / r.requests_per_s["bare"]
    yield at_least("of a bare pass-through", 100 * share, 50, "%")
    yield at_most("added a chunk at 100 streams", _added(r.chunk_mean_ms), 0.2, "ms")
    took = r.thousand_streams_s
    yield at_most("1,000 streams, of direct", took["rotator"] / took["direct"], 1.5, "×")
    yield at_most("streams lost", r.streams_lost["rotator"], 0, "")
    yield at_most("memory growth", r.rss_late_mib - r.rss_early_mib, MEMORY_GROWTH_MAX_MIB, "MiB")


def _added(figures: dict[str, float]) -> float:
    return figures["rotator"] - figures["direct"]


def _rss_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def _show(console: Console, result: Result) -> None:
    table = Table("", *PATHS, box=None)
    for name, figures, digits in (
        ("latency p50, ms", result.latency_p50_ms, 3),
        ("latency p99, ms", result.latency_p99_ms, 3),
        ("small requests/s", result.requests_per_s, 0),
        ("a chunk at 100 streams of 20/s, ms", result.chunk_mean_ms, 3),
        ("a chunk at 100 streams of 50/s, ms", result.fast_chunk_mean_ms, 3),
        ("1,000 streams, s", result.thousand_streams_s, 2),
        ("streams lost", result.streams_lost, 0),
    ):
        table.add_row(name, *(f"{figures[path]:,.{digits}f}" for path in PATHS))
    console.print(table)
    console.print(f"memory of the gateway: {result.rss_early_mib:.1f} MiB early, {result.rss_late_mib:.1f} MiB late\n")
    verdicts = Table("target", "", "bound", "", box=None)
    for v in result.verdicts:
        verdicts.add_row(v.name, f"{v.value:,.3g} {v.unit}", f"{v.bound:g} {v.unit}", "met" if v.met else "MISSED")
    console.print(verdicts)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.gateway", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="less of everything: a look, not a measurement")
    args = parser.parse_args(argv)
    with running() as rig, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        result = runner.run(measure_all(rig, QUICK if args.quick else FULL))
    where = {**machine(), "cores": str(os.cpu_count())}
    if args.json:
        print(json.dumps({**where, **asdict(result)}))
    else:
        console = Console(width=120)
        console.print("\n".join(f"{key}: {value}" for key, value in where.items()), highlight=False)
        _show(console, result)
    return 0 if all(v.met for v in result.verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
