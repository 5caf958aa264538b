"""After a restart: ask engines and GPUs what is true, finish what was under way, double nothing, leak nothing."""

import asyncio
import logging
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rotator.core.lifecycle import Event
from rotator.core.values import Depth, GpuId, Level, State
from rotator.ports import (
    DeviceError,
    EngineError,
    EngineRecord,
    EngineTimeout,
    EngineUnreachable,
    GpuReading,
    Handle,
    LaunchError,
    LaunchSpec,
    LedgerError,
    OpenTransition,
    Outcome,
    Recovered,
    Residency,
)
from rotator.service import canary
from rotator.service.accounting import held_by, read_gpus
from rotator.service.admission_run import READY_POLL_S
from rotator.service.eviction_run import DEPTH_OF_LEVEL
from rotator.service.owner import Facts, Lied, Owner, WrongFiles
from rotator.service.records import EngineRuntime
from rotator.service.world import World

_log = logging.getLogger(__name__)
_CALL_S = 10.0
_LOOK_AGAIN_S = 5.0
_LATE_WAKE_S = 2.0  # a wake that an earlier life asked for shows within this, or three times what its wakes take


class Adopter:
    def __init__(self, world: World, owner: Owner) -> None:
        self._world = world
        self._owner = owner
        self._waiting: set[asyncio.Task[None]] = set()  # engines whose launcher did not answer
        self.left: set[str] = set()  # names that are no longer configured, and could not be ended yet

    async def adopt_all(self, recovered: Recovered) -> None:
        """Bring every configured engine to a true state, and end what is no longer configured."""
        open_by_engine: dict[str, list[OpenTransition]] = {}
        for transition in recovered.open_transitions:
            open_by_engine.setdefault(transition.intent.engine, []).append(transition)
        runtimes = list(self._owner.all_runtimes())
        names = {e.name for e in runtimes}
        orphans = [r for n, r in recovered.engines.items() if n not in names and r.launcher != "attach"]
        # One of these that is configured again before it has ended has to wait for that.
        self.left.update(r.engine for r in orphans)
        await asyncio.gather(*(self._adopt(e, open_by_engine.pop(e.name, [])) for e in runtimes))
        await asyncio.gather(*(self._end_orphan(r) for r in orphans))
        await self._drop_leases(recovered)
        if rows := [row for row in recovered.residencies if row.engine not in names and row.held_bytes]:
            await self._forget(rows)
        for transitions in open_by_engine.values():  # of engines that are no longer configured
            await self._resolve(transitions, State.STOPPED)

    async def _drop_leases(self, recovered: Recovered) -> None:
        """Claims of transitions that an earlier life began: what they were for has been asked for and settled."""
        for lease in recovered.leases:
            try:
                await self._world.ledger.drop_lease(lease.gpu, lease.holder)
            except LedgerError as e:
                _log.warning("ledger: lease of %s on %s stays until it expires: %s", lease.holder, lease.gpu, e)

    async def _forget(self, rows: Sequence[Residency]) -> None:
        """What an engine that is no longer configured still holds, if anything, is foreign: it is not counted twice."""
        names = {e.name for e in self._owner.all_runtimes()}  # one that is back writes its own
        try:
            await self._world.ledger.put_residencies([replace(r, held_bytes=0) for r in rows if r.engine not in names])
        except LedgerError as e:
            _log.warning("ledger: rows of engines that are no longer configured not written, trying again: %s", e)
            self._later(self._forget_later(rows))

    async def _forget_later(self, rows: Sequence[Residency]) -> None:
        await asyncio.sleep(_LOOK_AGAIN_S)
        await self._forget(rows)

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        again = asyncio.create_task(work)
        self._waiting.add(again)
        again.add_done_callback(self._waiting.discard)

    async def adopt_attached(self, engine: EngineRuntime) -> None:
        """Look whether an attached engine that was away is there again."""
        await self._adopt(engine, [])

    async def _adopt(self, engine: EngineRuntime, unfinished: list[OpenTransition]) -> None:
        try:
            found_out = await self._find(engine, unfinished)
        except Exception as e:
            if not isinstance(e, LaunchError):
                _log.exception("adopting %s", engine.name)
            await self._owner.learned(engine.name, Facts(f"could not be looked for: {e}", unseen=True))
            if engine.config.launcher != "attach":  # those are looked for again and again in any case
                self._later(self._adopt_later(engine, unfinished))
            return
        await self._owner.learned(engine.name, Facts("", unseen=False))
        if found_out:
            await self._resolve(unfinished, engine.state)

    async def _adopt_later(self, engine: EngineRuntime, unfinished: list[OpenTransition]) -> None:
        """Until its launcher answers nobody knows whether it runs: nothing begins on its GPUs, least of all a second
        one of it."""
        await asyncio.sleep(_LOOK_AGAIN_S)
        await self._adopt(engine, unfinished)

    async def _find(self, engine: EngineRuntime, unfinished: list[OpenTransition]) -> bool:
        """False where its state may not change any more, for the service ends: then the next life has to find out, and
        what is unfinished stays so. Raises LaunchError where its launcher cannot tell."""
        launcher = self._world.launchers[engine.config.launcher]
        handle = await launcher.find(engine.spec, engine.handle.ref if engine.handle else None)
        if handle is None:
            await self._owner.learned(engine.name, Facts("not running when the service started", held_bytes={}))
            return True
        pids = await launcher.pids(handle)
        await self._owner.learned(engine.name, Facts("found running", handle=handle, pids=pids))
        if engine.was_ending and engine.config.launcher != "attach":
            # What it was asked last may have hung, and would begin beside what others are asked now.
            return await self._reject(
                engine, "found running, but unfit: it was being ended when the service died", False
            )
        try:
            return await self._settle(engine, handle, pids, unfinished)
        except (EngineError, Lied, DeviceError) as e:
            return await self._reject(engine, f"found running, but unfit: {e}", isinstance(e, Lied))

    async def _reject(self, engine: EngineRuntime, reason: str, lied: bool) -> bool:
        """Into a live state first, from which it is killed like any other engine of unknown state."""
        await self._owner.moved(engine.name, Event.LAUNCH, Facts(reason))
        return await self._owner.moved(engine.name, Event.LIED if lied else Event.FAULT, Facts(reason))

    async def _settle(
        self, engine: EngineRuntime, handle: Handle, pids: frozenset[int], unfinished: list[OpenTransition]
    ) -> bool:
        """Wait until it answers (it may be starting, or in the middle of a sleep), then believe bytes over words."""
        control, url = self._world.control, engine.url
        await self._answering(engine, handle)
        level = self._level(engine, unfinished)
        begun = {t.intent.action for t in unfinished}
        asleep, readings = await self._word_and_bytes(engine, pids, begun, level)
        if asleep and "wake" in begun:
            raise EngineTimeout("a wake was asked of it that does not show: nobody knows when it will")
        if wrong := await self._world.wrong_files(engine.config, url):
            raise WrongFiles(wrong)
        version = await control.version(url, deadline_s=_CALL_S)
        freezes = await control.can_freeze(url, engine.config.levels, deadline_s=_CALL_S)
        held = held_by(readings, pids)
        facts = Facts("", version=version, freezes=freezes, pids=pids, held_bytes=held)
        if asleep:
            return await self._adopt_asleep(engine, facts, level, readings)
        return await self._adopt_awake(engine, facts, readings)

    async def _word_and_bytes(
        self, engine: EngineRuntime, pids: frozenset[int], unfinished: set[str], level: Level
    ) -> tuple[bool, dict[GpuId, GpuReading]]:
        """Whether it says it sleeps, and what its GPUs hold. In the middle of a sleep its word comes before its bytes,
        and a wake may show in neither yet: both are asked again, within the bounds of a sleep and a wake."""
        clock, config = asyncio.get_running_loop().time, engine.config
        bound_s = config.sleep_deadline_s + config.wake_deadline_s if unfinished & {"sleep", "wake"} else 0.0
        give_up_at = clock() + bound_s
        late_s = max(_LATE_WAKE_S, 3 * (engine.costs.wake_s or _CALL_S / 3)) if "wake" in unfinished else 0.0
        wakes_by = clock() + late_s
        while True:
            asked_at = clock()
            asleep = await self._world.control.is_sleeping(engine.url, deadline_s=max(_CALL_S, bound_s))
            if clock() - asked_at > READY_POLL_S:
                wakes_by = clock() + late_s  # it hung until now: what it was asked before begins only now
            readings = await self._readings(engine)
            agree = self._disagreement(engine, held_by(readings, pids), level) is None and clock() >= wakes_by
            if not asleep or agree or clock() >= give_up_at:
                return asleep, readings
            await asyncio.sleep(READY_POLL_S)

    async def _answering(self, engine: EngineRuntime, handle: Handle) -> None:
        """Raises EngineUnreachable when it died or never answered within its own start-up deadline."""
        loop = asyncio.get_running_loop()
        launcher = self._world.launchers[engine.config.launcher]
        started = engine.golden is not None  # it had answered once: then it has to answer soon
        give_up_at = loop.time() + (_CALL_S * 3 if started else engine.config.start_deadline_s)
        while not await self._world.control.is_healthy(engine.url, deadline_s=_CALL_S):
            if loop.time() >= give_up_at or not await launcher.is_alive(handle):
                raise EngineUnreachable("it does not answer /health")
            await asyncio.sleep(READY_POLL_S)

    async def _adopt_asleep(
        self, engine: EngineRuntime, facts: Facts, level: Level, readings: Mapping[GpuId, GpuReading]
    ) -> bool:
        if lie := self._disagreement(engine, facts.held_bytes, level):
            raise Lied(lie)
        if (
            level is Level.PAUSE and facts.held_bytes is None
        ):  # its bytes are in no table: only a reading or a row tells
            facts = replace(facts, held_bytes=dict(engine.held_before) or None)
        merged = _merge(facts, "found asleep", level=level, depth=DEPTH_OF_LEVEL[level])
        return await self._owner.moved(engine.name, Event.ADOPTED_ASLEEP, merged, readings)

    async def _adopt_awake(self, engine: EngineRuntime, facts: Facts, readings: Mapping[GpuId, GpuReading]) -> bool:
        """Only an engine that answers its canary gets clients: the service may have died in the middle of its wake."""
        config, control = self._world.config.canary, self._world.control
        golden, state = engine.golden, "disabled"
        if config.enabled and golden is not None and not canary.needs_recording(golden, engine.config.model, config):
            verdict = await canary.check(control, engine.url, engine.config.model, golden, config)
            if not verdict.ok:
                raise Lied(verdict.reason)
            state = "passed"
        elif config.enabled:
            golden = await canary.record(control, engine.url, engine.config.model, config)
            state = "recorded"
        merged = _merge(facts, "found awake", golden=golden, canary=state, awake_bytes=facts.held_bytes)
        return await self._owner.moved(engine.name, Event.ADOPTED_AWAKE, merged, readings)

    def _disagreement(self, engine: EngineRuntime, held: Mapping[GpuId, int] | None, level: Level) -> str | None:
        """What an engine that says it sleeps holds all the same, in words. One that only freed some of its bytes may
        hold any number of them: its wake tells."""
        if level is Level.PAUSE:
            return None
        return engine.holds_too_much(held or {}, self._world.config.recovery.first_sleep_frees_min)

    def _level(self, engine: EngineRuntime, unfinished: list[OpenTransition]) -> Level:
        """How deep it sleeps: from the unfinished sleep's own plan, else as recorded, else its preferred level."""
        for transition in reversed(unfinished):
            for step in transition.intent.plan.get("evict", ()):
                if step["engine"] == engine.name and step.get("level") is not None:
                    return Level(step["level"])
        return engine.config.levels[0] if engine.level is None else engine.level

    async def _readings(self, engine: EngineRuntime) -> dict[GpuId, GpuReading]:
        try:
            return await read_gpus(self._world.devices, engine.gpus, self._world.config.devices.read_deadline_s)
        except DeviceError as e:
            _log.warning("adopting %s without a reading of its GPUs: %s", engine.name, e)
            return {}

    async def _end_orphan(self, record: EngineRecord) -> None:
        """An engine that an earlier configuration started and this one does not know must not keep its bytes."""
        launcher = self._world.launchers.get(record.launcher)
        spec = LaunchSpec(record.engine, record.launcher, (), {}, record.url, "")
        try:
            if launcher is not None and (handle := await launcher.find(spec, record.ref)) is not None:
                await launcher.stop(handle, grace_s=10.0)
                self._world.bus.publish("orphan.stopped", record.engine, reason="it is no longer in the configuration")
        except LaunchError as e:
            self._world.bus.publish("orphan.left", record.engine, reason=f"{e}; tried again every {_LOOK_AGAIN_S:g} s")
            self._later(self._end_orphan_later(record))
            return
        except Exception as e:
            _log.exception("stopping %s", record.engine)
            self._world.bus.publish("orphan.left", record.engine, reason=str(e))
        await self._look_if_back(record.engine)

    async def _end_orphan_later(self, record: EngineRecord) -> None:
        """Nobody can end this one yet, and nothing else waits for it."""
        await asyncio.sleep(_LOOK_AGAIN_S)
        is_back = any(e.name == record.engine for e in self._owner.all_runtimes())
        await (self._look_if_back(record.engine) if is_back else self._end_orphan(record))

    async def _look_if_back(self, name: str) -> None:
        """One that is in the configuration again by now is taken over like any other."""
        self.left.discard(name)
        again = next((e for e in self._owner.all_runtimes() if e.name == name), None)
        if again is not None:
            await self._adopt(again, [])

    async def _resolve(self, transitions: list[OpenTransition], state: State) -> None:
        for transition in transitions:
            why = "the service was not there when it ended; engine and GPUs were asked"
            await self._world.journal.close(transition.id, Outcome("resolved", state, why))


def _merge(
    facts: Facts,
    reason: str,
    *,
    level: Level | None = None,
    depth: Depth | None = None,
    golden: Mapping[str, object] | None = None,
    canary: str | None = None,
    awake_bytes: Mapping[GpuId, int] | None = None,
) -> Facts:
    return replace(
        facts, reason=reason, level=level, depth=depth, golden=golden, canary=canary, awake_bytes=awake_bytes
    )
