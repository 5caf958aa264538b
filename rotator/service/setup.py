"""Builds and changes the fleet from its configuration: engines with their URLs and launch specs, limits, budgets."""

from collections.abc import Callable, Container, Iterable, Mapping
from urllib.parse import urlsplit

from rotator.config import GIB, ConfigError, EngineConfig, FleetConfig
from rotator.config_diff import Changes, describe_changes
from rotator.core.lifecycle import is_live
from rotator.core.values import State
from rotator.ports import EngineRecord
from rotator.service.loop import Loop
from rotator.service.specs import launch_spec
from rotator.service.traffic import Limits

_HOST_SHARE = 0.8  # of the host's RAM for masters, where the configuration says nothing


class Setup:
    """Runs within the loop's task (or before it starts).

    ``weight_bytes`` looks at an engine's model files; ``free_port`` finds a loopback
    port that is none of those given."""

    def __init__(
        self,
        loop: Loop,
        weight_bytes: Callable[[EngineConfig], int | None],
        free_port: Callable[[Container[int]], int],
    ) -> None:
        self._free_port = free_port
        self._loop = loop
        self._host_total_bytes = loop.world.host().total_bytes
        self._weight_bytes = weight_bytes

    def build(self, records: Mapping[str, EngineRecord]) -> None:
        """Make the fleet. Raises ConfigError where an engine names a GPU that the service may not use."""
        config = self._loop.world.config
        self._check_gpus(config)
        self._limits(config)
        taken = _ports((r.url for r in records.values()), config.engines)
        for engine in config.engines:
            self._add(engine, records.get(engine.name), taken)

    def apply(self, new: FleetConfig) -> Changes:
        """Change to another configuration without touching engines that it does not concern. Raises ConfigError."""
        old = self._loop.world.config
        changes = describe_changes(old, new)
        self._check_gpus(new)
        if busy := [name for name in changes.removed if is_live(self._loop.runtime(name).state)]:
            raise ConfigError([f"engine '{n}': still runs: stop it first (POST /engines/{n}/stop)" for n in busy])
        self._loop.world.config = self._loop.fleet.config = new
        self._loop.fleet.configure_gpus(new, [g.info for g in self._loop.fleet.gpus.values()])
        for name in changes.removed:
            self._loop.fleet.remove_engine(name)
        taken = _ports((e.url for e in self._loop.all_runtimes()), new.engines)
        for engine in new.engines:
            if engine.name in changes.added:
                self._add(engine, None, taken)
            else:
                self._change(engine, engine.name in changes.restart_needed)
        self._loop.fleet.index_names()
        self._limits(new)
        self._loop.world.bus.publish("config.reloaded", changes=list(changes.lines()))
        return changes

    def rebuild(self, name: str) -> None:
        """Take an engine that is down over into its changed configuration: its next start is by the new one."""
        old = self._loop.fleet.engines[name]
        self._loop.fleet.remove_engine(name)
        taken = _ports((e.url for e in self._loop.all_runtimes()), ())
        self._add(old.config, None, taken)
        new = self._loop.fleet.engines[name]
        new.state, new.reason, new.since_wall_s = old.state, old.reason, old.since_wall_s
        new.failures, new.retry_at_s, new.preload = old.failures, old.retry_at_s, old.preload
        new.pinned, new.counters = old.pinned, old.counters

    def _change(self, engine: EngineConfig, restart_needed: bool) -> None:
        """Settings apply at once. What a process was started with applies at its next start: at once if it is down."""
        runtime = self._loop.runtime(engine.name)
        pin_changed = runtime.config.pin != engine.pin
        runtime.config = engine
        if pin_changed:
            runtime.pinned = engine.pin
        if not restart_needed:
            return
        runtime.drifted = True
        if not is_live(runtime.state):
            self.rebuild(engine.name)

    def _add(self, engine: EngineConfig, record: EngineRecord | None, taken: set[int]) -> None:
        gpus = tuple(self._loop.fleet.gpu_id(g) or "" for g in engine.gpus)
        url = self._url(engine, record, taken)
        infos = tuple(self._loop.fleet.gpus[g].info for g in gpus)
        spec = launch_spec(engine, url, infos, self._loop.world.config.state_dir)
        self._loop.fleet.add_engine(engine, url, spec, gpus).weight_bytes = self._weight_bytes(engine)

    def _url(self, engine: EngineConfig, record: EngineRecord | None, taken: set[int]) -> str:
        """Where the engine listens: attached, its configured port, the port it had before, or a free one."""
        if engine.url is not None:
            return str(engine.url).rstrip("/")
        if engine.port is not None:
            return f"http://127.0.0.1:{engine.port}"
        if record is not None and record.url and record.launcher == engine.launcher:
            return record.url
        port = self._free_port(taken)
        taken.add(port)
        return f"http://127.0.0.1:{port}"

    def _check_gpus(self, config: FleetConfig) -> None:
        have = ", ".join(f"{g.info.index} ({g.info.id})" for g in self._loop.fleet.gpus.values()) or "none"
        problems = [
            f"engine '{engine.name}'.gpus: there is no GPU '{gpu}' for this service: it has {have}"
            for engine in config.engines
            for gpu in engine.gpus
            if self._loop.fleet.gpu_id(gpu) is None
        ]
        problems += [
            f"engine '{engine.name}'.launcher: '{engine.launcher}' is not available in this release: start the engine "
            "yourself and use launcher 'attach' with its url"
            for engine in config.engines
            if engine.launcher not in self._loop.world.launchers
        ]
        if problems:
            raise ConfigError(problems)

    def _limits(self, config: FleetConfig) -> None:
        gateway, policies, traffic = config.gateway, config.policies, self._loop.world.traffic
        traffic.shares = {key.name: key.share for key in config.keys}
        traffic.queue_total_max = gateway.queue_total_max
        traffic.configure(
            {
                e.name: Limits(
                    e.queue_max or gateway.queue_max,
                    e.wait_deadline_s or gateway.wait_deadline_s,
                    gateway.freezes_max,
                    e.in_flight_max,
                    policies.stall_bound_s,
                    policies.client_waiters_max,
                )
                for e in config.engines
            }
        )
        for engine in self._loop.all_runtimes():  # a gate that was just made is closed
            if engine.state is State.AWAKE:
                traffic.open(engine.name)
        budget = config.host_memory_gib
        share = int(_HOST_SHARE * self._host_total_bytes)
        self._loop.fleet.host_budget_bytes = int(budget * GIB) if budget is not None else share


def _ports(urls: Iterable[str], engines: Iterable[EngineConfig]) -> set[int]:
    """Ports that engines of ours have or were promised."""
    known = {urlsplit(url).port for url in urls} | {engine.port for engine in engines}
    return {port for port in known if port is not None}
