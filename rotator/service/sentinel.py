"""Looks at awake engines and at GPUs, round after round, and has acted upon what ``core`` makes of it."""

import asyncio
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rotator.core import gpu_faults, watchdog
from rotator.core.gpu_faults import GpuHealth
from rotator.core.lifecycle import Event
from rotator.core.values import EngineName, State
from rotator.core.watchdog import Kind, Track, Vitals
from rotator.ports import DeviceError, EngineCounters, EngineError, EngineRefused, Generation, Probe
from rotator.service import canary
from rotator.service.owner import Facts
from rotator.service.records import EngineRuntime, GpuRecord

if TYPE_CHECKING:
    from rotator.service.loop import Loop

_log = logging.getLogger(__name__)
RESIDUES_MAX = 32
PROBE_TOKENS = 4
_LONG_AGO_S = -1e9


@dataclass(slots=True)
class _Patient:
    """What is known of one engine. ``epoch`` is when it last became awake: what began before that is stale."""

    track: Track
    epoch_s: float
    launch: object = None
    residues: tuple[int, ...] = ()
    sleeps: int = 0
    probe: asyncio.Task[None] | None = None
    recovery: asyncio.Task[None] | None = None
    told: set[str] = field(default_factory=set)  # restarts that were asked for since its launch


class Sentinel:
    """One look at a time (``look`` is a timer's job); probes and recoveries run beside it."""

    def __init__(self, loop: "Loop") -> None:
        self._loop = loop
        self._patients: dict[EngineName, _Patient] = {}
        self._suspects: set[EngineName] = set()  # to be probed at the next look, whatever they look like

    async def look(self) -> None:
        if self._loop.adopting or not self._loop.world.config.watchdog.enabled:
            return
        for name in self._patients.keys() - {e.name for e in self._loop.all_runtimes()}:
            self._drop(name)
        engines = [self._examine(e) for e in self._loop.all_runtimes()]
        known = self._loop.fleet.gpus.values() if self._loop.world.config.watchdog.gpus else ()
        gpus = [self._ask_gpu(g) for g in known]
        for outcome in await asyncio.gather(*engines, *gpus, return_exceptions=True):
            if isinstance(outcome, Exception):
                _log.error("watchdog: %r", outcome, exc_info=outcome)

    def stop(self) -> None:
        for name in tuple(self._patients):
            self._drop(name)

    def _drop(self, name: EngineName) -> None:
        patient = self._patients.pop(name)
        for task in (patient.probe, patient.recovery):
            if task is not None:
                task.cancel()

    # -- engines -----------------------------------------------------------------------------------------------------

    async def _examine(self, engine: EngineRuntime) -> None:
        patient = self._patient(engine)
        await self._judge_residue(engine, patient)
        if engine.state is not State.AWAKE:
            if patient.probe is not None:  # it would stand in the way of a sleep, and its answer would mean nothing
                patient.probe.cancel()
            return
        vitals = await self._vitals(engine, patient)
        if not self._is_current(engine, patient):
            return
        bounds = self._loop.world.config.watchdog.bounds()
        patient.track, verdict = watchdog.observe(patient.track, vitals, bounds)
        if engine.name in self._suspects:
            self._suspects.discard(engine.name)
            self._begin_probe(engine, patient)
        match verdict.kind:
            case Kind.PROBE:
                self._begin_probe(engine, patient)
            case Kind.WEDGED if patient.recovery is None or patient.recovery.done():
                stands = self._loop.recovery.wedged(engine.name, verdict.reason, lambda: self._stands(engine, vitals))
                patient.recovery = asyncio.create_task(stands)
            case Kind.ACCEPTANCE | Kind.SLOW:
                restart = verdict.kind is Kind.ACCEPTANCE or self._loop.world.config.watchdog.restart_slow
                await self._report(engine, patient, verdict.kind.value, verdict.reason, restart=restart)

    def _patient(self, engine: EngineRuntime) -> _Patient:
        """Its record; begun anew where it has become awake again, or was launched again."""
        launch = engine.handle.ref if engine.handle else None
        patient = self._patients.get(engine.name)
        if patient is None:
            known = engine.counters.starts > 0
            began_s = engine.awake_since_s if known else _LONG_AGO_S  # one that was found running is old enough
            patient = _Patient(Track(began_s).resumed(self._loop.now_s()), engine.awake_since_s, launch)
            self._patients[engine.name] = patient
            patient.sleeps = engine.counters.sleeps
        elif engine.state is State.AWAKE and patient.epoch_s != engine.awake_since_s:
            again = launch != patient.launch
            began_s = engine.awake_since_s if again else patient.track.launched_at_s
            patient.track = patient.track.resumed(self._loop.now_s(), began_s)
            patient.epoch_s = engine.awake_since_s
            if again:
                patient.launch, patient.residues = launch, ()
                patient.told.clear()
        return patient

    def _is_current(self, engine: EngineRuntime, patient: _Patient) -> bool:
        """Whether it has been awake all the time since its record was begun."""
        return engine.state is State.AWAKE and engine.awake_since_s == patient.epoch_s

    async def _vitals(self, engine: EngineRuntime, patient: _Patient) -> Vitals:
        """An engine that does not tell looks as it did: it does not move."""
        world = self._loop.world
        try:
            counters = await world.control.counters(engine.url, deadline_s=world.config.watchdog.every_s)
        except EngineError:
            counters = _as_before(patient.track.last)
        warnings = await world.senses.logs.warnings(engine.spec.log_path)
        return Vitals(
            at_s=self._loop.now_s(),
            in_flight=world.traffic.in_flight(engine.name),
            running=counters.running,
            waiting=counters.waiting,
            generated=counters.generated,
            prompted=counters.prompted,
            steps=counters.steps,
            kv_share=counters.kv_share,
            drafts=counters.drafts,
            accepted=counters.accepted,
            warnings=warnings,
        )

    async def _stands(self, engine: EngineRuntime, then: Vitals) -> bool:
        now = await self._vitals(engine, self._patient(engine))
        return now.pulse == then.pulse or now.generated < then.generated

    async def _report(self, engine: EngineRuntime, patient: _Patient, kind: str, why: str, *, restart: bool) -> None:
        if kind in patient.told:
            return
        patient.told.add(kind)
        restart = restart and engine.config.launcher != "attach"
        action = "it is restarted at a quiet moment" if restart else "none: it is only reported"
        advice = (
            "" if restart else f"look for what else runs on its GPUs, or restart it: `rotator restart {engine.name}`"
        )

        def report() -> None:
            self._loop.incidents.open(kind, why, engine=engine.name, serious=False, action=action, advice=advice)
            if restart:
                engine.restart_why = why

        await self._loop.do(report)

    async def _judge_residue(self, engine: EngineRuntime, patient: _Patient) -> None:
        bounds = self._loop.world.config.watchdog.residue()
        if engine.counters.sleeps == patient.sleeps or not engine.residue_bytes:
            return
        patient.sleeps = engine.counters.sleeps
        patient.residues = (*patient.residues, max(engine.residue_bytes.values()))[-RESIDUES_MAX:]
        if bounds is not None and (why := watchdog.residue_growth(patient.residues, bounds)):
            await self._report(engine, patient, "residue", why, restart=True)

    # -- probes ------------------------------------------------------------------------------------------------------

    def _begin_probe(self, engine: EngineRuntime, patient: _Patient) -> None:
        if patient.probe is None or patient.probe.done():
            patient.probe = asyncio.create_task(self._probe(engine, patient))

    async def _probe(self, engine: EngineRuntime, patient: _Patient) -> None:
        """One short generation. It is no client's: it counts as no use."""
        epoch_s = patient.epoch_s
        try:
            answer = await self._generate(engine)
            if answer is not None and canary.garbage(answer) and self._is_current(engine, patient):
                answer = await self._generate(engine)  # condemned on two answers, not on one
            lives = True
        except EngineRefused as e:
            answer, lives = None, e.status < 500  # a route or model that it does not have is an answer, too
        except EngineError:
            answer, lives = None, False
        if patient.epoch_s != epoch_s or not self._is_current(engine, patient):
            return
        patient.track = patient.track.probed(self._loop.now_s(), lives)
        if answer is not None and (why := canary.garbage(answer)):
            reason = f"a probe was answered with garbage: {why}"
            await self._loop.moved(engine.name, Event.LIED, Facts(reason, canary="failed", kind="garbage"))

    async def _generate(self, engine: EngineRuntime) -> Generation:
        config = self._loop.world.config
        probe = Probe(config.canary.prompt, PROBE_TOKENS)
        deadline_s = config.watchdog.probe_deadline_s
        return await self._loop.world.control.generate(engine.url, engine.config.model, probe, deadline_s=deadline_s)

    # -- GPUs --------------------------------------------------------------------------------------------------------

    async def _ask_gpu(self, gpu: GpuRecord) -> None:
        world = self._loop.world
        try:
            now = await world.senses.reports.health(gpu.info.id, deadline_s=world.config.devices.read_deadline_s)
        except DeviceError:
            return  # its readings fail or hang, too: that has made it UNKNOWN
        await self._loop.do(lambda: self._gpu_told(gpu, now))

    def _gpu_told(self, gpu: GpuRecord, now: GpuHealth) -> None:
        before, gpu.reported = gpu.reported, now
        info = gpu.info
        name = f"{info.node}/{info.index}" if info.node else str(info.index)
        for finding in gpu_faults.findings(before, now, name):
            self._suspects.update(self._loop.recovery.gpu_found(info.id, finding))


def _as_before(last: Vitals | None) -> EngineCounters:
    if last is None:
        return EngineCounters()
    return EngineCounters(
        last.running, last.waiting, last.generated, last.prompted, last.steps, last.kv_share, last.drafts, last.accepted
    )
