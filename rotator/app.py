"""The composition root: the only place that knows every part."""

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import uvicorn
import uvloop

from rotator.adapters.agents import Agents
from rotator.adapters.attach_remote import FleetAttach
from rotator.adapters.engine_keys import EngineKeys
from rotator.adapters.evidence import FileEvidence
from rotator.adapters.fleet_devices import FleetDevices, FleetReports, own_devices
from rotator.adapters.gpu_reports import NvmlReports
from rotator.adapters.host import read_host_memory
from rotator.adapters.ledger import SqlLedger
from rotator.adapters.logfiles import FileLogs
from rotator.adapters.logs import set_up_logs
from rotator.adapters.logwatch import FileLogWatch
from rotator.adapters.loopback import free_loopback_port
from rotator.adapters.models import weight_bytes
from rotator.adapters.nomad import NomadLauncher, connect
from rotator.adapters.nomad_files import JobText
from rotator.adapters.notify import tell_systemd
from rotator.adapters.overlay import OverlayCheck
from rotator.adapters.process import ProcessLauncher
from rotator.adapters.redact import redactor
from rotator.adapters.telemetry import open_telemetry
from rotator.adapters.vllm import VllmControl
from rotator.adapters.webhooks import Webhooks
from rotator.config import ConfigError, FleetConfig, load
from rotator.config_watchdog import EvidenceConfig
from rotator.doctor.preflight import Preflight
from rotator.ports import Launcher, LauncherNews, LaunchError, Recovered, RotatorError
from rotator.ports_watchdog import Senses
from rotator.service.api import create_api
from rotator.service.callouts import call_out
from rotator.service.directory import FleetDirectory
from rotator.service.events import EventBus
from rotator.service.federation import Federation
from rotator.service.fleet import Fleet
from rotator.service.front import Front
from rotator.service.gateway import Gateway
from rotator.service.journal import Journal
from rotator.service.keys import Keys
from rotator.service.loop import Loop
from rotator.service.mailbox import LauncherTold
from rotator.service.measuring import measure
from rotator.service.metrics import Metrics
from rotator.service.operator import Operator
from rotator.service.quotas import Quotas
from rotator.service.reload import Reloads
from rotator.service.sessions import Sessions
from rotator.service.setup import Setup
from rotator.service.shutdown import wind_down
from rotator.service.timers import Timers
from rotator.service.tls import open_tls, read_certificates
from rotator.service.tracing import Traces
from rotator.service.traffic import Traffic
from rotator.service.wire import bounded
from rotator.service.world import World
from rotator.web.house import open_page

_log = logging.getLogger("rotator")
_INVENTORY_S = 10.0


def serve(config_path: Path) -> int:
    """Run the service until SIGTERM or SIGINT. Returns the exit code: 0 after an orderly end, 1 if it could not run."""
    try:
        config = load(config_path)
        set_up_logs(config.log, _hide_secrets(config))
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_Service(config, config_path).run())
    except ConfigError as e:
        print("\n".join(f"rotator: {problem}" for problem in e.problems), file=sys.stderr)
    except RotatorError as e:
        print(f"rotator: {e}", file=sys.stderr)
    return 1


class _Service:
    """One life of the service: built from a configuration, run to its end."""

    def __init__(self, config: FleetConfig, path: Path) -> None:
        self._config = config
        self._path = path
        self._stop = asyncio.Event()

    async def run(self) -> int:
        """Raises ConfigError or RotatorError if it cannot start."""
        self._bind = self._config.bind  # as it is until the end, whatever a reload says
        self._tls = open_tls(self._bind.tls) if self._bind.tls is not None else None
        self._listener = _listen(self._config)
        async with self._world() as (world, fleet):
            self._loop = loop = Loop(world, fleet)
            self._setup = Setup(loop, weight_bytes, free_loopback_port)
            loop.rebuild = self._setup.rebuild
            recovered = await world.ledger.recover()
            await self._find_gpus(world, fleet, recovered)
            self._setup.build(recovered.engines, recovered.residencies)
            self._give_engine_keys()
            if world.nodes is not None:
                await world.nodes.look(deadline_s=_INVENTORY_S)  # agents learn where this fleet's engines listen
            fleet.remember(recovered)
            self._operator = Operator(loop, self._reload, str(self._path))
            self._reloads = Reloads(loop, self._operator, self._setup)
            deciding = asyncio.create_task(loop.run(recovered))
            timers = Timers(loop, on_nodes=self._setup.budget_nodes)
            timers.start()
            webhooks = Webhooks(self._config.webhooks, os.environ)
            calling = asyncio.create_task(call_out(world.bus, webhooks.tell))
            measuring = asyncio.create_task(measure(loop, self._metrics))
            try:
                async with self._tracing(world) as traces:
                    await self._serve(world, traces)
            finally:
                timers.stop()
                calling.cancel()
                measuring.cancel()
                await webhooks.close()
                deciding.cancel()
                await asyncio.gather(deciding, return_exceptions=True)
        return 0

    async def _find_gpus(self, world: World, fleet: Fleet, recovered: Recovered) -> None:
        """What every machine has. A node that does not answer has what it had when it was last seen."""
        if world.nodes is not None:
            world.nodes.remember(recovered.nodes)
            for record in await world.nodes.look(deadline_s=_INVENTORY_S):
                await world.ledger.put_node(record)
        inventory = await world.devices.inventory(deadline_s=_INVENTORY_S)
        seen = {info.node for info in inventory}
        others = {node.name for node in self._config.nodes} - seen
        remembered = tuple(info for info in recovered.gpus if info.node in others)
        if problems := fleet.configure_gpus(self._config, (*inventory, *remembered)):
            raise ConfigError(problems)
        for info in remembered:
            if info.id in fleet.gpus and world.nodes is not None:
                fleet.gpus[info.id].unreadable = world.nodes.known(info.node).reason or "its agent lists no GPU"
        await world.ledger.put_gpus([g.info for g in fleet.gpus.values()])

    def _give_engine_keys(self) -> None:
        """What engines that others start want to see. Raises ConfigError where the environment lacks it."""
        keyed = [(e.url, e.config.api_key_env) for e in self._loop.all_runtimes() if e.config.api_key_env is not None]
        if missing := sorted({name for _, name in keyed if not os.environ.get(name)}):
            raise ConfigError(
                [f"api_key_env: environment variable {name} is not set: it must hold the key" for name in missing]
            )
        self._engine_keys.give({url: os.environ[name] for url, name in keyed})

    # -- parts -------------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _world(self) -> AsyncIterator[tuple[World, Fleet]]:
        config = self._config
        state_dir = _state_dir(config)
        self._agents = agents = Agents(config.nodes)
        url = config.ledger.url or f"sqlite:///{state_dir / 'ledger.db'}"
        ledger = await SqlLedger.open(
            url,
            deadline_s=config.ledger.deadline_s,
            sample_retention_h=config.devices.sample_retention_h,
            retention_days=config.ledger.retention_days,
        )
        self._engine_keys = engine_keys = EngineKeys(state_dir / "engine_keys.json", agents.door)
        control = VllmControl(doors=engine_keys.door)
        launchers: dict[str, Launcher] = {
            "process": ProcessLauncher(
                state_dir,
                _service_id(state_dir),
                nccl_trace=lambda: self._config.watchdog.evidence.nccl_trace,
                api_key=engine_keys.issue,
            ),
            "attach": FleetAttach(agents),
        }
        nomad = self._nomad(state_dir)
        if nomad is not None:
            launchers["nomad"] = nomad
        self._metrics = Metrics()
        traffic = Traffic(
            queue_total_max=config.gateway.queue_total_max,
            on_demand=self._on_demand,
            on_request_end=self._on_request_end,
            eta=self._eta,
        )
        fleet = Fleet(config, traffic)
        try:
            yield (
                World(
                    config,
                    FleetDevices(own_devices(config), agents),
                    control,
                    launchers,
                    ledger,
                    Journal(ledger),
                    traffic,
                    EventBus(),
                    read_host_memory,
                    agents if config.nodes else None,
                    self._senses(state_dir),
                    preflight=Preflight(lambda name: tuple(fleet.gpus[g].info for g in fleet.engines[name].gpus)),
                    overlay_check=OverlayCheck(control),
                ),
                fleet,
            )
        finally:
            if nomad is not None:
                await nomad.close()
            await control.close()
            await agents.close()
            await ledger.close()

    def _senses(self, state_dir: Path) -> Senses:
        evidence = open_evidence(self._config, state_dir, lambda: self._config.watchdog.evidence)
        return Senses(FleetReports(NvmlReports(), self._agents), FileLogWatch(state_dir), evidence)

    def _nomad(self, state_dir: Path) -> NomadLauncher | None:
        """None where the environment names no usable Nomad and no engine needs one; else raises LaunchError."""
        config = self._config
        try:
            return connect(
                config.nomad,
                os.environ,
                _service_id(state_dir),
                told=self._launcher_told,
                render=_render_job,
                agents=self._agents,
            )
        except LaunchError:
            if any(engine.launcher == "nomad" for engine in config.engines):
                raise
            return None

    def _launcher_told(self, news: LauncherNews) -> None:
        self._loop.tell(LauncherTold(news))

    def _on_demand(self, _: str) -> None:
        self._loop.tick()

    def _on_request_end(self, model: str, waited_s: float, outcome: str) -> None:
        self._metrics.request_ended(model, waited_s, outcome)
        self._loop.request_ended(model, waited_s, outcome)

    def _eta(self, engine: str) -> float | None:
        return self._loop.eta_s(engine)

    # -- serving and ending ------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _tracing(self, world: World) -> AsyncIterator[Traces | None]:
        tracer = open_telemetry(self._config.telemetry, os.environ)
        if tracer is None:
            yield None
            return
        traces = Traces(tracer)
        following = asyncio.create_task(traces.follow(world.bus))
        self._metrics.watch_spans(lambda: tracer.counts)
        try:
            yield traces
        finally:
            following.cancel()
            await tracer.close()

    async def _serve(self, world: World, traces: Traces | None) -> None:
        config = self._config
        sessions = Sessions(_page_secret(config.state_dir), config.keys, config.page.session_h * 3600)
        self._keys = keys = Keys(config.keys, config.bind, sessions)
        self._quotas = quotas = Quotas(config.keys)
        self._metrics.watch(world.traffic)
        self._gateway = gateway = Gateway(
            traffic=world.traffic,
            directory=FleetDirectory(self._loop.fleet),
            config=config.gateway,
            bus=world.bus,
            metrics=self._metrics,
            authorize=keys.authorize,
            guard=keys.guard,
            identify=keys.client,
            doors=self._engine_keys.door,
            quotas=quotas,
            bodies_bytes_max=int(config.http.bodies_max_mib * (1 << 20)),
            traces=traces,
        )
        api = create_api(
            self._operator,
            world.bus,
            authorize=keys.authorize_operator,
            guard=keys.guard,
            metrics_registry=self._metrics.registry,
            engine_metrics=Federation(self._loop, world.control, self._metrics).text,
            logs=FileLogs(_hide_secrets(config)),
        )
        page = open_page(self._operator, world.bus, api, keys, config.page, config.state_dir / "logs" / "page.log")
        server = _Server(uvicorn_config(Front(gateway, api, page), config, self._tls))
        self._on_signals()
        try:
            await self._until_stopped(server, world)
        finally:
            await gateway.close()
            if page is not None:
                await page.close()

    async def _until_stopped(self, server: "_Server", world: World) -> None:
        serving = asyncio.create_task(server.serve([self._listener]))
        stopping = asyncio.create_task(self._stop.wait())
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not serving.done():
            tell_systemd("STOPPING=1")
            await wind_down(self._loop)
        stopping.cancel()
        server.should_exit = True
        server.force_exit = True  # whoever is still connected was given its time
        await serving

    def _on_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        loop.add_signal_handler(signal.SIGHUP, self._reload_soon)

    # -- reload ------------------------------------------------------------------------------------------------------

    def _reload_soon(self) -> None:
        async def reload() -> None:
            try:
                for line in await self._reload():
                    _log.info("reload: %s", line)
            except (ConfigError, RotatorError) as e:
                _log.error("reload: %s", e)

        self._reloading = asyncio.create_task(reload())

    async def _reload(self) -> tuple[str, ...]:
        """Take the file as it is now: engines that it no longer has are stopped, the rest applies at once."""
        new, changes = await self._reloads.take(self._read)
        self._config = new
        self._give_engine_keys()
        self._gateway.reconfigure(new.gateway)
        self._keys.replace(new.keys)
        self._quotas.configure(new.keys)
        return changes.lines()

    async def _read(self) -> FleetConfig:
        """Raises ConfigError, also for what a running service cannot take over."""
        new = await asyncio.to_thread(load, self._path)
        if not new.keys and not self._bind.is_loopback:
            raise ConfigError(["keys: this service listens beyond loopback: keep a key, or restart it on 127.0.0.1"])
        if self._tls is not None and new.bind.tls is not None:
            await asyncio.to_thread(read_certificates, self._tls, new.bind.tls)
        return new


class _Server(uvicorn.Server):
    """Signals are the service's business: it drains before the server goes. The socket is bound before, so that a taken
    port is one clear line and no engine is touched for it. systemd hears of readiness once requests are served."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            tell_systemd("READY=1")

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _listen(config: FleetConfig) -> socket.socket:
    host, port = config.bind.host, config.bind.port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as e:
        listener.close()
        hint = "choose another port, or end what listens there (`rotator check` tells who)"
        raise ConfigError([f"bind: cannot listen on {host}:{port}: {e.strerror}: {hint}"]) from None
    return listener


def uvicorn_config(app: Any, config: FleetConfig, tls: ssl.SSLContext | None = None) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        host=config.bind.host,
        port=config.bind.port,
        http=bounded(config.http),
        ssl_context_factory=None if tls is None else lambda _, __: tls,
        ws="websockets-sansio",
        lifespan="off",
        access_log=False,
        proxy_headers=False,
        log_config=None,
        server_header=False,
        date_header=True,
        h11_max_incomplete_event_size=1 << 16,
        timeout_keep_alive=75,
    )


def open_evidence(config: FleetConfig, state_dir: Path, settings: Callable[[], EvidenceConfig]) -> FileEvidence:
    """Bundles in which what the fleet file gives engines as secrets is hidden, too."""
    return FileEvidence(state_dir, settings, environ=_environments(config))


def _hide_secrets(config: FleetConfig) -> Callable[[str], str]:
    return redactor(_environments(config))


def _environments(config: FleetConfig) -> dict[str, str]:
    """The service's and all engines', for the secrets in them: one that two engines have may differ."""
    own = {f"{e.name} {k}": v for e in config.engines for k, v in e.env.items()}
    return {**os.environ, **own}


def _state_dir(config: FleetConfig) -> Path:
    try:
        (config.state_dir / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ConfigError(
            [f"state_dir: cannot make {config.state_dir}: {e.strerror}: choose another or mend it"]
        ) from None
    return config.state_dir


def _render_job(site: Path, name: str) -> JobText:
    """Raises LaunchError with one line a problem."""
    from rotator.jobs.findings import JobsError  # all of it is read only where a job comes from a site file
    from rotator.jobs.render import render_text

    try:
        return JobText(*render_text(name, site))
    except JobsError as e:
        raise LaunchError("; ".join(e.problems)) from None


def _service_id(state_dir: Path) -> str:
    """Marks this service's engines among those of others, over all its lives."""
    path = state_dir / "service_id"
    with contextlib.suppress(FileExistsError), path.open("x") as f:
        f.write(secrets.token_hex(8))
    return path.read_text().strip()


def _page_secret(state_dir: Path) -> str:
    """Signs the page's sessions, over all of this service's lives. Only its own user may read it."""
    path = state_dir / "page_secret"
    with contextlib.suppress(FileExistsError), open(path, "x", opener=lambda p, flags: os.open(p, flags, 0o600)) as f:
        f.write(secrets.token_hex(32))
    return path.read_text().strip()
