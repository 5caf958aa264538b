"""A vLLM server as the service sees it, in every release's dialect, with everything that it was seen to do wrong."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rotator.core.values import GpuId
from rotator.sim.faults.plugin import Plugin
from rotator.sim.faults.shape import EngineShape
from rotator.sim.faults.sleeping import Sleeper
from rotator.sim.faults.wires import HTML, Lost, Reply, Wire
from rotator.sim.faults.world import GIB, OutOfMemory, World

if TYPE_CHECKING:
    from rotator.sim.faults.engine import SimEngine


class Process:
    """One launch. ``sleeping`` is what it says; ``held`` on the GPUs is what is true."""

    def __init__(self, world: World, engine: "SimEngine", pid: int, port: int) -> None:
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
        self.on_disk = False  # where its next sleep leaves its masters
        self._sleeper = Sleeper(self)
        self._plugin = Plugin(self, self._sleeper)
        self.runs = asyncio.Event()
        self._wedged = False
        self._linger_s = 0.0
        self._tasks: dict[asyncio.Task[Any], None] = {}  # in order: a set's would change from run to run
        self.runs.set()
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
            self.hold(dict.fromkeys(self.engine.gpus, awake // 4))
            if how in ("crash", "keeps_vram"):
                return self.die("exit code 1: NCCL error", fault.seconds if fault and how == "keeps_vram" else 0.0)
            await asyncio.sleep(self.shape.boot_s * 0.6 + (fault.seconds if fault and how == "slow" else 0.0))
            self.hold(dict.fromkeys(self.engine.gpus, awake))
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
        self.keep_masters(0)
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
        self.runs.clear()
        await self.world.calm_or(seconds)
        self._wedged, self.wedged_since_s = False, None
        self.engine.trouble()
        self.flow()

    def flow(self) -> None:
        """Let its scheduler run, if nothing forbids it."""
        if not self._wedged and not self.sleeping and self.operation != "sleep":
            self.runs.set()

    def hold(self, sizes: Mapping[GpuId, int]) -> None:
        for gpu, size in sizes.items():
            self.world.gpus[gpu].put(self.pid, size)

    def keep_masters(self, size: int) -> None:
        self.world.host_used += size - self._host
        self._host = size

    def forget_masters(self) -> None:
        """It is awake: its masters go, where its allocator does not keep them for its next sleep."""
        if not self.shape.keeps_masters or self.level != 1:
            self.keep_masters(0)

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
                return await self.operate("sleep", lambda: self._sleeper.sleep(level, mode))
            case "POST", "/wake_up":
                return await self.operate("wake", lambda: self._sleeper.wake(tuple(tag for _, tag in query)))
        await self._stands()
        if path == "/collective_rpc":
            return await self._plugin.call(body["method"], body.get("args", ()))
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
        while path == "/is_sleeping" and self.sleeping and self.operation == "sleep":  # noqa: ASYNC110 — virtual time
            await asyncio.sleep(0.1)  # its core answers no question while its workers free by bytes
        answers: dict[str, Any] = {
            "/version": {"version": self.shape.version},
            "/is_sleeping": {"is_sleeping": self.sleeping},
            "/v1/models": {"data": [{"id": self.model}]},
        }
        return (200, json.dumps(answers[path]).encode()) if path in answers else (404, b"")

    async def operate(self, op: str, work: Callable[[], Awaitable[Reply]]) -> Reply:
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

    # -- generation --------------------------------------------------------------------------------------------------

    async def turn(self, seconds: float) -> None:
        """One token's time, once its scheduler runs."""
        await asyncio.sleep(seconds)
        await self.runs.wait()
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
