"""Ranks of one engine asleep and awake together, one process a GPU: what tensor parallelism costs without an engine.

    python -m bench.allocator_ranks --gpus 4 --weights-gib 28 --cache-gib 88 --cycles 8

Every rank sleeps and wakes at the same moment; a cycle counts as long as its slowest rank. The copy floor is measured
in the same run with all ranks copying at once. Gap 0 wakes right behind the sleep, while the driver still clears the
freed memory; gap 1 gives it a second. Prints one JSON line and a table. Exit code 1 when content differs.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

from bench.allocator_floor import rates_gib_s

GIB = 1 << 30


class Rank:
    """One process, told what to do by lines and answering in JSON."""

    def __init__(self, device: int, args: argparse.Namespace) -> None:
        options = ["--weights-gib", str(args.weights_gib), "--cache-gib", str(args.cache_gib), "--rank", str(device)]
        command = [sys.executable, "-m", "bench.allocator_ranks", *options]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def tell(self, what: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a rank ended early")
        return json.loads(line)


def together(ranks: list[Rank], what: str) -> list[Any]:
    for rank in ranks:
        rank.tell(what)
    return [rank.answer() for rank in ranks]


def slowest(reports: list[Any]) -> float:
    return max(float(report["seconds"]) for report in reports)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    floor_s = args.weights_gib / min(rates_gib_s(args.gpus, 4.0, 8))
    ranks = [Rank(device, args) for device in range(args.gpus)]
    try:
        together(ranks, "hello")
        prepared = together(ranks, "prepare")
        rows: dict[str, list[float]] = {"sleep": [], "wake, gap 0": [], "wake, gap 1": []}
        phases: list[Any] = []
        first_s = 0.0
        for gap in (0, 1):
            for _ in range(args.cycles):
                asleep = together(ranks, "sleep")
                first_s = first_s or slowest(asleep)
                rows["sleep"].append(slowest(asleep))
                time.sleep(gap)
                awake = together(ranks, "wake")
                rows[f"wake, gap {gap}"].append(slowest(awake))
                phases = [asleep[0], awake[0]]
        same = all(together(ranks, "check"))
    finally:
        for rank in ranks:
            rank.process.kill()
    return {
        "gpus": args.gpus, "weights_gib": args.weights_gib, "cache_gib": args.cache_gib, "content_same": same,
        "floor_s": round(floor_s, 4), "first_sleep_s": round(first_s, 4),
        "prepare_s": round(slowest(prepared), 2), "phases": phases,
        **{name: [round(value, 4) for value in values] for name, values in rows.items()},
    }  # fmt: skip


def serve(args: argparse.Namespace) -> None:
    """One rank."""
    import torch

    from allocator import Allocator

    memory = Allocator(link_share=1.0)
    weights = [memory.alloc(GIB, device=args.rank) for _ in range(args.weights_gib)]
    for _ in range(args.cache_gib // 2):
        memory.alloc(2 * GIB, device=args.rank, tag="kv_cache")
    device = f"cuda:{args.rank}"

    def view(number: int) -> Any:
        interface = {"shape": (GIB // 8,), "typestr": "<i8", "data": (weights[number].address, False), "version": 3}
        raw = SimpleNamespace(__cuda_array_interface__=interface)
        return torch.as_tensor(raw, device=device)

    def content(number: int) -> Any:
        return torch.arange(GIB // 8, device=device) * 6364136223846793005 + number + 1000 * args.rank

    def prepare() -> dict[str, float]:
        begun = time.perf_counter()
        memory.prepare(wait=False)
        while memory.prepare_status().running:
            time.sleep(0.01)
        return {"seconds": time.perf_counter() - begun}

    for number in range(args.weights_gib):
        view(number).copy_(content(number))
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    steps: dict[str, Callable[[], Any]] = {
        "hello": lambda: True,
        "prepare": prepare,
        "sleep": lambda: asdict(memory.sleep()),
        "wake": lambda: asdict(memory.wake()),
        "check": lambda: all(bool((view(n) == content(n)).all()) for n in range(args.weights_gib)),
    }
    for line in sys.stdin:
        print(json.dumps(steps[line.strip()]()), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--weights-gib", type=int, default=28)
    parser.add_argument("--cache-gib", type=int, default=88)
    parser.add_argument("--cycles", type=int, default=6)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is not None:
        serve(args)
        return 0
    result = measure(args)
    print(json.dumps(result))
    floor_s = result["floor_s"]
    print(f"{args.gpus} GPUs, {args.weights_gib} GiB of weights and {args.cache_gib} GiB of cache each")
    print(f"{'copy floor, s':24}{floor_s:8.3f}")
    print(f"{'first sleep, s':24}{result['first_sleep_s']:8.3f}")
    for name in ("sleep", "wake, gap 0", "wake, gap 1"):
        middle = statistics.median(result[name])
        over = f"  {middle / floor_s:.2f} x floor" if name.startswith("wake") else ""
        print(f"{name + ', s':24}{middle:8.3f}  (max {max(result[name]):.3f}){over}")
    print("content equal" if result["content_same"] else "CONTENT DIFFERS")
    return 0 if result["content_same"] else 1


if __name__ == "__main__":
    sys.exit(main())
