"""A small world in memory behind the ports: GPUs with bytes, engines that sleep, wake, lie, fail and die."""

import asyncio
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rotator.config import FleetConfig, parse
from rotator.core.values import GpuId, Level, State
from rotator.ports import (
    DeviceTimeout,
    EngineCounters,
    EngineRecord,
    EngineRefused,
    EngineTimeout,
    EngineUnreachable,
    Generation,
    GpuInfo,
    GpuReading,
    Handle,
    HostMemory,
    Incident,
    Intent,
    LaunchError,
    LaunchSpec,
    Lease,
    LedgerError,
    NodeRecord,
    OpenTransition,
    Outcome,
    Page,
    Probe,
    Recovered,
    Reservation,
    Residency,
)
from rotator.service.events import EventBus
from rotator.service.fleet import Fleet
from rotator.service.journal import Journal
from rotator.service.loop import Loop
from rotator.service.operator import Operator
from rotator.service.traffic import Limits, Traffic
from rotator.service.world import World

GIB = 1 << 30


@dataclass
class FakeEngine:
    """One engine's process. Misbehaviours are plain fields that a test sets."""

    name: str
    gpus: tuple[GpuId, ...]
    awake_gib: float
    pid: int
    residue_gib: float = 1.0
    running: bool = False
    asleep: bool = False
    garbage: bool = False
    lies: bool = False
    unbacked: bool = False  # awake by its word and its answers, with the bytes of a sleeper
    sleep_error: str | None = None
    wake_error: str | None = None
    wake_garbage: bool = False
    hang: bool = False
    start_error: str | None = None
    start_s: float = 10.0
    sleep_s: float = 0.5
    freed_gib: float = 0.0  # by bytes, while it sleeps with the rest in place
    masters: str = "host"
    masters_error: str | None = None
    wake_s: float = 1.0
    version: str = "0.26.0"
    ready_at_s: float = 0.0
    ended: asyncio.Future[str] | None = None
    launches: int = 0
    generated: float = 0.0
    tokens_a_look: float = 0.0
    busy: int = 0

    def held(self) -> int:
        if not self.running:
            return 0
        if self.freed_gib and not self.lies:
            return int((self.awake_gib - self.freed_gib) * GIB)
        shown = self.residue_gib if (self.asleep and not self.lies) or self.unbacked else self.awake_gib
        return int(shown * GIB)

    def die(self, how: str = "killed by signal 9") -> None:
        self.running = self.asleep = False
        self.freed_gib = 0.0
        if self.ended and not self.ended.done():
            self.ended.set_result(how)


@dataclass
class Box:
    """All that is outside the service."""

    totals: dict[GpuId, int]
    engines: dict[str, FakeEngine] = field(default_factory=dict)
    foreign: dict[GpuId, int] = field(default_factory=dict)
    hung_gpus: set[GpuId] = field(default_factory=set)
    by_pid: bool = True
    log: list[str] = field(default_factory=list)

    def at(self, url: str) -> FakeEngine:
        engine = self.engines[url.rsplit("/", 1)[1]]
        if not engine.running:
            raise EngineUnreachable(f"{engine.name} is not there")
        return engine

    def used(self, gpu: GpuId) -> int:
        return self.foreign.get(gpu, 0) + sum(e.held() for e in self.engines.values() if gpu in e.gpus)


class FakeDevices:
    def __init__(self, box: Box) -> None:
        self._box = box

    async def inventory(self, *, deadline_s: float) -> tuple[GpuInfo, ...]:
        return tuple(GpuInfo(gpu, i, "fake", total) for i, (gpu, total) in enumerate(self._box.totals.items()))

    async def read(self, gpu: GpuId, *, deadline_s: float) -> GpuReading:
        if gpu in self._box.hung_gpus:
            await asyncio.sleep(deadline_s)
            raise DeviceTimeout(f"{gpu} did not answer within {deadline_s} s")
        by_pid = {e.pid: e.held() for e in self._box.engines.values() if gpu in e.gpus and e.held()}
        used = self._box.used(gpu)
        assert used <= self._box.totals[gpu], f"{gpu} is overcommitted: {used / GIB:.1f} GiB"
        return GpuReading(gpu, used, self._box.totals[gpu], by_pid if self._box.by_pid else None)


class FakeControl:
    def __init__(self, box: Box) -> None:
        self._box = box

    async def _call(self, url: str, deadline_s: float, takes_s: float = 0.0) -> FakeEngine:
        engine = self._box.at(url)
        if engine.hang:
            await asyncio.sleep(deadline_s)
            raise EngineTimeout(f"no answer within {deadline_s:.0f} s")
        await asyncio.sleep(takes_s)
        return self._box.at(url)

    async def version(self, url: str, *, deadline_s: float) -> str:
        return (await self._call(url, deadline_s)).version

    async def is_healthy(self, url: str, *, deadline_s: float) -> bool:
        try:
            engine = await self._call(url, deadline_s)
        except (EngineUnreachable, EngineTimeout):
            return False
        return asyncio.get_running_loop().time() >= engine.ready_at_s

    async def is_sleeping(self, url: str, *, deadline_s: float) -> bool:
        return (await self._call(url, deadline_s)).asleep

    async def served_models(self, url: str, *, deadline_s: float) -> tuple[str, ...]:
        return ((await self._call(url, deadline_s)).name,)

    async def can_freeze(self, url: str, levels: Collection[Level], *, deadline_s: float) -> bool:
        return not (await self._call(url, deadline_s)).version.startswith("0.19")

    async def sleep(self, url: str, *, level: Level, abort: bool, deadline_s: float) -> None:
        self._box.log.append(f"sleep {self._box.at(url).name} {int(level)}{' abort' if abort else ''}")
        engine = await self._call(url, deadline_s, self._box.at(url).sleep_s)
        if engine.sleep_error:
            raise EngineRefused(engine.sleep_error, 500)
        engine.asleep = True

    async def wake(self, url: str, *, level: Level, deadline_s: float) -> None:
        self._box.log.append(f"wake {self._box.at(url).name}")
        engine = await self._call(url, deadline_s, self._box.at(url).wake_s)
        if engine.wake_error:
            raise EngineRefused(engine.wake_error, 500)
        engine.asleep = False
        engine.garbage = engine.wake_garbage
        for gpu in engine.gpus:
            assert self._box.used(gpu) <= self._box.totals[gpu], f"waking {engine.name} overcommitted {gpu}"

    async def sleep_bytes(self, url: str, *, bytes_per_gpu: int, deadline_s: float) -> None:
        self._box.log.append(f"free {self._box.at(url).name} {bytes_per_gpu / GIB:.1f}")
        engine = await self._call(url, deadline_s, 0.05)
        if engine.sleep_error:
            raise EngineRefused(engine.sleep_error, 500)
        engine.asleep = True
        engine.freed_gib = min(engine.freed_gib + bytes_per_gpu / GIB, engine.awake_gib - engine.residue_gib)

    async def wake_bytes(self, url: str, *, deadline_s: float) -> None:
        self._box.log.append(f"restore {self._box.at(url).name}")
        engine = await self._call(url, deadline_s, 0.1)
        engine.asleep, engine.freed_gib = False, 0.0
        for gpu in engine.gpus:
            assert self._box.used(gpu) <= self._box.totals[gpu], f"restoring {engine.name} overcommitted {gpu}"

    async def place_masters(self, url: str, *, where: str, deadline_s: float) -> None:
        self._box.log.append(f"masters {self._box.at(url).name} {where}")
        engine = await self._call(url, deadline_s, 0.05)
        if engine.masters_error:
            raise EngineRefused(engine.masters_error, 500)
        engine.masters = where

    async def resume(self, url: str, *, deadline_s: float) -> None:
        await self._call(url, deadline_s)

    async def generate(self, url: str, model: str, probe: Probe, *, deadline_s: float) -> Generation:
        engine = await self._call(url, deadline_s, 0.01)
        if engine.garbage:
            return Generation((7,) * 8, (-9.0,) * 8, (None,) * 8, "garbage out")
        ids = tuple((len(engine.name) * 31 + (probe.seed or 0) + i) % 1000 + 1 for i in range(probe.max_tokens))
        return Generation(ids, (-0.5,) * len(ids), (-3.0,) * len(ids), f"{engine.name} says hello")

    async def metrics(self, url: str, *, deadline_s: float) -> str:
        return f"generated {(await self.counters(url, deadline_s=deadline_s)).generated}"

    async def counters(self, url: str, *, deadline_s: float) -> EngineCounters:
        engine = self._box.at(url)  # answered by the API server, also while the engine's core hangs
        if not engine.hang:
            engine.generated += engine.tokens_a_look
        return EngineCounters(running=engine.busy, generated=engine.generated)

    async def close(self) -> None: ...


class FakeLauncher:
    def __init__(self, box: Box) -> None:
        self._box = box
        self.find_error: Exception | None = None
        self.told_by_log = ""

    def _engine(self, handle: Handle) -> FakeEngine:
        return self._box.engines[handle.engine]

    async def start(self, spec: LaunchSpec) -> Handle:
        engine = self._box.engines[spec.engine]
        if engine.start_error:
            raise LaunchError(engine.start_error)
        assert not engine.running, f"{engine.name} was started twice"
        self._box.log.append(f"start {engine.name}")
        loop = asyncio.get_running_loop()
        engine.running, engine.asleep, engine.garbage = True, False, False
        engine.launches += 1
        engine.ready_at_s = loop.time() + engine.start_s
        engine.ended = loop.create_future()
        return self._handle(engine)

    def _handle(self, engine: FakeEngine) -> Handle:
        return Handle(engine.name, "process", f"http://fake/{engine.name}", {"pid": engine.pid, "n": engine.launches})

    async def find(self, spec: LaunchSpec, ref: Mapping[str, Any] | None) -> Handle | None:
        if self.find_error:
            raise self.find_error
        engine = self._box.engines.get(spec.engine)
        if engine is None or not engine.running:
            return None
        if engine.ended is None or engine.ended.get_loop() is not asyncio.get_running_loop():
            engine.ended = asyncio.get_running_loop().create_future()
        return self._handle(engine)

    async def is_alive(self, handle: Handle) -> bool:
        return self._engine(handle).running

    async def wait_exit(self, handle: Handle) -> str:
        ended = self._engine(handle).ended
        assert ended is not None
        return await asyncio.shield(ended)

    async def stop(self, handle: Handle, *, grace_s: float) -> None:
        self._box.log.append(f"stop {handle.engine}")
        self._engine(handle).die("stopped")

    async def pids(self, handle: Handle) -> frozenset[int]:
        engine = self._engine(handle)
        return frozenset({engine.pid}) if engine.running else frozenset()

    async def evidence(self, handle: Handle) -> str:
        return self.told_by_log


class FakeLedger:
    """Rows in memory. ``broken`` makes every write fail, as a full disk does."""

    def __init__(self) -> None:
        self.broken = False
        self.transitions: dict[int, tuple[Intent, Outcome | None]] = {}
        self.engines: dict[str, EngineRecord] = {}
        self.residencies: dict[tuple[str, str], Residency] = {}
        self.requests: list[tuple[str, float, str]] = []
        self.cordons: set[GpuId] = set()
        self.nodes: dict[str, NodeRecord] = {}
        self.reservations: dict[int, Reservation] = {}
        self.incidents: dict[str, Incident] = {}
        self._ids = itertools.count(1)

    @property
    def healthy(self) -> bool:
        return not self.broken

    def _write(self) -> None:
        if self.broken:
            raise LedgerError("database or disk is full")

    async def recover(self) -> Recovered:
        unfinished = tuple(OpenTransition(i, t) for i, (t, o) in self.transitions.items() if o is None)
        residencies, reservations = tuple(self.residencies.values()), tuple(self.reservations.values())
        cordons = frozenset(self.cordons)
        return Recovered(dict(self.engines), residencies, (), unfinished, cordons, reservations=reservations)

    async def open_transition(self, intent: Intent) -> int:
        self._write()
        id = next(self._ids)
        self.transitions[id] = (intent, None)
        return id

    async def close_transition(self, transition: int, outcome: Outcome) -> None:
        self._write()
        intent, before = self.transitions[transition]
        assert before is None, "an outcome was written twice"
        self.transitions[transition] = (intent, outcome)

    async def put_engine(self, record: EngineRecord) -> None:
        self._write()
        self.engines[record.engine] = record

    async def put_residencies(self, rows: Sequence[Residency]) -> None:
        self._write()
        self.residencies.update({(r.engine, r.gpu): r for r in rows})

    async def put_lease(self, lease: Lease) -> None:
        self._write()

    async def drop_lease(self, gpu: GpuId, holder: str) -> None:
        self._write()

    async def put_gpus(self, gpus: Sequence[GpuInfo]) -> None:
        self._write()

    async def put_node(self, node: NodeRecord) -> None:
        self._write()
        self.nodes[node.name] = node

    async def put_cordon(self, gpu: GpuId, cordoned: bool, reason: str) -> None:
        self._write()
        (self.cordons.add if cordoned else self.cordons.discard)(gpu)

    async def put_incident(self, incident: Incident) -> None:
        self._write()
        self.incidents[incident.id] = incident

    async def add_reservation(self, made: Reservation) -> int:
        self._write()
        id = next(self._ids)
        self.reservations[id] = replace(made, id=id)
        return id

    async def drop_reservation(self, id: int) -> bool:
        self._write()
        return self.reservations.pop(id, None) is not None

    def count_request(self, model: str, *, waited_s: float, outcome: str) -> None:
        self.requests.append((model, waited_s, outcome))

    def sample_vram(self, at_wall_s: float, gpu: GpuId, used_bytes: int, by_holder: Mapping[str, int]) -> None: ...

    async def query(
        self, table: str, *, filters: Mapping[str, str], limit: int = 100, cursor: str | None = None
    ) -> Page:
        assert table in ("residencies", "transitions")
        if table == "transitions":
            return Page((), None)
        rows = [{"engine": r.engine, "gpu": r.gpu, "held_bytes": r.held_bytes} for r in self.residencies.values()]
        return Page(tuple(rows), None)

    async def close(self) -> None: ...


class Service:
    """The loop over a fake box, as the composition root builds it over the real one."""

    def __init__(
        self, box: Box, config: FleetConfig, ledger: FakeLedger, wall: Callable[[], float] = lambda: 0.0
    ) -> None:
        self.box, self.config, self.ledger = box, config, ledger
        self.bus = EventBus(lambda: 0.0)
        self.launcher = FakeLauncher(box)
        self.traffic = Traffic(
            queue_total_max=config.gateway.queue_total_max,
            on_demand=self._on_demand,
            on_request_end=self._on_request_end,
            eta=self._eta,
        )
        world = World(
            config=config,
            devices=FakeDevices(box),
            control=FakeControl(box),
            launchers={"process": self.launcher},
            ledger=ledger,
            journal=Journal(ledger, lambda: 0.0),
            traffic=self.traffic,
            bus=self.bus,
            host=lambda: HostMemory(4000 * GIB, 4000 * GIB),
        )
        self.fleet = Fleet(config, self.traffic, lambda: 0.0)
        self.loop = Loop(world, self.fleet, wall)
        self.operator = Operator(self.loop, self._no_reload, "fleet.yaml")
        self._task: asyncio.Task[None] | None = None

    def _on_demand(self, _: str) -> None:
        self.loop.tick()

    def _on_request_end(self, model: str, waited_s: float, outcome: str) -> None:
        self.loop.request_ended(model, waited_s, outcome)

    def _eta(self, name: str) -> float | None:
        return self.loop.eta_s(name)

    async def _no_reload(self) -> tuple[str, ...]:
        return ()

    async def __aenter__(self) -> "Service":
        gateway = self.config.gateway
        self.fleet.configure_gpus(self.config, await self.loop.world.devices.inventory(deadline_s=1))
        self.fleet.host_budget_bytes = int((self.config.host_memory_gib or 4000) * GIB)
        self.traffic.configure(
            {
                e.name: Limits(gateway.queue_max, gateway.wait_deadline_s, gateway.freezes_max)
                for e in self.config.engines
            }
        )
        for engine in self.config.engines:
            gpus = tuple(self.fleet.gpu_id(g) or "?" for g in engine.gpus)
            url = f"http://fake/{engine.name}"
            self.fleet.add_engine(
                engine, url, LaunchSpec(engine.name, "process", ("x",), {}, url, "/nowhere.log"), gpus
            )
        recovered = await self.ledger.recover()
        self.fleet.remember(recovered)
        self._task = asyncio.create_task(self.loop.run(recovered))
        self._samples = asyncio.create_task(self._sample())
        return self

    async def _sample(self) -> None:
        from rotator.service.timers import Timers

        timers = Timers(self.loop)
        while True:
            await timers.read_gpus()
            await asyncio.sleep(1.0)

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._samples.cancel()
        self._task.cancel()
        await asyncio.gather(self._task, self._samples, return_exceptions=True)
        assert not self.loop.bugs, "a decision raised: see the log"

    # -- what tests do -----------------------------------------------------------------------------------------------

    def state(self, name: str) -> State:
        return self.fleet.engines[name].state

    async def until(self, name: str, state: State, within_s: float = 600.0) -> None:
        async with asyncio.timeout(within_s):
            while self.state(name) is not state:  # noqa: ASYNC110 — virtual time: an event would test the events, not the state
                await asyncio.sleep(0.01)

    async def ask(self, name: str, serves_s: float = 0.1, deadline_s: float | None = None) -> float:
        """One request, as the gateway makes it. Returns how long it waited for its engine."""
        ticket = self.traffic.try_enter(name, name) or await self.traffic.enter(name, name, deadline_s=deadline_s)
        try:
            await asyncio.sleep(serves_s)
            await ticket.wait_flow()
            assert ticket.cut is None, ticket.cut
            ticket.leave("ok")
        finally:
            ticket.leave("failed")
        return ticket.waited_s


def make_box(gpus: int = 4, gib: float = 96.0, **engines: tuple[Sequence[int], float]) -> Box:
    """A box of ``gpus`` GPUs; each engine as name=(GPU indices, GiB a GPU awake)."""
    box = Box({f"GPU-{i}": int(gib * GIB) for i in range(gpus)})
    for i, (name, (indices, awake_gib)) in enumerate(engines.items()):
        box.engines[name] = FakeEngine(name, tuple(f"GPU-{g}" for g in indices), awake_gib, pid=1000 + i)
    return box


def make_config(box: Box, text: str = "", **per_engine: Mapping[str, Any]) -> FleetConfig:
    """A fleet file for the box; ``text`` adds top-level YAML, ``per_engine`` fields of an engine."""
    lines = ["engines:"]
    for engine in box.engines.values():
        gpus = [int(g.removeprefix("GPU-")) for g in engine.gpus]
        lines.append(
            f"- {{name: {engine.name}, gpus: {gpus}, command: [x], footprint: {{awake_gib: {engine.awake_gib}}}}}"
        )
    config = parse("\n".join(lines) + "\n" + text, base=Path("/nowhere"))
    engines = tuple(e.model_copy(update=dict(per_engine.get(e.name, {}))) for e in config.engines)
    return config.model_copy(update={"engines": engines})


def make_service(
    box: Box,
    config: FleetConfig | None = None,
    ledger: FakeLedger | None = None,
    wall: Callable[[], float] = lambda: 0.0,
) -> Service:
    return Service(box, config or make_config(box), ledger or FakeLedger(), wall)
