"""What follows when an engine or a GPU failed: evidence first, then the kill, then back to service or to a person."""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rotator import __version__
from rotator.core import policy
from rotator.core.gpu_faults import GpuAct, GpuFinding
from rotator.core.lifecycle import Event
from rotator.core.values import EngineName, GpuId, State
from rotator.ports import EngineError, Incident, LaunchError, LedgerError
from rotator.ports_watchdog import Case
from rotator.service.burial import Undertaker
from rotator.service.owner import Facts
from rotator.service.records import EngineRuntime
from rotator.service.world import World

if TYPE_CHECKING:
    from rotator.service.loop import Loop

_log = logging.getLogger(__name__)
FAULTS_KEPT = 32  # times, for the breaker
BUNDLES_MAX = 3  # of one incident that comes again and again
_METRICS_S = 3.0
_CASE_S = 30.0  # beyond the collector's own time: what the service knows, and writing it down
_JOURNAL_ROWS = 50
_EVENTS = 200
_CORDON_AGAIN_S = 5.0
# What only a new launch can mend, so that a wake does not close it.
_LASTING = frozenset({"acceptance", "slow", "residue"})


class Recovery:
    """Its methods without ``async`` are called within the loop's task only."""

    def __init__(self, world: World, loop: "Loop", undertaker: Undertaker) -> None:
        self._world = world
        self._loop = loop
        self._undertaker = undertaker
        self._examined: dict[EngineName, str] = {}  # whose evidence was taken before its fault: the incident

    # -- engines -----------------------------------------------------------------------------------------------------

    def applied(self, engine: EngineRuntime, event: Event, facts: Facts) -> None:
        """An engine has moved: open what went wrong, close what is over."""
        incidents, name = self._loop.incidents, engine.name
        match event:
            case Event.FAULT | Event.LIED:
                self._failed(engine, event, facts)
            case Event.STARTED | Event.ADOPTED_AWAKE | Event.ADOPTED_ASLEEP:
                incidents.close_of(name, "back in service")
                engine.restart_why = ""
            case Event.WOKE:
                incidents.close_of(name, "back in service", but=_LASTING)
            case Event.GONE:
                incidents.close_of(name, "stopped", but=_LASTING if engine.preload else ())  # it comes back at once
            case Event.RELEASE:
                incidents.close_of(name, "released by an operator")
                engine.faults = ()

    def _failed(self, engine: EngineRuntime, event: Event, facts: Facts) -> None:
        name, kind = engine.name, facts.kind or ("lied" if event is Event.LIED else "failed")
        action, advice = "it is killed and started again after its backoff", ""
        if event is Event.LIED:
            action, advice = "it is killed and quarantined", f"look at the evidence, then `rotator release {name}`"
        elif not kind.startswith("gpu_") and self._breaks(engine):
            kind, action = "crash_loop", "it is killed and not started again"
            advice = f"look at the evidence and its log, mend the cause, then `rotator release {name}`"
            self._world.traffic.fail(name, f"{name} is quarantined: {engine.reason}")
        examined = self._examined.pop(name, None)
        if examined is not None and kind != "crash_loop":
            known = next((i for i in self._loop.incidents.open_ones(engine=name) if i.id == examined), None)
        else:
            known, examined = None, None
        incident = known or self._loop.incidents.open(
            kind, engine.reason, engine=name, action=action, advice=advice, serious=True
        )
        self._undertaker.background(self._bury(engine, incident, examined=examined is not None))

    def _breaks(self, engine: EngineRuntime) -> bool:
        """Count a fault, and whether it was one too many: then the engine goes to QUARANTINED, not to FAILED."""
        rule, now_wall_s = self._world.config.recovery, self._loop.wall_s()
        engine.faults = (*engine.faults, now_wall_s)[-FAULTS_KEPT:]
        opens = policy.breaker_opens(
            engine.faults, now_wall_s, failures=min(rule.breaker_failures, FAULTS_KEPT), window_s=rule.breaker_window_s
        )
        if opens:
            engine.after_stop = Event.GONE_LIAR
            times = f"{rule.breaker_failures} times within {rule.breaker_window_s:g} s"
            engine.reason = f"it failed {times}, at last: {engine.reason}"
        return opens

    async def _bury(self, engine: EngineRuntime, incident: Incident, *, examined: bool) -> None:
        self._world.traffic.abort(engine.name, engine.reason)  # nobody waits for evidence
        if not examined:
            await self._examine(incident, engine)
        if engine.state is not State.STOPPING or self._loop.fleet.engines.get(engine.name) is not engine:
            return  # an operator's stop has ended it meanwhile: what runs now, if anything, is another launch
        await self._undertaker.bury(engine.name, engine.after_stop, engine.reason, grace_s=0.0)

    async def wedged(self, name: EngineName, reason: str, stands: Callable[[], Awaitable[bool]]) -> None:
        """Close its admission, take evidence, look once more; who still stands is killed, who moves goes on."""
        incident = await self._loop.do(lambda: self._suspect(name, reason))
        if incident is None:
            return
        await self._examine(incident, self._loop.runtime(name))
        if await self._still(name, stands):
            await self._loop.moved(name, Event.FAULT, Facts(reason, kind="wedged"))
            return
        await self._loop.moved(name, Event.DRAIN_ABANDONED, Facts("it moves again"))
        await self._loop.do(lambda: self._acquit(name, incident))

    async def _still(self, name: EngineName, stands: Callable[[], Awaitable[bool]]) -> bool:
        """A look that fails acquits nobody: else a suspect would stay behind its closed admission for ever."""
        try:
            return await stands()
        except Exception:
            _log.exception("watchdog: second look at %s", name)
            return True

    def _suspect(self, name: EngineName, reason: str) -> Incident | None:
        """None where something else is under way with it, which has deadlines of its own."""
        engine = self._loop.fleet.engines.get(name)
        in_swap = any(step.engine == name for a in self._loop.active.values() for step in a.swap.evict)
        if engine is None or engine.state is not State.AWAKE or in_swap:
            return None
        if not self._loop.apply(name, Event.DRAIN, Facts(f"suspected: {reason}")):
            return None
        action = "its admission is closed, evidence is taken, then it is killed and started again"
        incident = self._loop.incidents.open("wedged", reason, engine=name, action=action)
        self._examined[name] = incident.id
        return incident

    def _acquit(self, name: EngineName, incident: Incident) -> None:
        self._examined.pop(name, None)
        self._loop.incidents.close(incident.id, "it went on by itself while evidence was taken")

    # -- GPUs --------------------------------------------------------------------------------------------------------

    def gpu_found(self, gpu: GpuId, finding: GpuFinding) -> tuple[EngineName, ...]:
        """Act on what a GPU reported. Returns the engines there that are to be probed."""
        here = [e for e in self._loop.all_runtimes() if gpu in e.gpus and e.live and e.state is not State.STOPPING]
        names = ", ".join(e.name for e in here) or "none"
        actions = {
            GpuAct.CORDON: f"the GPU is cordoned; engines there ({names}) are killed",
            GpuAct.RESTART: f"engines there ({names}) are restarted",
            GpuAct.PROBE: f"engines there ({names}) are probed",
            GpuAct.REPORT: "none: it is only reported",
        }
        hurts = finding.act in (GpuAct.CORDON, GpuAct.RESTART)
        incident = self._loop.incidents.open(
            finding.kind, finding.reason, gpu=gpu, serious=hurts, action=actions[finding.act], advice=finding.advice
        )
        if finding.act is GpuAct.CORDON:
            self._cordon(gpu, f"{finding.reason}; {finding.advice}")
        if hurts:
            for engine in here:
                self._loop.apply(engine.name, Event.FAULT, Facts(finding.reason, kind=finding.kind))
        if finding.act is not GpuAct.CORDON:
            self._loop.incidents.close(incident.id, actions[finding.act])
        self._undertaker.background(self._examine(incident, None))
        return tuple(e.name for e in here) if finding.act is GpuAct.PROBE else ()

    def _cordon(self, gpu: GpuId, reason: str) -> None:
        self._loop.cordon(gpu, reason)
        self._undertaker.background(self._keep_cordon(gpu, reason))

    async def _keep_cordon(self, gpu: GpuId, reason: str) -> None:
        """It must outlive the service, so it is written as soon as the ledger can; unless a person lifts it first."""
        while (known := self._loop.fleet.gpus.get(gpu)) is not None and known.cordoned == reason:
            try:
                await self._world.ledger.put_cordon(gpu, True, reason)
            except LedgerError as e:
                _log.warning("ledger: cordon of %s not written, trying again: %s", gpu, e)
                await asyncio.sleep(_CORDON_AGAIN_S)
            else:
                return

    # -- evidence ----------------------------------------------------------------------------------------------------

    async def _examine(self, incident: Incident, engine: EngineRuntime | None) -> None:
        """Never raises: recovery must go on whatever evidence could not be had."""
        if not self._world.config.watchdog.enabled or incident.count > BUNDLES_MAX:
            return
        deadline_s = self._world.config.watchdog.evidence.deadline_s
        try:
            async with asyncio.timeout(deadline_s + _CASE_S):
                case = await self._case(incident, engine)
                size = await self._world.senses.evidence.collect(case, deadline_s=deadline_s)
        except Exception:
            _log.exception("evidence of %s", incident.id)
            return
        await self._loop.do(lambda: self._loop.incidents.collected(incident.id, size))

    async def _case(self, incident: Incident, engine: EngineRuntime | None) -> Case:
        texts = {"incident.json": _json(asdict(incident)), "gpus.json": _json(self._gpus())}
        texts["journal.json"] = await self._journal(incident)
        if engine is None:
            return Case(incident.id, texts=texts)
        texts["engine.json"] = _json(self._told(engine))
        texts["engine-metrics.txt"] = await self._metrics(engine)
        pids = engine.pids or await self._pids(engine)
        gpus = self._loop.fleet.gpus
        indices = tuple(gpus[gpu].info.index for gpu in engine.gpus if gpu in gpus)
        return Case(incident.id, engine.name, pids, indices, engine.spec.log_path, texts)

    async def _pids(self, engine: EngineRuntime) -> frozenset[int]:
        """Of one that failed before they were first read."""
        if engine.handle is None or engine.config.launcher == "attach":
            return frozenset()
        try:
            return await self._world.launchers[engine.handle.launcher].pids(engine.handle)
        except LaunchError:
            return frozenset()

    async def _journal(self, incident: Incident) -> str:
        filters = {} if incident.engine is None else {"engine": incident.engine}
        try:
            page = await self._world.ledger.query("transitions", filters=filters, limit=_JOURNAL_ROWS)
            rows: Any = page.rows
        except (LedgerError, ValueError) as e:
            rows = f"the ledger did not tell: {e}"
        ring = self._world.bus.since(self._world.bus.last_id - _EVENTS)
        return _json({"transitions": rows, "events": [asdict(event) for event in ring]})

    async def _metrics(self, engine: EngineRuntime) -> str:
        try:
            return await self._world.control.metrics(engine.url, deadline_s=_METRICS_S)
        except EngineError as e:
            return f"# it did not tell: {e}"

    def _gpus(self) -> list[dict[str, Any]]:
        gpus = self._loop.fleet.gpus.values()
        return [
            {
                "gpu": asdict(g.info),
                "health": g.health,
                "unreadable": g.unreadable,
                "cordoned": g.cordoned,
                "reading": asdict(g.reading) if g.reading else None,
                "read_at_wall_s": g.read_at_wall_s,
                "reported": asdict(g.reported) if g.reported else None,
                "charged": {e.name: e.charge_on(g.info.id) for e in self._loop.all_runtimes() if g.info.id in e.gpus},
                "foreign_bytes": g.foreign_bytes,
            }
            for g in gpus
        ]

    def _told(self, engine: EngineRuntime) -> dict[str, Any]:
        record = asdict(engine.record())
        for large in ("history", "canary"):
            record.pop(large, None)
        command = list(engine.spec.command)
        return {
            "rotator": __version__,
            "vllm": engine.version,
            "command": command,
            "pids": sorted(engine.pids),
            **record,
        }


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, default=str)
