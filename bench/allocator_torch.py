"""Our allocator on bare torch beside what stock does and the copy floor, size by size, in one run.

    python -m bench.allocator_torch --phases sizes,packing,cycles,peak [--sizes 64M,1G,8G,64G] [--cycles 1000]

sizes   prepare, first sleep, later sleeps and wakes of 64 MiB to 64 GiB: ours, stock-like, floor; content compared. It
        is noise, which packing makes no smaller
packing the same for normally distributed bf16 weights, with packed masters and without
cycles  many cycles of 8 GiB: content identical, device and host bytes as after the first cycle
peak    the most device memory while a model is loaded with online quantization, beside stock's pool

Each measurement is a process of its own with a deadline and one JSON line (also in $OUT); a table ends it. Exit code 1
when content or bytes differed, or a peak was more than 2 % over stock's.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

GIB, MIB = 1 << 30, 1 << 20
CHUNK = 256 * MIB  # about a large layer's matrix
ROUNDS = 3
SIZES = "64M,256M,1G,4G,16G,64G"
PACKING_SIZES = "1G,8G,32G"


def chunks(nbytes: int) -> Iterator[int]:
    while nbytes > 0:
        yield min(CHUNK, nbytes)
        nbytes -= CHUNK


class Content:
    """Noise, or weights of a normal distribution, that can be made again: every byte is compared and none is stored."""

    def __init__(self, torch: Any, *, weights: bool = False) -> None:
        self.torch, self.weights = torch, weights
        self.scratch = torch.empty(CHUNK // 8, dtype=torch.int64, device="cuda")
        self.generator = torch.Generator(device="cuda")

    def expected(self, number: int, nbytes: int) -> Any:
        self.generator.manual_seed(1000 + number)
        words = self.scratch[: nbytes // 8]
        if self.weights:
            normal = words.view(self.torch.bfloat16).normal_(std=0.02, generator=self.generator)
            return normal.view(self.torch.uint8)
        return words.random_(generator=self.generator).view(self.torch.uint8)

    def same(self, tensors: list[Any]) -> bool:
        return all(self.torch.equal(self.expected(i, t.numel()), t) for i, t in enumerate(tensors))


def timed(operation: Callable[[], object]) -> float:
    begun = time.perf_counter()
    operation()
    return time.perf_counter() - begun


def filled(torch: Any, memory: Any, content: Content, nbytes: int) -> list[Any]:
    with memory.region("weights"):
        tensors = [torch.empty(n, dtype=torch.uint8, device="cuda") for n in chunks(nbytes)]
    for number, tensor in enumerate(tensors):
        tensor.copy_(content.expected(number, tensor.numel()))
    torch.cuda.synchronize()
    return tensors


def size_ours(nbytes: int, *, weights: bool = False, pack: bool = True) -> dict[str, Any]:
    import torch

    from allocator import Allocator, TorchAllocator

    memory, content = TorchAllocator(Allocator(pack=pack)), Content(torch, weights=weights)
    tensors = filled(torch, memory, content, nbytes)
    prepare_s = timed(memory.prepare)
    sleeps, wakes, same = [], [], True
    reports: list[Any] = []
    for _ in range(ROUNDS + 1):
        sleeps.append(timed(lambda: reports.append(memory.sleep())))
        wakes.append(timed(lambda: reports.append(memory.wake())))
        same = same and content.same(tensors)
    host = memory.host_memory()
    usage = memory.memory_usage()
    inside = [{k: getattr(r, k) for k in type(r).__slots__} for r in reports[-2:]]
    del tensors
    return {
        "prepare_s": prepare_s,
        "first_sleep_s": sleeps[0],
        "sleep_s": statistics.median(sleeps[1:]),
        "wake_s": statistics.median(wakes[1:]),
        "content_same": same,
        "masters_over_bytes": host.bytes_used / nbytes,
        "registered_over_bytes": host.bytes_registered / nbytes,
        "mapped_over_allocated": sum(r.bytes_mapped for r in usage) / max(1, sum(r.bytes_allocated for r in usage)),
        "last_sleep": inside[0],
        "last_wake": inside[1],
    }


def size_stock(nbytes: int) -> dict[str, Any]:
    import torch

    from bench.stock_like import StockLike

    torch.cuda.init()
    content, stock = Content(torch), StockLike(torch)
    allocations = [stock.alloc(n) for n in chunks(nbytes)]
    for number, one in enumerate(allocations):
        stock.copy(one.address, content.expected(number, one.nbytes).data_ptr(), one.nbytes)
    sleeps, wakes, same = [], [], True
    for _ in range(ROUNDS + 1):
        sleeps.append(timed(stock.sleep))
        wakes.append(timed(stock.wake))
        for number, one in enumerate(allocations):
            back = torch.empty(one.nbytes, dtype=torch.uint8, device="cuda")
            stock.copy(back.data_ptr(), one.address, one.nbytes)
            same = same and bool(torch.equal(content.expected(number, one.nbytes), back))
    stock.close()
    return {
        "first_sleep_s": sleeps[0],
        "sleep_s": statistics.median(sleeps[1:]),
        "wake_s": statistics.median(wakes[1:]),
        "content_same": same,
    }


def size_floor(nbytes: int) -> dict[str, Any]:
    import torch

    buffer = min(nbytes, 2 * GIB)
    host = torch.empty(buffer, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(nbytes, dtype=torch.uint8, device="cuda")

    def copy() -> None:
        for at in range(0, nbytes, buffer):
            n = min(buffer, nbytes - at)
            target[at : at + n].copy_(host[:n], non_blocking=True)
        torch.cuda.synchronize()

    copy()
    return {"wake_s": statistics.median(timed(copy) for _ in range(ROUNDS))}


def cycles(count: int) -> dict[str, Any]:
    import torch

    from allocator import TorchAllocator

    memory, content = TorchAllocator(), Content(torch)
    tensors = filled(torch, memory, content, 8 * GIB)
    memory.prepare()
    first: tuple[Any, ...] = ()
    different, sleeps, wakes = [], [], []
    for number in range(count):
        sleeps.append(timed(memory.sleep))
        asleep = torch.cuda.mem_get_info()[0]
        wakes.append(timed(memory.wake))
        host = memory.host_memory()
        state = (content.same(tensors), asleep, torch.cuda.mem_get_info()[0], host.bytes_used, host.bytes_registered)
        if number == 1:  # the check of the first cycle takes what torch keeps for itself
            first = state
        if not state[0] or (first and state != first):
            different.append({"cycle": number, "state": state, "first": first})
    del tensors
    return {
        "cycles": count,
        "different": different[:5],
        "different_cycles": len(different),
        "content_same": not different,
        "sleep_s": statistics.median(sleeps),
        "sleep_max_s": max(sleeps),
        "wake_s": statistics.median(wakes),
        "wake_max_s": max(wakes),
    }


def load_quantized(torch: Any, layers: int = 32) -> tuple[list[Any], int]:
    """Layers made in bf16 and quantized to a byte at once, as online quantization does: (weights, least bytes free)."""
    free, kept = torch.cuda.mem_get_info()[0], []
    for _ in range(layers):
        wide = [torch.empty(shape, dtype=torch.bfloat16, device="cuda") for shape in ((10240, 5120), (51200, 5120))]
        scales = [torch.ones(matrix.shape[0], device="cuda") for matrix in wide]
        narrow = [matrix.to(torch.float8_e4m3fn) for matrix in wide]
        free = min(free, torch.cuda.mem_get_info()[0])
        kept += [*narrow, *scales]
        del wide
    return kept, free


def peak(kind: str) -> dict[str, Any]:
    import torch

    torch.cuda.init()
    pool = _pool_of(torch, kind)
    before = torch.cuda.mem_get_info()[0]
    with pool:
        torch._C._accelerator_setAllocatorSettings("max_split_size_mb:20")  # as vLLM loads
        kept, least = load_quantized(torch)
    torch.cuda.synchronize()
    weights = sum(t.numel() * t.element_size() for t in kept)
    after = torch.cuda.mem_get_info()[0]
    return {"weights_bytes": weights, "peak_bytes": before - least, "after_bytes": before - after}


def _pool_of(torch: Any, kind: str) -> Any:
    if kind == "ours":
        from allocator import TorchAllocator

        memory = TorchAllocator()
        torch.cuda.mem_get_info()
        return memory.region("weights")
    try:
        from vllm.device_allocator.cumem import CuMemAllocator
    except ImportError:  # without vLLM: a pool over cudaMalloc peaks as stock's does, and keeps more after
        return torch.cuda.use_mem_pool(torch.cuda.MemPool())
    return CuMemAllocator.get_instance().use_memory_pool("weights")


WORKERS: dict[str, Callable[[int], dict[str, Any]]] = {
    "size-ours": size_ours,
    "size-packed": lambda nbytes: size_ours(nbytes, weights=True),
    "size-plain": lambda nbytes: size_ours(nbytes, weights=True, pack=False),
    "size-stock": size_stock,
    "size-floor": size_floor,
    "cycles": cycles,
    "peak-ours": lambda _: peak("ours"),
    "peak-stock": lambda _: peak("stock"),
}


class Runner:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.end_s = args, time.monotonic() + args.limit_s
        self.rows: list[dict[str, Any]] = []
        self.problems: list[str] = []

    def run(self, worker: str, value: int, limit_s: float) -> dict[str, Any]:
        """One measurement in a process of its own. What fails is a row that says so."""
        left = self.end_s - time.monotonic()
        row: dict[str, Any] = {"worker": worker, "value": value}
        if left < 15:
            row["skipped"] = "out of time"
        else:
            command = [sys.executable, "-m", "bench.allocator_torch", "--worker", worker, "--value", str(value)]
            env = {**os.environ, "ROTATOR_ALLOCATOR": "off"}  # vLLM's own class is wanted here where vLLM is
            if self.args.vllm_pythonpath:
                env["PYTHONPATH"] = os.pathsep.join([os.getcwd(), self.args.vllm_pythonpath])
            try:
                done = subprocess.run(
                    command, env=env, capture_output=True, text=True, timeout=min(limit_s, left), check=False
                )
                row |= self._result(worker, done)
            except subprocess.TimeoutExpired as error:
                row["failed"] = f"no end within {error.timeout:.0f} s"
        if "failed" in row:
            self.problems.append(f"{worker} {value}: {row['failed']}")
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        return row

    @staticmethod
    def _result(worker: str, done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode != 0 or not lines:
            print(f"---- {worker} ends with {done.returncode}:\n{done.stderr[-3000:]}", flush=True)
            return {"failed": f"exit code {done.returncode}"}
        return {**json.loads(lines[-1]), "exit_code": done.returncode}

    def sizes(self) -> None:
        for text in self.args.sizes.split(","):
            nbytes = parse_size(text)
            limit_s = 40 + nbytes / GIB * 4
            rows = {kind: self.run(f"size-{kind}", nbytes, limit_s) for kind in ("floor", "ours", "stock")}
            if rows["ours"].get("content_same") is False:
                self.problems.append(f"{text}: content differed")

    def packing(self) -> None:
        for text in self.args.packing_sizes.split(","):
            nbytes = parse_size(text)
            rows = {
                kind: self.run(f"size-{kind}", nbytes, 60 + nbytes / GIB * 4) for kind in ("floor", "plain", "packed")
            }
            if any(rows[kind].get("content_same") is False for kind in ("plain", "packed")):
                self.problems.append(f"{text} of weights: content differed")

    def cycles(self) -> None:
        row = self.run("cycles", self.args.cycles, 60 + 0.6 * self.args.cycles)
        if row.get("content_same") is False:
            self.problems.append(f"{row['different_cycles']} cycles differed: {row['different']}")

    def peak(self) -> None:
        ours, stock = self.run("peak-ours", 0, 120), self.run("peak-stock", 0, 120)
        if "peak_bytes" in ours and "peak_bytes" in stock:
            over = ours["peak_bytes"] / stock["peak_bytes"] - 1
            print(f"load peak over stock's: {100 * over:+.2f} %", flush=True)
            if over > 0.02:
                self.problems.append(f"the load peak is {100 * over:.2f} % over stock's")

    def table(self) -> str:
        lines = [f"{'GiB':>8}{'first sleep':>24}{'sleep':>24}{'wake':>24}{'floor':>10}{'wake/floor':>12}"]
        by = {(row["worker"], row["value"]): row for row in self.rows}
        for worker, value in list(by):
            if worker != "size-ours":
                continue
            ours, stock, floor = (by.get((f"size-{kind}", value), {}) for kind in ("ours", "stock", "floor"))
            cells = [f"{_s(ours, key)} / {_s(stock, key)}" for key in ("first_sleep_s", "sleep_s", "wake_s")]
            ratio = f"{ours['wake_s'] / floor['wake_s']:.2f}" if "wake_s" in ours and "wake_s" in floor else "–"
            lines.append(
                f"{value / GIB:>8.2f}" + "".join(f"{c:>24}" for c in cells) + f"{_s(floor, 'wake_s'):>10}{ratio:>12}"
            )
        return "\n".join(lines + self._packing_lines(by))

    @staticmethod
    def _packing_lines(by: dict[tuple[str, int], dict[str, Any]]) -> list[str]:
        lines = []
        for (worker, value), row in by.items():
            if worker not in ("size-packed", "size-plain"):
                continue
            floor = by.get(("size-floor", value), {}).get("wake_s")
            over = f"{row['wake_s'] / floor:.2f} x floor" if floor and "wake_s" in row else ""
            times = ", ".join(
                f"{key[:-2].replace('_', ' ')} {_s(row, key)}" for key in ("first_sleep_s", "sleep_s", "wake_s")
            )
            held = row.get("masters_over_bytes", 0.0)
            lines.append(f"{value / GIB:>8.2f} {worker[5:]:8} {times} {over}, masters {held:.3f} of the bytes")
        return lines


def _s(row: dict[str, Any], key: str) -> str:
    return f"{row[key]:.4f}" if key in row else "–"


def parse_size(text: str) -> int:
    return int(float(text[:-1]) * {"M": MIB, "G": GIB}[text[-1].upper()])


def main() -> int:
    args = _arguments()
    if args.worker:
        print(json.dumps(WORKERS[args.worker](args.value), default=str))
        return 0
    runner = Runner(args)
    for phase in args.phases.split(","):
        getattr(runner, phase)()
    print("\nseconds, ours / stock-like\n" + runner.table())
    print("\n".join(runner.problems) or "content and bytes the same")
    if os.environ.get("OUT"):
        lines = "".join(json.dumps(row) + "\n" for row in runner.rows)
        Path(os.environ["OUT"], "allocator_torch.jsonl").write_text(lines)
    return 1 if runner.problems else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phases", default="sizes,packing,cycles,peak")
    parser.add_argument("--sizes", default=SIZES)
    parser.add_argument("--packing-sizes", default=PACKING_SIZES)
    parser.add_argument("--cycles", type=int, default=1000)
    parser.add_argument("--limit-s", type=float, default=570.0, help="for everything")
    parser.add_argument("--vllm-pythonpath", default="", help="measure the load peak beside vLLM's own allocator")
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    parser.add_argument("--value", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
