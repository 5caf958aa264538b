"""What slows ranks that release device memory at once: the phase `release` of bench.allocator_handover.

One process a GPU, or several that share one (--ranks), alone and all at the same moment, by handle size, flags and the
way of releasing.
"""

import argparse
import fcntl
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from typing import Any

from bench.driver_process import (
    ANSWER_S,
    GIB,
    MIB,
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

SETTLE_S = 0.3  # the driver clears what was freed before the next sleep begins
STEPS = ("unmap", "release", "sleep", "cpu", "waits", "create", "map", "access")


@dataclass(frozen=True)
class Variant:
    name: str
    handle_mib: int = 256
    rdma: bool = True  # as the allocator asks for it
    exportable: bool = False
    threads: int = 1
    turns: bool = False  # a lock held while a rank releases
    interleaved: bool = False  # unmap one handle's range, release it, and so on


VARIANTS = (
    Variant("256 MiB"),
    Variant("512 MiB", 512),
    Variant("1 GiB", 1024),
    Variant("256 MiB, turns", turns=True),
    Variant("256 MiB, 4 threads", threads=4),
    Variant("256 MiB, interleaved", interleaved=True),
    Variant("256 MiB, no RDMA", rdma=False),
    Variant("512 MiB, no RDMA", 512, rdma=False),
    Variant("1 GiB, no RDMA", 1024, rdma=False),
    Variant("256 MiB, exportable", exportable=True),
)


class Rank:
    """One process a GPU that sleeps and wakes, alone or with all others at the same moment."""

    def __init__(self, device: int, barrier: Barrier, lock: str, weights_gib: int, cache_gib: int) -> None:
        self.driver, self.barrier, self.lock = Driver(device), barrier, lock
        self.sizes = (weights_gib * GIB, cache_gib * GIB)
        self.threads = ThreadPoolExecutor(4, initializer=lambda: self.driver("cuCtxSetCurrent", self.driver.context))
        list(self.threads.map(time.sleep, [0.05] * 4))

    def cycles(self, variant: Variant, count: int, together: bool) -> list[Steps]:
        try:
            return self.rows(variant, count, together)
        except Exception:
            self.barrier.abort()  # nobody waits for a rank that failed
            raise

    def rows(self, variant: Variant, count: int, together: bool) -> list[Steps]:
        properties = self.driver.properties(variant.rdma, variant.exportable)
        regions = [Region(self.driver, nbytes, variant.handle_mib * MIB) for nbytes in self.sizes]
        self.wake(regions, properties, Steps())
        rows = []
        for _ in range(count):
            time.sleep(SETTLE_S)
            steps = Steps()
            self.start(together)
            self.sleep(regions, variant, steps)
            self.start(together)
            self.wake(regions, properties, steps)
            rows.append(steps)
        self.sleep(regions, variant, Steps())
        for region in regions:
            self.driver("cuMemAddressFree", region.address, region.nbytes)
        return rows

    def start(self, together: bool) -> None:
        if together:
            self.barrier.wait(ANSWER_S)

    def sleep(self, regions: list[Region], variant: Variant, steps: Steps) -> None:
        before = resource.getrusage(resource.RUSAGE_SELF)
        with steps.step("sleep"):
            if variant.interleaved:
                self.unmap_and_release(regions, steps)
            else:
                with steps.step("unmap"):
                    for region in regions:
                        region.unmap()
                with steps.step("release"), self.turn() if variant.turns else nullcontext():
                    self.release([handle for region in regions for handle in region.handles], variant.threads)
        after = resource.getrusage(resource.RUSAGE_SELF)
        steps["cpu"] = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        steps["waits"] = after.ru_nvcsw - before.ru_nvcsw

    def unmap_and_release(self, regions: list[Region], steps: Steps) -> None:
        for region in regions:
            for at, handle in zip(region.offsets(), region.handles, strict=True):
                with steps.step("unmap"):
                    self.driver("cuMemUnmap", region.address + at, region.handle_bytes)
                with steps.step("release"):
                    self.driver("cuMemRelease", handle)

    @contextmanager
    def turn(self) -> Iterator[None]:
        with open(self.lock) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def release(self, handles: list[Any], threads: int) -> None:
        def some(number: int) -> None:
            for handle in handles[number::threads]:
                self.driver("cuMemRelease", handle)

        if threads == 1:
            some(0)
        else:
            list(self.threads.map(some, range(threads)))

    def wake(self, regions: list[Region], properties: Any, steps: Steps) -> None:
        """No copy; every byte is written afterwards, as an engine does, which the steps do not count."""
        with steps.step("create"):
            for region in regions:
                region.create(properties)
        map_all(regions, steps)
        for region in regions:
            self.driver("cuMemsetD32Async", region.address, 1, region.nbytes // 4, 0)
        self.driver("cuCtxSynchronize")

    def facts(self) -> dict[str, int]:
        return {"free_bytes": self.driver.free_bytes(), "rdma": self.driver.rdma}


def release(args: argparse.Namespace, until: float) -> bool:
    count_of_ranks = args.ranks or args.gpus
    a_gpu = -(-count_of_ranks // args.gpus)
    weights_gib, cache_gib = args.weights_gib // a_gpu, args.cache_gib // a_gpu
    barrier = multiprocessing.get_context("spawn").Barrier(count_of_ranks)
    rows, skipped = [], []
    with tempfile.NamedTemporaryFile() as lock:
        given = (barrier, lock.name, weights_gib, cache_gib)
        ranks = [Child(f"rank {number}", Rank, number % args.gpus, *given) for number in range(count_of_ranks)]
        try:
            together(ranks, "cycles", VARIANTS[0], 1, True)
            before = together(ranks, "facts")
            for variant in VARIANTS:
                for active in [ranks[:1], ranks] if len(ranks) > 1 else [ranks]:
                    label = f"{variant.name}, {len(active)} at once"
                    if time.perf_counter() > until:
                        skipped.append(label)
                        continue
                    count = args.cycles if len(active) > 1 else max(2, args.cycles // 2)
                    reports = together(active, "cycles", variant, count, len(active) > 1)
                    slowest = [
                        {step: max(one[step] for one in cycle) for step in cycle[0]}
                        for cycle in zip(*reports, strict=True)
                    ]
                    rows.append((label, middle(slowest)))
                    tell("release", label, rows[-1][1], sleeps=[middle(one)["sleep"] for one in reports])
            after = together(ranks, "facts")
        finally:
            end(ranks)
    print(f"\nrelease: {weights_gib} + {cache_gib} GiB a rank, {a_gpu} a GPU; medians of the slowest rank's seconds")
    table(rows, STEPS)
    print(f"GPUDirect RDMA with these handles: {'yes' if before[0]['rdma'] else 'no, the flag stayed 0'}")
    if skipped:
        print("skipped, the time was over: " + "; ".join(skipped))
    return no_leak([one["free_bytes"] - other["free_bytes"] for one, other in zip(before, after, strict=True)])
