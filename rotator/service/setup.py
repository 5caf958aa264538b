"""Builds and changes the fleet from its configuration: engines with their URLs and launch specs, limits, budgets."""

from collections.abc import Callable, Container, Iterable, Mapping
from urllib.parse import urlsplit

from rotator.config import GIB, ConfigError, EngineConfig, FleetConfig
from rotator.config_diff import Changes, describe_changes
from rotator.config_nodes import split_gpu
from rotator.core.lifecycle import is_live
from rotator.core.values import State
from rotator.ports import EngineRecord, Residency
from rotator.ports_nodes import node_of
from rotator.service.loop import Loop
from rotator.service.pools import gpu_names, place
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
        self._places: dict[str, str] = {}  # each engine's node

    def build(self, records: Mapping[str, EngineRecord], residencies: Iterable[Residency] = ()) -> None:
        """Make the fleet. Raises ConfigError where an engine names a GPU that the service may not use.
        ``residencies`` tell which node of its pool an engine had in an earlier life."""
        config = self._loop.world.config
        self._places = {row.engine: node_of(row.gpu) for row in residencies}
        self._check_gpus(config)
        self._limits(config)
        taken = _ports((r.url for r in records.values()), config.engines)
        owners = _owners(records)
        for engine in config.engines:
            self._add(engine, owners.get(engine.name), taken)

    def apply(self, new: FleetConfig) -> Changes:
        """Change to another configuration without touching engines that it does not concern. Raises ConfigError."""
        old = self._loop.world.config
        changes = describe_changes(old, new)
        self._check_gpus(new)
        if problems := self._in_the_way(changes):
            raise ConfigError(problems)
        self._loop.world.config = self._loop.fleet.config = new
        self._loop.fleet.configure_gpus(new, [g.info for g in self._loop.fleet.gpus.values()])
        for name in changes.removed:
            self._loop.fleet.remove_engine(name)
            if self._loop.world.nodes is not None:
                self._loop.world.nodes.forget(name)
        taken = _ports((e.url for e in self._loop.all_runtimes()), new.engines)
        for engine in new.engines:
            if engine.name in changes.added:
                self._add(engine, None, taken)
                # What an earlier life left of it may still run: nothing begins before it was looked for.
                self._loop.runtime(engine.name).unseen = engine.name in self._loop.adopter.left
                self._loop.recorder.note(self._loop.runtime(engine.name))
            else:
                self._change(engine, engine.name in changes.restart_needed)
        self._loop.fleet.index_names()
        self._limits(new)
        self._loop.world.bus.publish("config.reloaded", changes=list(changes.lines()))
        return changes

    def keep(self) -> None:
        """Those who were to be removed stay after all."""
        self._limits(self._loop.world.config)

    def _in_the_way(self, changes: Changes) -> list[str]:
        """Whoever adopts an engine or carries out a swap with it must find it as it was, or not at all."""
        fleet, again = self._loop.fleet.engines, "reload again when that is over"
        concerned = [fleet[name] for name in (*changes.removed, *changes.restart_needed)]
        if self._loop.adopting and concerned:
            return [f"engines: it is still being looked for which of them run: {again}"]
        problems = [f"engine '{e.name}': nobody can tell yet whether it runs: {again}" for e in concerned if e.unseen]
        for name in changes.removed:
            if is_live(fleet[name].state):
                problems.append(f"engine '{name}': still runs: stop it first (POST /engines/{name}/stop)")
            elif any(active.concerns(name) for active in self._loop.active.values()):
                problems.append(f"engine '{name}': a swap with it is under way: {again}")
        return problems

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
        if restart_needed and is_live(runtime.state):  # what runs stays what it was started as
            runtime.started_as = runtime.started_as or runtime.config.spec_hash()
        runtime.config = engine
        if pin_changed:
            runtime.pinned = engine.pin
        if not restart_needed:
            return
        runtime.drifted = True
        if not is_live(runtime.state):
            self.rebuild(engine.name)

    def _add(self, engine: EngineConfig, record: EngineRecord | None, taken: set[int]) -> None:
        names = gpu_names(engine, self._places.get(engine.name, ""))
        gpus = tuple(self._loop.fleet.gpu_id(g) or "" for g in names)
        infos = tuple(self._loop.fleet.gpus[g].info for g in gpus)
        head, port = infos[0].node, _port_there(engine)
        if head and self._loop.world.nodes is not None:
            url = self._loop.world.nodes.declare(head, engine.name, port)
        else:
            url = self._url(engine, record, taken)
        spec = launch_spec(engine, url, infos, self._loop.world.config.state_dir, port if head else None)
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
        fleet, nodes = self._loop.fleet, self._loop.world.nodes
        away = frozenset(n for n in nodes.names if not nodes.known(n).reachable) if nodes is not None else frozenset()
        self._places = place(config, lambda name: fleet.gpu_id(name) is not None, self._places, away)
        problems = [
            f"engine '{engine.name}'.gpus: there is no GPU '{gpu}' for this service: it has {have}{_unseen(gpu, away)}"
            for engine in config.engines
            for gpu in gpu_names(engine, self._places[engine.name])
            if fleet.gpu_id(gpu) is None
        ]
        problems += [words for engine in config.engines if (words := self._misplaced(engine)) is not None]
        problems += [
            f"engine '{engine.name}'.launcher: '{engine.launcher}' is not available: give it what it needs and restart "
            "the service, or start the engine yourself and use launcher 'attach' with its url"
            for engine in config.engines
            if engine.launcher not in self._loop.world.launchers
        ]
        if problems:
            raise ConfigError(problems)

    def _misplaced(self, engine: EngineConfig) -> str | None:
        """Why an engine cannot be where its GPUs are; None where it can."""
        names = gpu_names(engine, self._places[engine.name])
        nodes = tuple(dict.fromkeys(split_gpu(name)[0] for name in names))
        if not any(nodes):
            return None
        if engine.launcher == "process":
            return (
                f"engine '{engine.name}'.launcher: 'process' starts engines on this machine only, its GPUs are on "
                f"{', '.join(n or 'this one' for n in nodes)}: use 'nomad', or start it there and use 'attach'"
            )
        if not nodes[0]:
            return None
        if engine.launcher == "attach" and urlsplit(str(engine.url)).hostname not in ("127.0.0.1", "localhost", "::1"):
            return f"engine '{engine.name}'.url: give it as node {nodes[0]} sees it, as http://127.0.0.1:8001"
        if not _port_there(engine):
            return f"engine '{engine.name}'.port: give the port on which it listens on node {nodes[0]}"
        return None

    def _limits(self, config: FleetConfig) -> None:
        gateway, policies, traffic = config.gateway, config.policies, self._loop.world.traffic
        traffic.shares = {key.name: key.share for key in config.keys}
        traffic.waiting_max = {key.name: key.waiting_max for key in config.keys if key.waiting_max is not None}
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
        self.budget_nodes()

    def budget_nodes(self) -> None:
        """What each other node's RAM may hold of masters, as far as it was ever told how much there is."""
        nodes = self._loop.world.nodes
        for node in self._loop.world.config.nodes if nodes is not None else ():
            told = int(_HOST_SHARE * nodes.known(node.name).host_bytes) if nodes is not None else 0
            budget = told if node.host_memory_gib is None else int(node.host_memory_gib * GIB)
            self._loop.fleet.node_budgets[node.name] = budget


def _port_there(engine: EngineConfig) -> int:
    """The port on its own node; 0 where nobody said."""
    if engine.url is not None:
        return urlsplit(str(engine.url)).port or 80
    return engine.port or 0


def _unseen(gpu: str, away: Container[str]) -> str:
    node = split_gpu(gpu)[0]
    return f" (node {node} was never seen and its agent does not answer: start it)" if node in away else ""


def _owners(records: Mapping[str, EngineRecord]) -> dict[str, EngineRecord]:
    """Whose port is still their own. One that was taken out of the fleet leaves its port to others; when it is back, it
    belongs to whoever runs."""
    by_url = {r.url: name for name, r in sorted(records.items(), key=lambda item: is_live(item[1].state))}
    return {name: records[name] for name in by_url.values()}


def _ports(urls: Iterable[str], engines: Iterable[EngineConfig]) -> set[int]:
    """Ports that engines of ours have or were promised."""
    known = {urlsplit(url).port for url in urls} | {engine.port for engine in engines}
    return {port for port in known if port is not None}
