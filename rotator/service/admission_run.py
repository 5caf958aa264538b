"""Brings one engine in: wakes a sleeper or starts a stopped one, and lets clients in only past the canary."""

import asyncio
from collections.abc import Mapping
from dataclasses import replace

from rotator.core.lifecycle import Event
from rotator.core.values import Action, Depth, EngineName, GpuId, Level, State, Step
from rotator.ports import DeviceError, EngineError, GpuReading, Handle, LaunchError, LedgerError
from rotator.service import canary
from rotator.service.accounting import held_by, read_gpus, used
from rotator.service.burial import Undertaker, log_tail
from rotator.service.journal import Entry
from rotator.service.owner import Facts, Lied, Owner, Unbacked, WrongFiles
from rotator.service.records import ActiveSwap, EngineRuntime
from rotator.service.world import World

_CALL_S = 10.0  # small questions to an engine: version, models, is it sleeping
READY_POLL_S = 0.2
_Others = Mapping[EngineName, tuple[State, float]]


class StartFailed(Exception):
    """The engine did not become ready; the text says why."""


class Admitter:
    def __init__(self, world: World, owner: Owner, undertaker: Undertaker) -> None:
        self._world = world
        self._owner = owner
        self._undertaker = undertaker

    async def run(self, step: Step, active: ActiveSwap, entry: Entry) -> bool:
        """True when the engine is awake and has answered its canary."""
        engine = self._owner.runtime(step.engine)
        bring = self._wake if step.action is Action.WAKE else self._start
        try:
            done = await bring(step, engine, active)
        except (EngineError, LaunchError, StartFailed, LedgerError) as e:
            await self._fail(engine, active, entry, Event.FAULT, f"its {step.action.value} failed: {e}")
            return False
        except (WrongFiles, Unbacked) as e:
            await self._fail(engine, active, entry, Event.LIED, f"after the {step.action.value} {e}")
            return False
        except Lied as e:
            reason = f"its canary failed after the {step.action.value}: {e}"
            await self._fail(engine, active, entry, Event.LIED, reason, canary="failed")
            return False
        self._undertaker.background(
            entry.close(
                "ok" if done else "failed",
                engine.state,
                phases_s={**active.phases_s, "total": asyncio.get_running_loop().time() - active.begun_at_s},
                after={gpu: engine.awake_on(gpu) for gpu in engine.gpus},
            )
        )
        return done

    async def doomed(self, step: Step) -> str | None:
        """Why a start surely fails, asked before anybody yields for it: a refused launch leaves nothing behind, a crash
        does."""
        look, engine = self._world.preflight, self._owner.runtime(step.engine)
        if step.action is not Action.START or look is None or not self._world.config.recovery.preflight:
            return None
        return await look(engine.config, engine.spec)

    async def refuse(self, step: Step, active: ActiveSwap, entry: Entry, why: str) -> None:
        """Fail a start without having tried it: it comes back after its backoff like any other."""
        engine = self._owner.runtime(step.engine)
        if await self._owner.moved(engine.name, Event.LAUNCH, Facts(step.reason)):
            await self._fail(engine, active, entry, Event.FAULT, f"its start failed: {why}")
        else:
            await entry.close("abandoned", engine.state, error=why)

    async def _fail(
        self,
        engine: EngineRuntime,
        active: ActiveSwap,
        entry: Entry,
        event: Event,
        reason: str,
        canary: str | None = None,
    ) -> None:
        active.error = reason
        tail = await self._undertaker.evidence(engine) or log_tail(engine.spec.log_path)
        await self._owner.moved(engine.name, event, Facts(reason, canary=canary))
        await entry.close("failed", engine.state, error=f"{reason}; log: {tail}" if tail else reason)

    # -- wake --------------------------------------------------------------------------------------------------------

    async def _wake(self, step: Step, engine: EngineRuntime, active: ActiveSwap) -> bool:
        clock = asyncio.get_running_loop().time
        level = _level(engine)
        by_bytes, deadline_s = engine.depth is Depth.KV, engine.config.wake_deadline_s
        rest = {gpu: engine.charge_on(gpu) for gpu in engine.gpus}
        if not await self._owner.moved(engine.name, Event.WAKE, Facts(step.reason)):
            return False
        begun = clock()
        if by_bytes:
            await self._world.control.wake_bytes(engine.url, deadline_s=deadline_s)
        else:
            await self._world.control.wake(engine.url, level=level, deadline_s=deadline_s)
        woken = clock()
        active.phases_s["wake"] = woken - begun
        active.timeline.append(("wake", engine.name, begun, woken))
        reading = asyncio.ensure_future(self._readings(engine))
        try:
            facts = await self._judge(engine)
        finally:
            active.phases_s["canary"] = clock() - woken
            active.timeline.append(("canary", engine.name, woken, clock()))
            after = await reading
        held = held_by(after, engine.pids) if after else None
        if wrong := engine.woke_without_bytes(held or {}, rest):
            raise Unbacked(wrong)
        moved = sum(engine.awake_on(gpu) - size for gpu, size in rest.items())
        facts = _with(facts, step, held, wake_s=woken - begun, moved_bytes=max(0, moved))
        return await self._owner.moved(engine.name, Event.WOKE, facts)

    async def _judge(self, engine: EngineRuntime) -> Facts:
        """Compare with this launch's golden answer; record one where none was (an engine found asleep)."""
        config = self._world.config.canary
        if not config.enabled:
            return Facts("", canary="disabled")
        if engine.golden is None or canary.needs_recording(engine.golden, engine.config.model, config):
            golden = await canary.record(self._world.control, engine.url, engine.config.model, config)
            return Facts("", golden=golden, canary="recorded")
        verdict = await canary.check(self._world.control, engine.url, engine.config.model, engine.golden, config)
        if not verdict.ok:
            raise Lied(verdict.reason)
        return Facts("", canary="passed")

    async def _readings(self, engine: EngineRuntime) -> dict[GpuId, GpuReading]:
        """A measurement that nothing waits for: empty where the GPUs do not answer."""
        try:
            return await read_gpus(self._world.devices, engine.gpus, self._world.config.devices.read_deadline_s)
        except DeviceError:
            return {}

    # -- start -------------------------------------------------------------------------------------------------------

    async def _start(self, step: Step, engine: EngineRuntime, active: ActiveSwap) -> bool:
        clock = asyncio.get_running_loop().time
        begun = clock()
        if not await self._owner.moved(engine.name, Event.LAUNCH, Facts(step.reason)):
            return False
        before, others = await self._readings(engine), self._others(engine)
        handle = await self._launch(engine)
        if engine.state is not State.STARTING:
            await self._give_up(engine, handle)
        await self._owner.learned(engine.name, Facts("", handle=handle))
        await self._world.ledger.put_engine(engine.record())
        await self._ready(engine, begun + engine.config.start_deadline_s)
        ready = clock()
        active.phases_s["start"] = ready - begun
        active.timeline.append(("start", engine.name, begun, ready))
        facts = await self._first_impression(engine, handle, before, others)
        active.phases_s["canary"] = clock() - ready
        active.timeline.append(("canary", engine.name, ready, clock()))
        facts = _with(facts, step, facts.held_bytes, start_s=clock() - begun)
        # While it started nobody could tell its bytes from others': what came meanwhile must be known to the next plan.
        return await self._owner.moved(engine.name, Event.STARTED, facts, await self._readings(engine))

    async def _launch(self, engine: EngineRuntime) -> Handle:
        launcher = self._world.launchers[engine.config.launcher]
        if engine.config.launcher != "attach":
            return await launcher.start(engine.spec)
        handle = await launcher.find(engine.spec, None)
        if handle is None:
            raise LaunchError(f"nothing answers at {engine.url}: start the engine there, it is attached and not ours")
        return handle

    async def _give_up(self, engine: EngineRuntime, handle: Handle) -> None:
        """It was stopped while its launcher was still asked: whoever ended it could not know of these processes."""
        if engine.config.launcher != "attach":
            await self._world.launchers[engine.config.launcher].stop(handle, grace_s=0.0)
        raise StartFailed(engine.reason)

    async def _ready(self, engine: EngineRuntime, give_up_at_s: float) -> None:
        """Return once it answers /health. Raises StartFailed at the deadline, or when it died meanwhile."""
        clock = asyncio.get_running_loop().time
        while not await self._world.control.is_healthy(engine.url, deadline_s=_CALL_S):
            if engine.state is not State.STARTING:
                raise StartFailed(engine.reason)
            if clock() >= give_up_at_s:
                raise StartFailed(f"it was not ready after {engine.config.start_deadline_s:.0f} s")
            await asyncio.sleep(READY_POLL_S)

    async def _first_impression(
        self, engine: EngineRuntime, handle: Handle, before: Mapping[GpuId, GpuReading], others: _Others
    ) -> Facts:
        """Who is it, can it freeze, what does it answer, how much does it hold."""
        control, url = self._world.control, engine.url
        version = await control.version(url, deadline_s=_CALL_S)
        models = await control.served_models(url, deadline_s=_CALL_S)
        if engine.config.model not in models:
            names = ", ".join(models) or "none"
            raise StartFailed(
                f"it serves {names}, not '{engine.config.model}': set served_model or --served-model-name"
            )
        if await control.is_sleeping(url, deadline_s=_CALL_S):
            await control.wake(url, level=_level(engine), deadline_s=engine.config.wake_deadline_s)
        if wrong := await self._world.wrong_files(engine.config, url):
            raise WrongFiles(wrong)
        freezes = await control.can_freeze(url, engine.config.levels, deadline_s=_CALL_S)
        golden, state = None, "disabled"
        if self._world.config.canary.enabled:
            golden = await canary.record(control, url, engine.config.model, self._world.config.canary)
            state = "recorded"
        pids = await self._world.launchers[engine.config.launcher].pids(handle)
        held = await self._measure(engine, pids, before, others)
        return Facts(
            "",
            version=version,
            freezes=freezes,
            golden=golden,
            canary=state,
            pids=pids,
            awake_bytes=held,
            held_bytes=held,
        )

    async def _measure(
        self, engine: EngineRuntime, pids: frozenset[int], before: Mapping[GpuId, GpuReading], others: _Others
    ) -> dict[GpuId, int] | None:
        after = await self._readings(engine)
        if not after:
            return None
        held = held_by(after, pids)
        if held is None and before and engine.config.launcher != "attach":
            # Others may have given bytes back meanwhile. It is never taken for less than was seen of it by process, nor
            # than was planned where one of ours has moved.
            still = others == self._others(engine)
            least = {gpu: engine.awake_bytes.get(gpu, 0) if still else engine.awake_on(gpu) for gpu in engine.gpus}
            held = {gpu: max(size - before[gpu].used_bytes, least[gpu]) for gpu, size in used(after).items()}
        return held

    def _others(self, engine: EngineRuntime) -> _Others:
        """Who else is on its GPUs, and since when as they are now."""
        sharing = (e for e in self._owner.all_runtimes() if e is not engine and not set(e.gpus).isdisjoint(engine.gpus))
        return {e.name: (e.state, e.since_wall_s) for e in sharing}


def _level(engine: EngineRuntime) -> Level:
    """At which it last fell asleep."""
    return Level.HOST if engine.level is None else engine.level


def _with(facts: Facts, step: Step, held: Mapping[GpuId, int] | None, **more: object) -> Facts:
    """The same facts with the step's reason, and with what was measured where anything was."""
    return replace(facts, reason=f"awake ({step.reason})", held_bytes=held, awake_bytes=held, **more)  # type: ignore[arg-type]
