"""One of several processes that share a box and a host budget: threads do random things, and every one of them knows
what its own segments must hold. `python -m tests.system.allocator.worker <seed> <transitions> <budget file>`"""

import contextlib
import json
import random
import sys
import threading
from collections.abc import Callable

import allocator as api
from allocator import Allocator, Segment
from allocator.simdriver import SimulatedDriver

MIB = 1 << 20
OFFLOADED: tuple[api.Tag, ...] = ("weights", "runtime", "cudagraph")
THREADS = 3
# What another thread, another process or an injected fault may bring about at any time.
EXPECTED = (api.TagAsleep, api.DriverError, api.OutOfMemory, api.HostMemoryExhausted, api.RollbackFailed)
TURNS = (api.AlreadyAsleep, api.NotAsleep)


class User(threading.Thread):
    """Allocates, writes, computes, reads back and frees under one tag, while others put it to sleep and wake it."""

    def __init__(self, seed: int, allocator: Allocator, driver: SimulatedDriver, done: threading.Event) -> None:
        super().__init__()
        self.draw, self.allocator, self.driver, self.done = random.Random(seed), allocator, driver, done
        self.tag, self.device = OFFLOADED[seed % len(OFFLOADED)], seed % 2
        self.owned: dict[Segment, bytes | None] = {}
        self.steps, self.wrong = 0, []

    def run(self) -> None:
        try:
            with self.driver.context(self.device), self.driver.stream() as stream:
                while not self.done.is_set():
                    self.step(stream)
        except BaseException as error:
            self.wrong.append(repr(error))

    def step(self, stream: int) -> None:
        actions: list[Callable[[], object]] = [self.alloc, self.write, self.check, self.check, self.free]
        if self.draw.random() < 0.2:
            actions = [lambda: self.compute(stream)]
        self.steps += 1
        with contextlib.suppress(*EXPECTED):
            self.draw.choice(actions)()

    def some(self) -> Segment | None:
        return self.draw.choice(list(self.owned)) if self.owned else None

    def alloc(self) -> None:
        if len(self.owned) < 6:
            self.owned[self.allocator.alloc(self.draw.randint(1, 90) * MIB, device=self.device, tag=self.tag)] = None

    def write(self) -> None:
        segment = self.some()
        if segment is None:
            return
        content = self.draw.randbytes(64) * (segment.content_nbytes // 64)
        self.owned[segment] = None  # a write that fails half way leaves it open
        self.allocator.write(segment, content)
        self.owned[segment] = content

    def compute(self, stream: int) -> None:
        """A kernel over memory that may sleep would fault, so it is only ever freed behind a kernel that has ended."""
        segment = self.some()
        if segment is None:
            return
        passing = self.allocator.alloc(16 * MIB, device=self.device, tag=self.tag)
        self.allocator.free(passing, stream=stream)

    def check(self) -> None:
        segment = self.some()
        if segment is None or self.owned[segment] is None:
            return
        content = self.owned[segment] or b""
        if self.allocator.read(segment, 0, len(content)) != content:
            self.wrong.append(f"step {self.steps}: {segment} is not as written")

    def free(self) -> None:
        segment = self.some()
        if segment is not None and len(self.owned) > 2:
            del self.owned[segment]
            self.allocator.free(segment)


class Operator(threading.Thread):
    """Sleeps, wakes, prepares, bounds and injects, so many times."""

    def __init__(self, seed: int, allocator: Allocator, driver: SimulatedDriver, transitions: int) -> None:
        super().__init__()
        self.draw, self.allocator, self.driver, self.steps_left = random.Random(seed), allocator, driver, transitions
        self.steps, self.wrong = 0, []

    def run(self) -> None:
        try:
            while self.steps < self.steps_left:
                self.step()
        except BaseException as error:
            self.wrong.append(repr(error))
        self.driver.set_faults()
        if self.allocator.asleep_tags():
            self.allocator.wake()

    def step(self) -> None:
        allocator, draw = self.allocator, self.draw
        wanted = draw.choice([None, 64 * MIB, 200 * MIB])
        tags = draw.choice([None, list(OFFLOADED[:1]), list(OFFLOADED[1:])])
        operations: list[Callable[[], object]] = [
            lambda: allocator.sleep(1, tags, bytes_wanted=wanted),
            allocator.wake,
            allocator.wake,
            lambda: allocator.prepare(tags),
            lambda: allocator.prepare(wait=False),
            allocator.collect,
            allocator.release_masters,
            allocator.memory_usage,
            lambda: allocator.set_host_budget(draw.choice([None, 2048 * MIB])),
        ]
        faults = f"seed:{draw.randrange(1 << 30)}/4" if draw.random() < 0.2 else ""
        self.steps += 1
        with contextlib.suppress(*EXPECTED, *TURNS), self.driver.faults(faults):
            draw.choice(operations)()


def main() -> int:
    seed, transitions, budget_file = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    driver, done = SimulatedDriver(), threading.Event()
    with Allocator(slab_bytes=64 * MIB, link_share=1.0, budget_file=budget_file) as allocator:
        users = [User(seed * 10 + i, allocator, driver, done) for i in range(THREADS)]
        operator = Operator(seed, allocator, driver, transitions)
        for thread in (*users, operator):
            thread.start()
        operator.join()
        done.set()
        for user in users:
            user.join()
        for user in users:
            for segment, content in user.owned.items():
                if content is not None and allocator.read(segment, 0, len(content)) != content:
                    user.wrong.append(f"at the end: {segment} is not as written")
    leaked = [driver.bytes_used(device, own=True) for device in range(2)] + [driver.bytes_registered()]
    wrong = [text for thread in (*users, operator) for text in thread.wrong]
    steps = sum(thread.steps for thread in (*users, operator))
    injected = driver.faults_injected
    print(json.dumps({"steps": steps, "wrong": wrong, "leaked": leaked, "injected": injected}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
