"""What the service stands on, simulated: GPUs with bytes, host RAM, a wall clock, and its lives."""

import asyncio
import contextvars
import hashlib
import random
from collections import Counter, deque
from collections.abc import Callable, Coroutine
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar

from rotator.core.values import GpuId
from rotator.sim.faults.script import Shape

T = TypeVar("T")
GIB = 1 << 30
TRACE_SHOWN = 120


class OutOfMemory(Exception):
    """A GPU has no such bytes left; the text says where."""


class Life(Protocol):
    """One life of the service, as far as the world has to know it."""

    dead: bool

    def adopt(self, task: "asyncio.Task[Any]") -> None: ...


LIFE: ContextVar[Life | None] = ContextVar("life", default=None)
"""Whose task this is: None for the simulated world's own."""


def alive() -> None:
    """To be called wherever the service touches the world: a dead service changes nothing. Raises CancelledError."""
    life = LIFE.get()
    if life is not None and life.dead:
        raise asyncio.CancelledError


class Trace:
    """Everything that happened, as one hash, and its last lines for people."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.last: deque[str] = deque(maxlen=TRACE_SHOWN)
        self._clock = clock
        self._hash = hashlib.sha256()

    def note(self, text: str) -> None:
        line = f"{self._clock():10.4f} {text}"
        self._hash.update(line.encode())
        self.last.append(line)

    def digest(self) -> str:
        return self._hash.hexdigest()[:16]


class Gpu:
    """Bytes by process. ``lingering`` belong to processes that are gone: no list shows them."""

    def __init__(self, world: "World", id: GpuId, index: int, total: int) -> None:
        self.id = id
        self.index = index
        self.total = total
        self.held: dict[int, int] = {}
        self.foreign = 0
        self.lingering = 0
        self.query = ""  # how NVML misbehaves now: hang, fail, blind, lost
        self.disturbed_at_s = -1e9  # when bytes came that the service did not ask for
        self._world = world

    @property
    def used(self) -> int:
        return self.foreign + self.lingering + sum(self.held.values())

    def put(self, pid: int, size: int) -> None:
        """Set what a process holds. Raises OutOfMemory, changing nothing."""
        grows = size - self.held.get(pid, 0)
        if grows > 0 and self.used + grows > self.total:
            raise OutOfMemory(f"CUDA out of memory on {self.id}: {(self.total - self.used) / GIB:.1f} GiB free")
        if size:
            self.held[pid] = size
        else:
            self.held.pop(pid, None)
        self._world.on_bytes(self)

    def disturb(self) -> None:
        self.disturbed_at_s = self._world.now()
        self._world.on_bytes(self)

    async def linger(self, size: int, seconds: float) -> None:
        self.lingering += size
        self.disturb()
        await self._world.calm_or(seconds)
        self.lingering -= size
        self._world.on_bytes(self)

    async def visit(self, size: int, seconds: float) -> None:
        """A foreign process takes what there is, up to ``size``."""
        taken = max(0, min(size, self.total - self.used))
        self.foreign += taken
        self.disturb()
        await self._world.calm_or(seconds)
        self.foreign -= taken
        self._world.on_bytes(self)


class World:
    """``calm`` is set once faults have ended: whatever lasts, ends then."""

    def __init__(self, seed: int, shape: Shape) -> None:
        self.loop = asyncio.get_running_loop()
        self.trace = Trace(self.loop.time)
        self.calm = asyncio.Event()
        self.wall_offset_s = 1_800_000_000.0 + shape.begins_s
        self.host_used = 0
        self.host_budget = int(shape.host_budget_gib * GIB)
        self.host_total = int(shape.host_budget_gib * GIB / 0.8) + 64 * GIB
        self.gpus = {f"GPU-{i}": Gpu(self, f"GPU-{i}", i, int(shape.gpu_gib * GIB)) for i in range(shape.gpus)}
        self.injected: Counter[str] = Counter()
        self.on_bytes: Callable[[Gpu], None] = lambda _: None
        self.on_effect: Callable[[str], None] = lambda _: None  # the service is about to change the world
        self.on_operation: Callable[[Any], None] = lambda _: None  # a process has begun to boot, sleep or wake
        self._seed = seed
        self._context = contextvars.copy_context()
        self._draws: Counter[str] = Counter()
        self._tasks: dict[asyncio.Task[Any], None] = {}

    def now(self) -> float:
        return self.loop.time()

    def wall(self) -> float:
        return self.loop.time() + self.wall_offset_s

    def spawn(self, work: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
        """Run something that is not the service's, whoever asked for it: it outlives every life of the service."""
        task = self._context.copy().run(self.loop.create_task, work)
        self._tasks[task] = None
        task.add_done_callback(lambda done: self._tasks.pop(done, None))
        return task

    def draw(self, key: str, least: float, most: float) -> float:
        """A number between the two: the n-th of this key, whatever else was drawn. So a script that lost an event still
        meets the same latencies elsewhere."""
        self._draws[key] += 1
        return random.Random(f"{self._seed} {key} {self._draws[key]}").uniform(least, most)

    async def calm_or(self, seconds: float) -> None:
        """Return after so long, or once faults have ended."""
        if not self.calm.is_set():
            waiting = self.loop.create_task(self.calm.wait())
            try:
                await asyncio.wait((waiting,), timeout=seconds)
            finally:
                waiting.cancel()

    async def over(self, task: "asyncio.Future[Any]") -> None:
        """Wait until the world is done with it; a caller that is cancelled leaves the world as it is."""
        await asyncio.wait((task,))
        alive()

    async def pause(self, seconds: float) -> None:
        """Time passes for the service."""
        alive()
        await asyncio.sleep(seconds)
        alive()

    async def end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
