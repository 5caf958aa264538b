"""A vLLM server as the service sees it, in every release's dialect, with everything that it was seen to do wrong."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

from rotator.core.values import GpuId
from rotator.sim.faults.script import Arm, EngineShape
from rotator.sim.faults.world import GIB, OutOfMemory, World

WEIGHTS_SHARE = 0.7  # of what a sleep gives back; the rest is the KV cache
STAGED_SINCE = (0, 24)
BODIES_SINCE = (0, 32)
HTML = b"<html><body>502 Bad Gateway</body></html>"
Reply = tuple[int, bytes]


class Lost(Exception):
    """The connection closes without an answer."""


class Wire(Protocol):
    """A client's connection, as far as the engine's end of it goes."""

    @property
    def busy(self) -> bool: ...

    def lost(self) -> None: ...

    def finish_early(self) -> None: ...


class SimEngine:
    """One configured engine: what it is, what is armed against it, and its processes (more than one is a bug of the
    service)."""

    def __init__(self, world: World, shape: EngineShape) -> None:
        self.world = world
        self.shape = shape
        self.gpus: tuple[GpuId, ...] = tuple(f"GPU-{i}" for i in shape.gpus)
        self.processes: list[Process] = []
        self.undying_until_s = 0.0
        self.was_undying = False  # a process of it that would not go may still be in the middle of something
        self.cut_until_s = 0.0
        self.cut_silent = False
        self.troubled_at_s: list[float] = []  # when something happened that may cost a request
        self._armed: list[Arm] = []
        self._pids = 1000 + 100 * (ord(shape.name[0]) - ord("a"))

    @property
    def model(self) -> str:
        return self.shape.served_model or self.shape.name

    @property
    def process(self) -> "Process | None":
        return self.processes[-1] if self.processes else None

    def arm(self, fault: Arm) -> None:
        self._armed += [fault] * fault.times

    def disarm(self) -> None:
        self._armed.clear()

    def take(self, op: str) -> Arm | None:
        """The fault that strikes this ``op`` now, which is used up by it."""
        for fault in self._armed:
            if fault.op == op:
                self._armed.remove(fault)
                self.world.injected[f"{op} {fault.how}"] += 1
                self.world.trace.note(f"fault {self.shape.name} {op} {fault.how}")
                self.trouble()
                return fault
        return None

    def trouble(self) -> None:
        self.troubled_at_s.append(self.world.now())

    def launch(self, port: int) -> "Process":
        self._pids += 1
        process = Process(self.world, self, self._pids, port)
        self.processes.append(process)
        return process

    @property
    def is_cut(self) -> bool:
        return self.world.now() < self.cut_until_s and not self.world.calm.is_set()

    @property
    def is_undying(self) -> bool:
        return self.world.now() < self.undying_until_s and not self.world.calm.is_set()


class Process:
    """One launch. ``sleeping`` is what it says; ``held`` on the GPUs is what is true."""

    def __init__(self, world: World, engine: SimEngine, pid: int, port: int) -> None:
        self.world = world
        self.engine = engine
        self.pid = pid
        self.port = port
        self.alive = True
        self.ready = False
        self.sleeping = False
        self.level = 0
        self.spoilt = ""  # garbage or nan: what it answers instead of tokens
        self.loaded = True
        self.model = engine.model
        self.operation = ""  # boot, sleep or wake, while one is under way
        self.asked_at_s = world.now()  # when that was asked of it: a wedge may have come between
        self.ended: asyncio.Future[str] = world.loop.create_future()
        self.wires: list[Wire] = []
        self.generated = 0  # tokens
        self.warnings = 0  # lines in its log that say that a rank does not take its turn
        self.wedged_since_s: float | None = None
        self._host = 0
        self._runs = asyncio.Event()
        self._wedged = False
        self._linger_s = 0.0
        self._tasks: dict[asyncio.Task[Any], None] = {}  # in order: a set's would change from run to run
        self._runs.set()
        self.do(self._boot())

    @property
    def shape(self) -> EngineShape:
        return self.engine.shape

    @property
    def release(self) -> tuple[int, ...]:
        return tuple(int(n) for n in self.shape.version.split(".")[:2])

    def do(self, work: Any) -> "asyncio.Task[Any]":
        """Work of the process's own: it dies with it."""
        task = self.world.spawn(work)
        self._tasks[task] = None
        task.add_done_callback(self._done)
        return task

    def _done(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.pop(task, None)
        if not task.cancelled():
            task.exception()  # whoever asked may be gone by now

    def begin(self, operation: str) -> None:
        self.operation = operation
        self.world.trace.note(f"{self.shape.name} pid {self.pid} begins to {operation}")
        self.world.on_operation(self)

    def held_on(self, gpu: GpuId) -> int:
        return self.world.gpus[gpu].held.get(self.pid, 0)

    # -- life and death ----------------------------------------------------------------------------------------------

    async def _boot(self) -> None:
        fault = self.engine.take("boot")
        how = fault.how if fault else ""
        self.begin("boot")
        awake = int(self.shape.awake_gib * GIB)
        try:
            await asyncio.sleep(self.shape.boot_s * 0.4)
            self._hold(dict.fromkeys(self.engine.gpus, awake // 4))
            if how in ("crash", "keeps_vram"):
                return self.die("exit code 1: NCCL error", fault.seconds if fault and how == "keeps_vram" else 0.0)
            await asyncio.sleep(self.shape.boot_s * 0.6 + (fault.seconds if fault and how == "slow" else 0.0))
            self._hold(dict.fromkeys(self.engine.gpus, awake))
        except OutOfMemory as e:
            return self.die(f"exit code 1: {e}")
        self.operation = ""
        if how == "never_healthy":
            return None
        self.ready = True
        if how == "garbage":
            self.spoilt = "nan"
        elif how == "wrong_model":
            self.model = "org/another"
        return None

    def die(self, how: str, linger_s: float = 0.0, *, asked: bool = False) -> None:
        """Everything of it ends at once; its bytes come back then, or ``linger_s`` later. ``asked``: by the service."""
        if not self.alive:
            return
        self.alive = self.ready = False
        self.operation = ""
        if not asked:
            self.engine.trouble()
        self.engine.processes.remove(self)
        self.world.trace.note(f"{self.engine.shape.name} pid {self.pid} ended: {how}")
        for gpu in (self.world.gpus[id] for id in self.engine.gpus):
            size = gpu.held.get(self.pid, 0)
            gpu.put(self.pid, 0)
            if linger_s and size:
                self.world.spawn(gpu.linger(size, linger_s))
        self._keep_masters(0)
        for task in tuple(self._tasks):
            if task is not asyncio.current_task():
                task.cancel()
        for wire in tuple(self.wires):
            wire.lost()
        if not self.ended.done():
            self.ended.set_result(how)

    async def wedge(self, seconds: float) -> None:
        self._wedged = True
        self.wedged_since_s = self.world.now()
        self.warnings += 1
        self.engine.trouble()
        self._runs.clear()
        await self.world.calm_or(seconds)
        self._wedged, self.wedged_since_s = False, None
        self.engine.trouble()
        self._flow()

    def _flow(self) -> None:
        """Let its scheduler run, if nothing forbids it."""
        if not self._wedged and not self.sleeping and self.operation != "sleep":
            self._runs.set()

    def _hold(self, sizes: Mapping[GpuId, int]) -> None:
        for gpu, size in sizes.items():
            self.world.gpus[gpu].put(self.pid, size)

    def _keep_masters(self, size: int) -> None:
        self.world.host_used += size - self._host
        self._host = size

    # -- what operators' routes answer -------------------------------------------------------------------------------

    async def answer(self, method: str, path: str, query: Sequence[tuple[str, str]], body: Any) -> Reply:
        """Raises Lost."""
        if path == "/health":
            return 200, b""
        if path == "/metrics":
            return 200, self._metrics()
        if path == "/v1/completions":
            return await self._probe(body)
        match method, path:
            case "GET", _:
                return await self._question(path)
            case "POST", "/sleep":
                level, mode = int(dict(query)["level"]), dict(query).get("mode", "abort")
                return await self._operate("sleep", lambda: self._sleep(level, mode))
            case "POST", "/wake_up":
                return await self._operate("wake", lambda: self._wake(tuple(tag for _, tag in query)))
        await self._stands()
        if path == "/collective_rpc":
            await asyncio.sleep(self.shape.wake_s)
            self.loaded = True
        return 200, b""

    def _metrics(self) -> bytes:
        """Told by the API server, also while the engine's core stands."""
        busy = sum(wire.busy for wire in self.wires)
        told = {"num_requests_running": busy, "generation_tokens_total": self.generated}
        return "".join(f'vllm:{name}{{engine="0"}} {value}\n' for name, value in told.items()).encode()

    async def _stands(self) -> None:
        """Nothing that reaches the engine's core is answered while it is wedged."""
        while self._wedged:  # noqa: ASYNC110 — virtual time: looking again costs nothing
            await asyncio.sleep(0.5)

    async def _question(self, path: str) -> Reply:
        await self._stands()
        fault = self.engine.take("ask")
        match fault.how if fault else "":
            case "error":
                return 500, b'{"error": {"message": "internal error"}}'
            case "html":
                return 200, HTML
            case "lost":
                raise Lost
            case "hang":
                await asyncio.Event().wait()
        answers: dict[str, Any] = {
            "/version": {"version": self.shape.version},
            "/is_sleeping": {"is_sleeping": self.sleeping},
            "/v1/models": {"data": [{"id": self.model}]},
        }
        return (200, json.dumps(answers[path]).encode()) if path in answers else (404, b"")

    async def _operate(self, op: str, work: Callable[[], Awaitable[Reply]]) -> Reply:
        asked_at_s = self.world.now()
        await self._stands()
        self.asked_at_s = asked_at_s
        self.begin(op)
        try:
            return await work()
        except OutOfMemory as e:
            return 500, json.dumps({"error": {"message": f"Call to {op} failed: {e}"}}).encode()
        finally:
            self.operation = ""

    # -- sleep -------------------------------------------------------------------------------------------------------

    async def _sleep(self, level: int, mode: str) -> Reply:
        fault = self.engine.take("sleep")
        how, seconds = (fault.how, fault.seconds) if fault else ("", 0.0)
        if mode == "abort":
            for wire in tuple(self.wires):
                wire.finish_early()
        while mode == "wait" and any(wire.busy for wire in self.wires):  # noqa: ASYNC110 — virtual time
            await asyncio.sleep(0.1)
        self._runs.clear()
        if how == "hang":
            await asyncio.Event().wait()
        await asyncio.sleep(self.shape.sleep_s * self.world.draw(f"sleep {self.shape.name}", 0.7, 1.3))
        if how == "slow":
            await asyncio.sleep(seconds)
        if how == "crash":
            self.die("killed by signal 6")
            raise Lost
        bad = self.engine.gpus[(fault.rank if fault else 0) % len(self.engine.gpus)]
        asleep = {gpu: int(self.shape.residue_gib * GIB) for gpu in self.engine.gpus}
        if how == "rank_fails":
            self._hold({gpu: size for gpu, size in asleep.items() if gpu != bad})
            return 500, b'{"error": {"message": "Memory usage increased after sleeping."}}'
        self.sleeping, self.level = True, level
        self.loaded = self.loaded and level == 1
        self._keep_masters(int(self.shape.host_gib * GIB) if level == 1 else 0)
        if how == "frees_late":
            self.do(self._free_late(asleep, min(seconds, 2.0)))
        elif how != "lie":
            self._hold({gpu: size for gpu, size in asleep.items() if how != "lie_one_rank" or gpu != bad})
        return await self._after(how, seconds, {"status": "sleeping", "level": level})

    async def _free_late(self, sizes: Mapping[GpuId, int], seconds: float) -> None:
        await asyncio.sleep(seconds)
        if self.sleeping:
            self._hold(sizes)

    # -- wake --------------------------------------------------------------------------------------------------------

    async def _wake(self, tags: tuple[str, ...]) -> Reply:
        if tags == ("scheduling",) or not self.sleeping:
            self._flow()
            return self._body({"status": "awake", "tags": list(tags)})
        fault = self.engine.take("wake") if "kv_cache" not in tags else None
        how, seconds = (fault.how, fault.seconds) if fault else ("", 0.0)
        if how == "hang":
            await asyncio.Event().wait()
        await asyncio.sleep(self.shape.wake_s * self.world.draw(f"wake {self.shape.name}", 0.7, 1.3))
        if how == "slow":
            await asyncio.sleep(seconds)
        if how == "crash":
            self.die("killed by signal 11")
            raise Lost
        if how != "noop" and how != "stays_asleep":
            self._map(tags, fault)
        if how == "noop":
            return self._body({"status": "awake", "tags": list(tags)})
        if not tags or "kv_cache" in tags or self.release < STAGED_SINCE:
            self.sleeping = False
            if how != "stays_asleep":
                self._flow()
        if how in ("garbage", "nan"):
            self.spoilt = how
        return await self._after(how, seconds, {"status": "awake", "tags": list(tags)})

    def _map(self, tags: tuple[str, ...], fault: Arm | None) -> None:
        """Rank by rank, without a way back: what was mapped before a failure stays. Raises OutOfMemory."""
        awake, residue = int(self.shape.awake_gib * GIB), int(self.shape.residue_gib * GIB)
        partly = residue + int((awake - residue) * WEIGHTS_SHARE)
        size = partly if tags == ("weights",) else awake
        for rank, gpu in enumerate(self.engine.gpus):
            if fault and fault.how in ("rank_fails", "oom") and rank == fault.rank % len(self.engine.gpus):
                raise OutOfMemory(f"cumem: out of memory on rank {rank}")
            self.world.gpus[gpu].put(self.pid, size)
        self._keep_masters(0)

    async def _after(self, how: str, seconds: float, body: Mapping[str, Any]) -> Reply:
        """It is done; whether the answer gets there is another matter."""
        self.operation = ""
        if how == "lost":
            raise Lost
        if how == "late":
            await asyncio.sleep(seconds)
        if how == "html":
            return 200, HTML
        if how == "wedge":
            self.do(self.wedge(seconds))
        return self._body(body)

    def _body(self, body: Mapping[str, Any]) -> Reply:
        return 200, json.dumps(body).encode() if self.release >= BODIES_SINCE else b""

    # -- generation --------------------------------------------------------------------------------------------------

    async def turn(self, seconds: float) -> None:
        """One token's time, once its scheduler runs."""
        await asyncio.sleep(seconds)
        await self._runs.wait()
        self.generated += 1

    @property
    def sane(self) -> bool:
        return self.loaded and not self.spoilt

    async def _probe(self, body: Mapping[str, Any]) -> Reply:
        fault = self.engine.take("generate")
        match fault.how if fault else "":
            case "error":
                return 500, b'{"error": {"message": "EngineCore encountered an issue"}}'
            case "hang":
                await asyncio.Event().wait()
            case "lost":
                raise Lost
        await self.turn(0.01)
        if body["model"] != self.model:
            return 404, b'{"error": {"message": "The model does not exist"}}'
        wrong = 0 if self.sane else 500
        base = sum(self.model.encode()) + (body.get("seed") or 0)
        ids = [(base + wrong + 7 * i) % 1000 + 1 for i in range(body["max_tokens"])]
        value = float("nan") if self.spoilt == "nan" else -0.5 - wrong
        names = [f"token_id:{i}" for i in ids]
        logprobs = {
            "tokens": names,
            "token_logprobs": [value] * len(ids),
            "top_logprobs": [{name: value, "token_id:0": -3.0} for name in names],
        }
        return 200, json.dumps({"choices": [{"text": f"{self.model} says", "logprobs": logprobs}]}).encode()
