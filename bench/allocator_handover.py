"""What a swap saves when one process hands its device memory to another, and what slows ranks that release at once.

    python -m bench.allocator_handover --gpus 2 --weights-gib 28 --cache-gib 88 --cycles 6 [--phase handover]

Phase handover: two processes take turns on the first GPU. Either the one that falls asleep releases its handles and the
other creates new ones; or handles go over a socket as file descriptors; or both keep all handles for ever and only map
and unmap (shared pool). A wake has everything mapped before it copies, so its steps add up. Told beside the times: what
a waking process finds in its cache, what NVML charges to whom, and whether an imported handle can be exported again.

Phase release (bench/allocator_release.py): one process a GPU, alone and all at once, by handle size, flags and the way
of releasing. `cpu` is processor time of unmap and release together, `waits` how often the process slept meanwhile.

Needs torch (handover), cuda-bindings and GPUs. Prints a table and one JSON line a variant, seconds each. Exit code 0
well, 1 wrong content or a leak, 2 it cannot run.
"""

import argparse
import importlib
import mmap
import os
import resource
import socket
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

from bench.allocator_release import release
from bench.driver_process import (
    ANSWER_S,
    GIB,
    SLAB,
    CannotRunError,
    Child,
    Driver,
    Region,
    Steps,
    end,
    map_all,
    middle,
    no_leak,
    table,
    tell,
    together,
)

FDS_MAX = 253  # the kernel's SCM_MAX_FD, a message

RELEASE, HANDOVER, AT_ONCE, POOL = "release/create", "handover", "handover, both at once", "shared pool"
# Before each handover and each sharing somebody has created handles: whether imported ones export again is not known.
CYCLE = (RELEASE, HANDOVER, RELEASE, AT_ONCE, RELEASE)
STEPS = ("unmap", "export", "send", "release", "receive", "create", "import", "map", "access", "copy", "total")


class Engine:
    """One of the two processes that take turns; awake it has weights with its own content, and a cache."""

    def __init__(self, number: int, link: socket.socket, weights_gib: int, cache_gib: int) -> None:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        self.torch: Any = importlib.import_module("torch")
        self.number, self.link = number, link
        self.link.settimeout(ANSWER_S)
        self.driver = Driver(0)
        self.properties = self.driver.properties(rdma=True, exportable=True)
        self.weights, self.cache = Region(self.driver, weights_gib * GIB), Region(self.driver, cache_gib * GIB)
        self.regions = (self.weights, self.cache)
        self.streams = [self.driver("cuStreamCreate", 1) for _ in range(2)]
        self.pattern = self.torch.arange(SLAB // 8) * 6364136223846793005
        self.arena = mmap.mmap(-1, self.weights.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def prepare(self) -> Steps:
        """Fills the host's copy of the weights, which prefaults it in parallel, and pins it."""
        steps = Steps()
        with suppress(OSError):
            self.arena.madvise(mmap.MADV_HUGEPAGE)
        host = self.torch.frombuffer(self.arena, dtype=self.torch.int64)
        with steps.step("fill"):
            for number, at in enumerate(range(0, host.numel(), SLAB // 8)):
                self.torch.add(self.pattern, self.seed(number), out=host[at : at + SLAB // 8])
        self.host = int(host.data_ptr())
        with steps.step("register"):
            self.driver("cuMemHostRegister", self.host, self.weights.nbytes, 1)
        self.pattern = self.pattern.to("cuda:0")
        return steps

    def seed(self, number: int) -> int:
        return 1_000_003 * (self.number + 1) + number

    def sleep(self, way: str) -> Steps:
        steps = Steps()
        with steps.step("unmap"):
            for region in self.regions:
                region.unmap()
        if way in (HANDOVER, AT_ONCE):
            self.send(steps)
        if way != POOL:
            self.drop(steps)
        return steps

    def wake(self, way: str) -> Steps:
        steps = Steps()
        if way == RELEASE:
            with steps.step("create"):
                for region in self.regions:
                    region.create(self.properties)
        elif way != POOL:
            self.receive(steps)
        map_all(self.regions, steps)
        with steps.step("copy"):
            self.copy()
        return steps

    def send(self, steps: Steps | None = None) -> Steps:
        """All handles to the other process."""
        steps = Steps() if steps is None else steps
        handles = [handle for region in self.regions for handle in region.handles]
        with steps.step("export"):
            fds = [int(self.driver("cuMemExportToShareableHandle", one, self.driver.fd_type, 0)) for one in handles]
        with steps.step("send"):
            for at in range(0, len(fds), FDS_MAX):
                socket.send_fds(self.link, [b"."], fds[at : at + FDS_MAX])
            for fd in fds:
                os.close(fd)
        return steps

    def receive(self, steps: Steps | None = None) -> Steps:
        steps = Steps() if steps is None else steps
        handles: list[Any] = []
        wanted = [region.nbytes // SLAB for region in self.regions]
        while len(handles) < sum(wanted):
            with steps.step("receive"):
                _, fds, flags, _ = socket.recv_fds(self.link, 1, FDS_MAX)
            if not fds or flags & socket.MSG_CTRUNC:
                raise CannotRunError("file descriptors were lost on the socket")
            with steps.step("import"):
                for fd in fds:
                    handles.append(self.driver("cuMemImportFromShareableHandle", fd, self.driver.fd_type))
                    os.close(fd)
        self.weights.handles, self.cache.handles = handles[: wanted[0]], handles[wanted[0] :]
        return steps

    def drop(self, steps: Steps | None = None) -> Steps:
        steps = Steps() if steps is None else steps
        with steps.step("release"):
            for region in self.regions:
                for handle in region.handles:
                    self.driver("cuMemRelease", handle)
                region.handles = []
        return steps

    def copy(self) -> None:
        for number, at in enumerate(self.weights.offsets()):
            stream = self.streams[number % 2]
            self.driver("cuMemcpyHtoDAsync", self.weights.address + at, self.host + at, SLAB, stream)
        self.driver("cuCtxSynchronize")

    def copy_alone(self) -> float:
        """The copy again, a while after the driver had anything else to do."""
        time.sleep(1)
        begun = time.perf_counter()
        self.copy()
        return time.perf_counter() - begun

    def exports_again(self) -> str:
        code, fd = self.driver.api.cuMemExportToShareableHandle(self.cache.handles[0], self.driver.fd_type, 0)
        if int(code) == 0:
            os.close(fd)
        return str(getattr(code, "name", code))

    def look(self) -> dict[str, Any]:
        """Every word of the weights is compared; a word a slab tells whose cache was found. Marks the cache as ours."""
        slabs = enumerate(self.weights.offsets())
        same = all(self.torch.equal(self.view(self.weights, at, SLAB), self.pattern + self.seed(n)) for n, at in slabs)
        marks = self.view(self.cache, 0, self.cache.nbytes)[:: SLAB // 8]
        names = {0: "zeros", 1: "A's bytes", 2: "B's bytes"}
        found = Counter(names.get(mark, "other bytes") for mark in marks.tolist())
        marks.fill_(self.number + 1)
        self.torch.cuda.synchronize()
        self.torch.cuda.empty_cache()
        return {"same": same, "found": dict(found), "free_gib": round(self.free_bytes() / GIB, 3)}

    def view(self, region: Region, at: int, nbytes: int) -> Any:
        data = (region.address + at, False)
        raw = SimpleNamespace(
            __cuda_array_interface__={"shape": (nbytes // 8,), "typestr": "<i8", "data": data, "version": 3}
        )
        return self.torch.as_tensor(raw, device="cuda:0")

    def free_bytes(self) -> int:
        return self.driver.free_bytes()


class Swaps:
    """Swaps between two engines, and what was seen after each."""

    def __init__(self, engines: Sequence[Child]) -> None:
        self.awake, self.asleep = engines
        self.names = {engine.process.pid: engine.name for engine in engines}
        self.rows: dict[str, list[dict[str, float]]] = {}
        self.seen: dict[str, dict[str, Any]] = {}
        self.cycles, self.imported, self.same, self.exports_again = 0, False, True, "not tried"

    def cycle(self) -> None:
        for way in CYCLE:
            self.swap(way)
            if way == HANDOVER:
                self.exports_again = self.awake.ask("exports_again")
        shared = {**self.awake.ask("send"), **self.asleep.ask("receive")}
        self.swap(POOL)
        self.swap(POOL)
        shared |= self.asleep.ask("drop")
        self.rows.setdefault("shared pool, set up and end", []).append({**shared, "total": sum(shared.values())})
        self.cycles += 1

    def swap(self, way: str) -> None:
        label = f"{way}, imported" if way == RELEASE and self.imported else way
        begun = time.perf_counter()
        self.awake.tell("sleep", way)
        steps = {} if way == AT_ONCE else self.awake.answer()
        self.asleep.tell("wake", way)
        if way == AT_ONCE:
            steps = self.awake.answer()
        steps |= self.asleep.answer()
        steps["total"] = time.perf_counter() - begun
        self.awake, self.asleep = self.asleep, self.awake
        self.imported = way in (HANDOVER, AT_ONCE)
        looked = self.awake.ask("look")
        self.same = self.same and looked.pop("same")
        self.rows.setdefault(label, []).append(steps)
        self.seen[label] = {"awake": self.awake.name, **looked, "nvml": charged(self.names)}


def charged(names: dict[int | None, str]) -> dict[str, Any]:
    """GiB that NVML shows in use, and of whom; process ids stay numbers where they are another namespace's."""
    import pynvml

    try:
        pynvml.nvmlInit()
        device = pynvml.nvmlDeviceGetHandleByIndex(0)
        used = pynvml.nvmlDeviceGetMemoryInfo(device).used
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(device)
    except pynvml.NVMLError as problem:
        return {"error": str(problem)}
    shown = {names.get(one.pid, str(one.pid)): one.usedGpuMemory for one in processes}
    return {"used": round(used / GIB, 2), **{name: n and round(n / GIB, 2) for name, n in shown.items()}}


def handover(args: argparse.Namespace, until: float) -> bool:
    links = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sizes = (args.weights_gib, args.cache_gib)
    engines = [Child(name, Engine, number, links[number], *sizes) for number, name in enumerate("AB")]
    swaps = Swaps(engines)
    try:
        prepared = together(engines, "prepare")
        alone = [first_time(engine) for engine in engines]
        free_before = engines[0].ask("free_bytes")
        engines[0].ask("wake", RELEASE)
        engines[0].ask("look")
        try:
            while swaps.cycles < args.cycles and time.perf_counter() < until:
                swaps.cycle()
        finally:
            report(args, swaps)
        swaps.awake.ask("sleep", RELEASE)
        free_after = engines[0].ask("free_bytes")
    finally:
        end(engines)
    facts = {"prepare": prepared, "copy_alone": alone, "exports_again": swaps.exports_again, "same": swaps.same}
    tell("handover", "all", facts)
    print("content equal" if swaps.same else "CONTENT DIFFERS")
    return no_leak([free_before - free_after]) and swaps.same


def report(args: argparse.Namespace, swaps: Swaps) -> None:
    """Also what there is when a swap failed."""
    print(f"\nhandover: {args.weights_gib} GiB of weights, {args.cache_gib} GiB of cache, one GPU")
    print(f"medians of {swaps.cycles} cycles of {args.cycles}")
    medians = {label: middle(rows) for label, rows in swaps.rows.items()}
    table(list(medians.items()), STEPS)
    for label, seen in swaps.seen.items():
        print(f"{label}: cache found {seen['found']}, free {seen['free_gib']} GiB, NVML {seen['nvml']}")
    for label, rows in swaps.rows.items():
        tell("handover", label, medians[label], total_max=round(max(row["total"] for row in rows), 5))
    for label in (HANDOVER, AT_ONCE, POOL):
        if label in medians:
            saved = medians[RELEASE]["total"] - medians[label]["total"]
            print(f"{label} saves {saved:.3f} s of {medians[RELEASE]['total']:.3f}")


def first_time(engine: Child) -> float:
    """Once round before anything counts: kernels are loaded, and the driver has taken what it keeps."""
    engine.ask("wake", RELEASE)
    engine.ask("look")
    seconds = float(engine.ask("copy_alone"))
    engine.ask("sleep", RELEASE)
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phase", choices=("handover", "release", "both"), default="both")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--ranks", type=int, default=0, help="of the phase release; more than GPUs share them")
    parser.add_argument("--weights-gib", type=int, default=28)
    parser.add_argument("--cache-gib", type=int, default=88)
    parser.add_argument("--cycles", type=int, default=6)
    parser.add_argument("--limit-s", type=float, default=80.0, help="a phase begins nothing new after this long")
    args = parser.parse_args()
    code = 0
    for phase in (handover, release):
        if args.phase not in (phase.__name__, "both"):
            continue
        try:
            code = max(code, 0 if phase(args, time.perf_counter() + args.limit_s) else 1)
        except CannotRunError as problem:
            print(f"{phase.__name__} cannot run: {problem}", file=sys.stderr, flush=True)
            code = 2
    return code


if __name__ == "__main__":
    sys.exit(main())
