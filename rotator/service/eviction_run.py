"""Carries out the evictions of a swap: close admission, let work finish or freeze, sleep, see the bytes come back."""

import asyncio
from collections.abc import Mapping

from rotator.core.lifecycle import Event
from rotator.core.values import Action, Depth, GpuId, Level, State, Step
from rotator.ports import DeviceError, EngineError, GpuReading
from rotator.service.accounting import SleepExpectation, read_gpus, used, verify_sleep
from rotator.service.burial import Undertaker
from rotator.service.journal import Entry
from rotator.service.owner import Facts, Lied, Owner
from rotator.service.records import ActiveSwap, EngineRuntime
from rotator.service.world import World

DEPTH_OF_LEVEL = {Level.HOST: Depth.HOST, Level.DISCARD: Depth.DISCARDED}
VERIFY_PATIENCE_S = 3.0  # a driver may report freed bytes a little late; beyond this the engine lied


class KeepsItsTurn(Exception):
    """The engine is not evicted after all; the text says why. It goes on serving."""


class Evictor:
    def __init__(self, world: World, owner: Owner, undertaker: Undertaker) -> None:
        self._world = world
        self._owner = owner
        self._undertaker = undertaker

    async def run(self, active: ActiveSwap, entries: Mapping[str, Entry]) -> bool:
        """Drain all victims, then put all to sleep. True if every one of them yielded its bytes."""
        steps = active.swap.evict
        before = asyncio.ensure_future(self._readings(steps))
        started = asyncio.get_running_loop().time()
        try:
            await asyncio.gather(*(self._drain(step, active) for step in steps))
            readings = await before
        except (KeepsItsTurn, DeviceError) as e:
            before.cancel()
            await self._give_back(active, entries, str(e))
            return False
        active.phases_s["drain"] = asyncio.get_running_loop().time() - started
        results = await asyncio.gather(*(self._yield(step, active, entries[step.engine], readings) for step in steps))
        return all(results)

    async def _readings(self, steps: tuple[Step, ...]) -> dict[GpuId, GpuReading]:
        gpus = {gpu for step in steps for gpu in self._owner.runtime(step.engine).gpus}
        return await read_gpus(self._world.devices, gpus, self._world.config.devices.read_deadline_s)

    # -- drain -------------------------------------------------------------------------------------------------------

    async def _drain(self, step: Step, active: ActiveSwap) -> None:
        """Raises KeepsItsTurn where the engine must keep serving."""
        engine = self._owner.runtime(step.engine)
        if engine.state is not State.AWAKE:
            return  # a sleeping or failed engine that is only to be stopped has nothing to drain
        if not await self._owner.moved(engine.name, Event.DRAIN, Facts(step.reason)):
            raise KeepsItsTurn(f"{engine.name} changed while the swap began")
        if step.force:
            self._world.traffic.abort(engine.name, f"an operator forced {engine.name} to {step.action.value}")
        if not await self._finishes(step, active) and (why := self._cannot_freeze(step, engine)):
            active.refused.add(engine.name)
            raise KeepsItsTurn(why)

    async def _finishes(self, step: Step, active: ActiveSwap) -> bool:
        """True when in-flight work ended within the bound, False at the bound. Raises KeepsItsTurn if nobody wants
        the room any more."""
        traffic = self._world.traffic
        if not traffic.in_flight(step.engine):
            return True
        own_bound_s = self._owner.runtime(step.engine).config.drain_bound_s
        bound_s = step.drain_bound_s if own_bound_s is None else own_bound_s
        drained = asyncio.ensure_future(traffic.drained(step.engine))
        unwanted = asyncio.ensure_future(active.unwanted.wait())
        try:
            await asyncio.wait({drained, unwanted}, timeout=bound_s, return_when=asyncio.FIRST_COMPLETED)
            if drained.done():
                return True
            if unwanted.done() and active.swap.admit:
                raise KeepsItsTurn(f"nobody waits for {active.swap.admit.engine} any more")
            return False
        finally:
            drained.cancel()
            unwanted.cancel()

    def _cannot_freeze(self, step: Step, engine: EngineRuntime) -> str | None:
        name, count = engine.name, self._world.traffic.in_flight(engine.name)
        if step.action is Action.STOP:
            return f"{name} still has {count} requests in flight, which a stop would lose"
        if not engine.freezes:
            return f"{name} still has {count} requests in flight and vLLM {engine.version} cannot freeze them"
        if self._world.traffic.max_freezes_left(name) <= 0:
            return f"{name} has a request in flight that was frozen as often as allowed"
        return None

    async def _give_back(self, active: ActiveSwap, entries: Mapping[str, Entry], why: str) -> None:
        """Nothing has slept yet: everyone who closed admission opens it again."""
        active.error = why
        for step in active.swap.evict:
            engine = self._owner.runtime(step.engine)
            if engine.state is State.DRAINING:
                await self._owner.moved(engine.name, Event.DRAIN_ABANDONED, Facts(f"keeps its turn: {why}"))
            await entries[step.engine].close("abandoned", engine.state, error=why)

    # -- sleep -------------------------------------------------------------------------------------------------------

    async def _yield(self, step: Step, active: ActiveSwap, entry: Entry, before: Mapping[GpuId, GpuReading]) -> bool:
        engine = self._owner.runtime(step.engine)
        mine = {gpu: before[gpu] for gpu in engine.gpus}
        if step.action is Action.STOP:
            return await self._stop(step, engine, entry)
        level = step.level or engine.config.levels[0]
        depth = DEPTH_OF_LEVEL[level]
        if not await self._owner.moved(engine.name, Event.SLEEP, Facts(step.reason, level=level, depth=depth)):
            await entry.close("failed", engine.state, error="it changed while it drained")
            return False
        try:
            facts = await self._sleep_and_see(step, engine, level, mine, active)
        except EngineError as e:
            await self._fault(engine, entry, Event.FAULT, f"its sleep failed: {e}", mine)
            return False
        except DeviceError as e:
            await self._fault(engine, entry, Event.FAULT, f"its sleep could not be verified: {e}", mine)
            return False
        except Lied as e:
            await self._fault(engine, entry, Event.LIED, str(e), mine)
            return False
        slept = await self._owner.moved(engine.name, Event.SLEPT, facts)
        self._undertaker.background(
            entry.close(
                "ok" if slept else "failed",
                engine.state,
                phases_s=dict(active.phases_s),
                before=used(mine),
                after=dict(facts.residue_bytes or {}),
            )
        )
        return slept

    async def _sleep_and_see(
        self, step: Step, engine: EngineRuntime, level: Level, before: Mapping[GpuId, GpuReading], active: ActiveSwap
    ) -> Facts:
        clock = asyncio.get_running_loop().time
        started = clock()
        host_before = self._world.host().available_bytes
        await self._world.control.sleep(
            engine.url, level=level, abort=step.force, deadline_s=engine.config.sleep_deadline_s
        )
        slept = clock()
        judgement = await verify_sleep(
            self._world.devices,
            self._expectation(engine),
            before,
            engine.pids,
            read_deadline_s=self._world.config.devices.read_deadline_s,
            patience_s=VERIFY_PATIENCE_S,
        )
        _longest(active.phases_s, "sleep", slept - started)
        _longest(active.phases_s, "verify", clock() - slept)
        if not judgement.ok:
            raise Lied(judgement.reason)
        took = host_before - self._world.host().available_bytes
        moved = sum(engine.awake_on(gpu) - judgement.held[gpu] for gpu in engine.gpus)
        return Facts(
            f"sleeps ({step.reason})",
            level=level,
            depth=DEPTH_OF_LEVEL[level],
            residue_bytes=judgement.held,
            held_bytes=judgement.held,
            host_bytes=took if self._is_believable(engine, level, took) else None,
            sleep_s=slept - started,
            moved_bytes=max(0, moved),
        )

    def _is_believable(self, engine: EngineRuntime, level: Level, took: int) -> bool:
        """Host RAM is shared: a reading counts only for level 1, with no other swap beside, and near what was planned
        (an allocator that keeps its masters takes nothing at a later sleep)."""
        alone = sum(e.state is State.FALLING_ASLEEP for e in self._owner.all_runtimes()) == 1
        planned = engine.weight_bytes or engine.host_bytes
        return level is Level.HOST and alone and 0.5 * planned <= took <= 2.0 * planned

    def _expectation(self, engine: EngineRuntime) -> SleepExpectation:
        recovery = self._world.config.recovery
        return SleepExpectation(
            awake={gpu: engine.awake_on(gpu) for gpu in engine.gpus},
            residue=dict(engine.residue_bytes),
            tolerance_bytes=int(recovery.residue_tolerance_gib * (1 << 30)),
            first_frees_min=recovery.first_sleep_frees_min,
        )

    async def _stop(self, step: Step, engine: EngineRuntime, entry: Entry) -> bool:
        if not await self._owner.moved(engine.name, Event.STOP, Facts(step.reason)):
            await entry.close("failed", engine.state, error="it changed while it drained")
            return False
        await self._undertaker.bury(engine.name, Event.GONE, step.reason, grace_s=engine.config.stop_grace_s)
        await entry.close("ok" if engine.state is State.STOPPED else "failed", engine.state)
        return engine.state is State.STOPPED

    async def _fault(
        self, engine: EngineRuntime, entry: Entry, event: Event, reason: str, before: Mapping[GpuId, GpuReading]
    ) -> None:
        """Its state is unknown or a lie: it is killed, never woken over. The evidence goes into the journal."""
        await self._owner.moved(engine.name, event, Facts(reason, evidence={"used_before": used(before)}))
        await entry.close("failed", engine.state, error=reason, before=used(before))


def _longest(phases: dict[str, float], name: str, seconds: float) -> None:
    """Victims sleep side by side: the slowest one is the swap's phase."""
    phases[name] = max(phases.get(name, 0.0), seconds)
