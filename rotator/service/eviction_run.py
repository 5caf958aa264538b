"""Carries out the evictions of a swap: close admission, let work finish or freeze, sleep, see the bytes come back."""

import asyncio
from collections.abc import Mapping, Sequence

from rotator.core.lifecycle import Event
from rotator.core.values import Action, Depth, GpuId, Level, State, Step
from rotator.ports import DeviceError, EngineError, EngineRefused, GpuReading, NodeError
from rotator.ports_nodes import HERE, nodes_of
from rotator.service.accounting import Judgement, SleepExpectation, read_gpus, used, verify_sleep
from rotator.service.burial import Undertaker
from rotator.service.journal import Entry
from rotator.service.owner import Facts, Lied, Owner
from rotator.service.records import ActiveSwap, EngineRuntime
from rotator.service.world import World

DEPTH_OF_LEVEL = {Level.PAUSE: Depth.KV, Level.HOST: Depth.HOST, Level.DISCARD: Depth.DISCARDED}
MIB = 1 << 20
SPARE_BYTES = 32 * MIB  # an elastic engine is asked for so much more than is needed, twice; half of it may fail to show
SINK_AGAIN_S = 60.0  # an engine that would not go deeper is not asked again before
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
        drained = asyncio.get_running_loop().time()
        active.phases_s["drain"] = drained - started
        active.timeline += [("drain", s.engine, started, drained) for s in steps if s.action is not Action.SINK]
        # First those that only give host RAM back: whoever sleeps then needs it.
        first = [step for step in steps if self._gives_host_ram(step)]
        rest = [step for step in steps if step not in first]
        if not await self._all_yield(first, active, entries, readings):
            await self._give_back(active, entries, "no host RAM was gained for those who were to sleep")
            return False
        return await self._all_yield(rest, active, entries, readings)

    async def _all_yield(
        self,
        steps: Sequence[Step],
        active: ActiveSwap,
        entries: Mapping[str, Entry],
        readings: Mapping[GpuId, GpuReading],
    ) -> bool:
        every = (self._yield(step, active, entries[step.engine], readings) for step in steps)
        return all(await asyncio.gather(*every))

    def _gives_host_ram(self, step: Step) -> bool:
        asleep = self._owner.runtime(step.engine).state is State.ASLEEP
        return (step.action is Action.SINK and not step.bytes_per_gpu) or (step.action is Action.STOP and asleep)

    async def _readings(self, steps: tuple[Step, ...]) -> dict[GpuId, GpuReading]:
        gpus = {gpu for step in steps for gpu in self._owner.runtime(step.engine).gpus}
        return await read_gpus(self._world.devices, gpus, self._world.config.devices.read_deadline_s)

    # -- drain -------------------------------------------------------------------------------------------------------

    async def _drain(self, step: Step, active: ActiveSwap) -> None:
        """Raises KeepsItsTurn where the engine must keep serving."""
        engine = self._owner.runtime(step.engine)
        if engine.state is not State.AWAKE or step.action is Action.SINK:
            return  # a sleeping or failed engine that is only to be stopped has nothing to drain
        if not await self._owner.moved(engine.name, Event.DRAIN, Facts(step.reason)):
            raise KeepsItsTurn(f"{engine.name} changed while the swap began")
        if step.force:
            self._world.traffic.abort(engine.name, f"an operator forced {engine.name} to {step.action.value}")
            return
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
        if self._world.traffic.stall_left_s(name) <= 0.0:
            return f"{name} has a request in flight that has stood still as long as allowed"
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
        if step.action is Action.SINK:
            return await self._sink(step, engine, entry, mine)
        level = engine.config.levels[0] if step.level is None else step.level
        depth = step.depth or DEPTH_OF_LEVEL[level]
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
        host_before = await self._host_left(engine)
        rest = _rest(step, engine)
        expected = self._expectation(engine) if level is not Level.PAUSE else self._elastic(rest, engine)
        await self._put_to_sleep(step, engine, level)
        slept = clock()
        judgement = await self._verify(engine, expected, before)
        _longest(active.phases_s, "sleep", slept - started)
        _longest(active.phases_s, "verify", clock() - slept)
        active.timeline += [("sleep", engine.name, started, slept), ("verify", engine.name, slept, clock())]
        if not judgement.ok:
            raise Lied(judgement.reason)
        took = host_before - await self._host_left(engine)
        moved = sum(engine.awake_on(gpu) - judgement.held[gpu] for gpu in engine.gpus)
        return Facts(
            f"sleeps ({step.reason})",
            level=level,
            depth=step.depth or DEPTH_OF_LEVEL[level],
            residue_bytes=_least(rest, judgement) if level is Level.PAUSE else judgement.held,
            held_bytes=judgement.held,
            host_bytes=took if step.depth is None and self._is_believable(engine, level, took) else None,
            masters=level is Level.HOST and step.depth is None,
            sleep_s=None if level is Level.PAUSE else slept - started,
            moved_bytes=max(0, moved),
        )

    async def _host_left(self, engine: EngineRuntime) -> int:
        """Host RAM that is available on the engine's machines together; 0 where one of them does not tell, so that
        what a sleep took there is not believed."""
        left, nodes = 0, self._world.nodes
        for node in nodes_of(engine.gpus):
            if node == HERE or nodes is None:
                left += self._world.host().available_bytes
                continue
            try:
                told = await nodes.host(node, deadline_s=self._world.config.devices.read_deadline_s)
            except NodeError:
                return 0
            left += told.available_bytes
        return left

    async def _put_to_sleep(self, step: Step, engine: EngineRuntime, level: Level) -> None:
        control, deadline_s = self._world.control, engine.config.sleep_deadline_s
        if level is Level.PAUSE:
            await control.sleep_bytes(engine.url, bytes_per_gpu=_asked(step), deadline_s=deadline_s)
            return
        if engine.config.disk and level is Level.HOST:
            where = "disk" if step.depth is Depth.DISK else "host"
            await control.place_masters(engine.url, where=where, deadline_s=deadline_s)
        await control.sleep(engine.url, level=level, abort=step.force, deadline_s=deadline_s)

    async def _verify(
        self, engine: EngineRuntime, expected: SleepExpectation, before: Mapping[GpuId, GpuReading]
    ) -> Judgement:
        return await verify_sleep(
            self._world.devices,
            expected,
            before,
            engine.pids,
            read_deadline_s=self._world.config.devices.read_deadline_s,
            patience_s=VERIFY_PATIENCE_S,
        )

    # -- deeper ------------------------------------------------------------------------------------------------------

    async def _sink(self, step: Step, engine: EngineRuntime, entry: Entry, before: Mapping[GpuId, GpuReading]) -> bool:
        """A sleeper frees more VRAM or moves its masters to disk; an engine that serves drops the masters it keeps."""
        asleep = engine.state is State.ASLEEP
        try:
            facts = await self._go_deeper(step, engine, before)
        except (EngineError, DeviceError) as e:
            why = f"it did not go deeper: {e}"
            refused = isinstance(e, EngineRefused) and not step.bytes_per_gpu  # then its masters are where they were
            if asleep and not refused:  # its state is unknown
                await self._fault(engine, entry, Event.FAULT, why, before)
            else:
                engine.sinks_after_s = asyncio.get_running_loop().time() + SINK_AGAIN_S
                await entry.close("failed", engine.state, error=why)
            return False
        except Lied as e:
            await self._fault(engine, entry, Event.LIED, str(e), before)
            return False
        if asleep:
            done = await self._owner.moved(engine.name, Event.SANK, facts)
        else:
            await self._owner.learned(engine.name, facts)
            done = True
        await entry.close("ok" if done else "failed", engine.state, before=used(before), after=facts.held_bytes)
        return done

    async def _go_deeper(self, step: Step, engine: EngineRuntime, before: Mapping[GpuId, GpuReading]) -> Facts:
        control, deadline_s = self._world.control, engine.config.sleep_deadline_s
        if not step.bytes_per_gpu:
            where = "disk" if step.depth is Depth.DISK else "none"
            await control.place_masters(engine.url, where=where, deadline_s=deadline_s)
            held = engine.held_bytes if engine.state is State.ASLEEP else None  # what it holds on its GPUs is as it was
            return Facts(f"sinks ({step.reason})", depth=step.depth, masters=False, held_bytes=held)
        rest = _rest(step, engine)
        expected = self._elastic(rest, engine)
        await control.sleep_bytes(engine.url, bytes_per_gpu=_asked(step), deadline_s=deadline_s)
        judgement = await self._verify(engine, expected, before)
        if not judgement.ok:
            raise Lied(judgement.reason)
        least, why = _least(rest, judgement), f"sleeps deeper ({step.reason})"
        return Facts(why, depth=step.depth, held_bytes=judgement.held, residue_bytes=least)

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

    def _elastic(self, rest: Mapping[GpuId, int], engine: EngineRuntime) -> SleepExpectation:
        """Freeing by bytes must leave no more than what it held less what it was to free. How little it can come to is
        not known before a sleep has shown it."""
        held = {gpu: engine.charge_on(gpu) for gpu in engine.gpus}
        first = 1.0 - self._world.config.recovery.first_sleep_frees_min
        least = {gpu: 0 if gpu in engine.residue_bytes else int(first * engine.awake_on(gpu)) for gpu in engine.gpus}
        return SleepExpectation(held, {gpu: max(size, least[gpu]) for gpu, size in rest.items()}, SPARE_BYTES, 0.0)

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


def _asked(step: Step) -> int:
    """Bytes a GPU that an elastic engine is asked for."""
    return max(-size for _, size in step.bytes_per_gpu) + 2 * SPARE_BYTES


def _rest(step: Step, engine: EngineRuntime) -> dict[GpuId, int]:
    """What stays where an engine frees what it is about to be asked for."""
    freed = {gpu: -size for gpu, size in step.bytes_per_gpu}
    return {gpu: max(0, engine.charge_on(gpu) - freed.get(gpu, 0)) for gpu in engine.gpus}


def _least(rest: Mapping[GpuId, int], judgement: Judgement) -> dict[GpuId, int]:
    """Where more stays than was to stay, although it was asked for more, it showed how little it can come to."""
    return {gpu: held for gpu, held in judgement.held.items() if held > rest[gpu]}


def _longest(phases: dict[str, float], name: str, seconds: float) -> None:
    """Victims sleep side by side: the slowest one is the swap's phase."""
    phases[name] = max(phases.get(name, 0.0), seconds)
