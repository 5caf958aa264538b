"""Carries out one swap from its value: journal, evict, admit. Everything slow happens here, outside the loop's task."""

import asyncio
import logging

from rotator.core.values import Action, State, Step
from rotator.ports import LedgerError
from rotator.ports_telemetry import ABOUT
from rotator.service.admission_run import Admitter
from rotator.service.burial import Undertaker
from rotator.service.decisions import pack
from rotator.service.eviction_run import Evictor
from rotator.service.journal import Entry, plan_json
from rotator.service.owner import Owner
from rotator.service.records import ActiveSwap
from rotator.service.world import World

_log = logging.getLogger(__name__)
_AIMS = {
    Action.SLEEP: State.ASLEEP,
    Action.STOP: State.STOPPED,
    Action.WAKE: State.AWAKE,
    Action.START: State.AWAKE,
}


class SwapRunner:
    def __init__(self, world: World, owner: Owner, undertaker: Undertaker) -> None:
        self._world = world
        self._owner = owner
        self._undertaker = undertaker
        self._evictor = Evictor(world, owner, undertaker)
        self._admitter = Admitter(world, owner, undertaker)

    async def run(self, active: ActiveSwap) -> None:
        """Never raises: what went wrong is in ``active.error``, and in the engines' states."""
        ABOUT.set(active)
        clock = asyncio.get_running_loop().time
        begun = clock()
        try:
            await self._run(active)
        except LedgerError as e:
            active.error = f"not begun, the journal cannot be written: {e}"
        except Exception as e:
            _log.exception("swap %s", active.id)
            active.error = f"internal error: {e!r}"
        active.phases_s["total"] = clock() - begun

    async def _run(self, active: ActiveSwap) -> None:
        admit = active.swap.admit
        if admit is not None and (why := await self._admitter.doomed(admit)) is not None:
            entry = (await self._open(active, (admit,)))[admit.engine]
            await self._admitter.refuse(admit, active, entry, why)
            return
        entries = await self._open(active, active.swap.evict)
        if admit is None:
            await self._evictor.run(active, entries)
            return
        evicted = not active.swap.evict or await self._evictor.run(active, entries)
        # Only now: a restart that finds it open has to reckon with a wake that was asked for.
        entry = (await self._open(active, (admit,)))[admit.engine]
        if not evicted:
            active.error = active.error or "an engine did not yield its bytes"
            await self._abandon(entry, admit, active.error)
        elif not await self._owner.wanted(active):
            active.error = f"nobody waits for {admit.engine} any more"
            await self._abandon(entry, admit, active.error)
        elif lacking := await self._owner.lacking(admit.engine):
            active.error = lacking
            await self._abandon(entry, admit, active.error)
        else:
            await self._admitter.run(admit, active, entry)

    async def _abandon(self, entry: Entry, admit: Step, why: str) -> None:
        await entry.close("abandoned", self._owner.runtime(admit.engine).state, error=why)

    async def _open(self, active: ActiveSwap, steps: tuple[Step, ...]) -> dict[str, Entry]:
        """Write the intents. If one cannot be written the others are closed again and nothing starts."""
        entries: dict[str, Entry] = {}
        plan = plan_json(active.swap)
        try:
            for step in steps:
                state = self._owner.runtime(step.engine).state
                aim = _AIMS.get(step.action, state)  # one that sinks stays what it is
                entries[step.engine] = await self._world.journal.open(
                    active.id, step.engine, step.action, state, aim, step.reason, plan, _decision(active)
                )
        except LedgerError:
            for name, entry in entries.items():
                await entry.close("abandoned", self._owner.runtime(name).state, error="the journal cannot be written")
            raise
        return entries


def _decision(active: ActiveSwap) -> str | None:
    """What the swap was decided from, for the first of its intents."""
    seen, active.seen = active.seen, None
    return None if seen is None else pack(seen)
