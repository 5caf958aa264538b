"""One life of the service, wired as the composition root does, over simulated parts; it can be killed at will."""

import asyncio
import contextvars
import itertools
import logging
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

from rotator.adapters.vllm import VllmControl
from rotator.config import ConfigError, FleetConfig
from rotator.ports import HostMemory, LedgerError
from rotator.ports_watchdog import Senses
from rotator.service.directory import FleetDirectory
from rotator.service.events import Event, EventBus
from rotator.service.fleet import Fleet
from rotator.service.gateway import Gateway
from rotator.service.journal import Journal
from rotator.service.loop import Loop
from rotator.service.metrics import Metrics
from rotator.service.operator import Operator
from rotator.service.reload import Reloads
from rotator.service.setup import Setup
from rotator.service.shutdown import wind_down
from rotator.service.timers import Timers
from rotator.service.traffic import Traffic
from rotator.service.world import World as ServiceWorld
from rotator.sim.faults.file import FleetFile
from rotator.sim.faults.network import Network
from rotator.sim.faults.parts import DiskWorker, SimDevices, SimDisk, SimLauncher, SimLedger, SimSenses
from rotator.sim.faults.world import LIFE, World

_log = logging.getLogger(__name__)
FIRST_PORT = 20_000


class Bus(EventBus):
    """The service's own bus; ``on_event`` sees everything at once."""

    def __init__(self, wall: Callable[[], float], on_event: Callable[[Event], None]) -> None:
        super().__init__(wall)
        self._on_event = on_event

    def publish(self, kind: str, engine: str | None = None, **data: Any) -> Event:
        event = super().publish(kind, engine, **data)
        self._on_event(event)
        return event


class VirtualScheduler:
    """What APScheduler does for the timers, by the running loop's clock: a job that is late is skipped."""

    def __init__(self) -> None:
        self.running = False
        self._jobs: list[tuple[Callable[[], Any], float]] = []
        self._tasks: list[asyncio.Task[None]] = []

    def add_job(self, job: Callable[[], Any], trigger: Any, id: str) -> None:
        self._jobs.append((job, trigger.interval.total_seconds()))

    def start(self) -> None:
        self.running = True
        self._tasks = [asyncio.get_running_loop().create_task(self._run(*job)) for job in self._jobs]

    def shutdown(self, wait: bool) -> None:
        self.running = False
        for task in self._tasks:
            task.cancel()

    async def _run(self, job: Callable[[], Any], every_s: float) -> None:
        while True:
            await asyncio.sleep(every_s)
            try:
                await job()
            except Exception:  # as the scheduler does: a job that failed comes again
                _log.warning("a timer's job failed", exc_info=True)


class ServiceLife:
    """``up`` is set while it serves; ``on_exit`` hears when it could not start."""

    up: bool = False
    adopted_s: float = 0.0  # when it had found out what runs
    loop: Loop
    traffic: Traffic
    operator: Operator
    gateway: Gateway
    ledger: SimLedger

    def __init__(
        self,
        world: World,
        file: FleetFile,
        ledger_path: Path,
        parts: tuple[Network, SimLauncher, SimDisk],
        on_event: Callable[["ServiceLife", Event], None],
        on_exit: Callable[["ServiceLife"], None],
        on_put_away: Callable[["ServiceLife"], None] = lambda _: None,
    ) -> None:
        self.dead = False
        self.ending = False  # it was told to end
        self.puts_away = False  # its engines are stopped or put to sleep, because it ends
        self._world = world
        self._file = file
        self._url = f"sqlite:///{ledger_path}"
        self._folder = str(ledger_path.parent)
        self._network, self._launcher, self._disk = parts
        self._on_event = on_event
        self._on_exit = on_exit
        self._on_put_away = on_put_away
        self._tasks: dict[asyncio.Task[Any], None] = {}
        self._context = contextvars.copy_context()
        self._context.run(LIFE.set, self)
        self._ports = itertools.count(FIRST_PORT)
        self._told_to_end = asyncio.Event()
        self.main = self.spawn(self._run())

    def adopt(self, task: asyncio.Task[Any]) -> None:
        self._tasks[task] = None
        task.add_done_callback(lambda done: self._tasks.pop(done, None))

    def spawn(self, work: Any) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = self._context.copy().run(self._world.loop.create_task, work)
        return task

    def terminate(self) -> None:
        """As SIGTERM: ``main`` is done once it has ended."""
        self.ending = True
        self._told_to_end.set()

    async def kill(self) -> None:
        """As ``kill -9``: nothing of it reaches the world any more, which takes its lock and sockets back."""
        self.dead, self.up = True, False
        while self._tasks:
            for task in tuple(self._tasks):
                task.cancel()
            await asyncio.sleep(0)
        self._disk.let_go()

    # -- composition -------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        try:
            await self._serve()
        except (LedgerError, ConfigError) as e:
            told = str(e).replace(self._folder, "FOLDER")  # it differs from run to run, and the trace must not
            self._world.trace.note(f"the service cannot start: {told}")
            self._on_exit(self)

    async def _serve(self) -> None:
        config, wall = self._file.read(), self._world.wall
        self.ledger = await SimLedger.on(self._disk).open(
            self._url,
            deadline_s=config.ledger.deadline_s,
            sample_retention_h=config.devices.sample_retention_h,
            wall=wall,
            worker=lambda name: DiskWorker(name, self._world, self._disk),
        )
        try:
            await self._compose(config, wall)
            await self._told_to_end.wait()
            await wind_down(self.loop, self._put_away)
            await self._close()
        finally:
            self.up = False
            if not self.dead:
                await self.ledger.close()

    def _put_away(self) -> None:
        self.puts_away = True
        self._on_put_away(self)

    async def _close(self) -> None:
        """Everything of its own, in the composition root's order."""
        self.up = False
        await self.gateway.close()
        self._timers.stop()
        self._deciding.cancel()
        await asyncio.gather(self._deciding, return_exceptions=True)
        await self._control.close()

    async def _compose(self, config: FleetConfig, wall: Callable[[], float]) -> None:
        metrics = Metrics()
        self._control = VllmControl(exchange=self._network.exchange)
        self.traffic = Traffic(
            queue_total_max=config.gateway.queue_total_max,
            on_demand=lambda _: self.loop.tick(),
            on_request_end=self._request_ended,
            eta=lambda name: self.loop.eta_s(name),  # noqa: PLW0108 — the loop is made after it
        )
        bus = Bus(wall, lambda event: self._on_event(self, event))
        world = ServiceWorld(
            config,
            SimDevices(self._world),
            self._control,
            {"process": self._launcher},
            self.ledger,
            Journal(self.ledger, wall),
            self.traffic,
            bus,
            self._host_memory,
            senses=Senses(*(SimSenses(self._world, self._launcher._engines),) * 3),
        )
        fleet = Fleet(config, self.traffic, wall)
        self.loop = Loop(world, fleet, wall)
        setup = Setup(self.loop, lambda _: None, self._free_port)
        self.loop.rebuild = setup.rebuild
        recovered = await self.ledger.recover()
        fleet.configure_gpus(config, await world.devices.inventory(deadline_s=10.0))
        await self.ledger.put_gpus([g.info for g in fleet.gpus.values()])
        setup.build(recovered.engines)
        fleet.remember(recovered)
        self.operator = Operator(self.loop, self._reload, "fleet.yaml")
        self._reloads = Reloads(self.loop, self.operator, setup)
        self.gateway = Gateway(
            traffic=self.traffic, directory=FleetDirectory(fleet), config=config.gateway, bus=bus, metrics=metrics
        )
        self._deciding = asyncio.get_running_loop().create_task(self.loop.run(recovered))
        self._timers = Timers(self.loop, VirtualScheduler(), lambda _: 0.0)
        self._timers.start()
        self.up = True

    async def _reload(self) -> tuple[str, ...]:
        new, changes = await self._reloads.take(self._read_file)
        self.gateway.reconfigure(new.gateway)
        return changes.lines()

    async def _read_file(self) -> FleetConfig:
        return self._file.read()

    def _request_ended(self, model: str, waited_s: float, outcome: str) -> None:
        if not self.dead:
            self.loop.request_ended(model, waited_s, outcome)

    def _host_memory(self) -> HostMemory:
        return HostMemory(self._world.host_total, self._world.host_total - self._world.host_used)

    def _free_port(self, taken: Container[int]) -> int:
        return next(port for port in self._ports if port not in taken)
