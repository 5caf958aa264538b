"""Intent before, outcome after: every transition through this one door."""

import asyncio
import dataclasses
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from rotator.core.values import Action, Command, GpuId, State, Step, Swap
from rotator.ports import Intent, Ledger, LedgerError, Outcome

_log = logging.getLogger(__name__)
_AGAIN_S = 1.0


def plan_json(swap: Swap) -> dict[str, Any]:
    """A swap as plain JSON values, the same in the journal, in answers and in a replay."""
    return {
        "evict": [step_json(step) for step in swap.evict],
        "admit": step_json(swap.admit) if swap.admit else None,
        "reason": swap.reason,
        "gpus": sorted(swap.gpus),
        "expected_s": swap.expected_s,
        "command": command_json(swap.command) if swap.command else None,
    }


def step_json(step: Step) -> dict[str, Any]:
    return {**dataclasses.asdict(step), "action": step.action.value, "bytes_per_gpu": dict(step.bytes_per_gpu)}


def command_json(command: Command) -> dict[str, Any]:
    return {**dataclasses.asdict(command), "kind": command.kind.value}


class Entry:
    """One open line of the journal. Closing it twice is harmless."""

    def __init__(self, journal: "Journal", id: int) -> None:
        self._journal = journal
        self._id = id
        self._open = True

    async def close(
        self,
        result: str,
        state: State,
        *,
        error: str | None = None,
        phases_s: Mapping[str, float] | None = None,
        before: Mapping[GpuId, int] | None = None,
        after: Mapping[GpuId, int] | None = None,
    ) -> None:
        if not self._open:
            return
        self._open = False
        now_wall_s = self._journal.wall()
        outcome = Outcome(result, state, error, phases_s or {}, before or {}, after or {}, now_wall_s)
        await self._journal.close(self._id, outcome)


class Journal:
    """Outcomes that could not be written wait here until they can. There are as few as transitions under way: without
    room in the journal none begins. After a kill a restart resolves what is open."""

    def __init__(self, ledger: Ledger, wall: Callable[[], float] = time.time) -> None:
        self._ledger = ledger
        self.wall = wall
        self._owed: dict[int, Outcome] = {}
        self._paying: asyncio.Task[None] | None = None

    async def close(self, transition: int, outcome: Outcome) -> None:
        """Write an outcome, now or as soon as the ledger takes it."""
        try:
            await self._ledger.close_transition(transition, outcome)
        except LedgerError as e:
            _log.error("journal: outcome of transition %d not written yet: %s", transition, e)
            self._owed[transition] = outcome
            if self._paying is None or self._paying.done():
                self._paying = asyncio.create_task(self._pay())

    @property
    def owed(self) -> int:
        """Outcomes that wait to be written."""
        return len(self._owed)

    @property
    def lag_s(self) -> float:
        """How long the oldest of them has waited."""
        return max((self.wall() - outcome.at_wall_s for outcome in self._owed.values()), default=0.0)

    async def _pay(self) -> None:
        while self._owed:
            await asyncio.sleep(_AGAIN_S)
            for transition, outcome in tuple(self._owed.items()):
                try:
                    await self._ledger.close_transition(transition, outcome)
                except LedgerError:
                    if not self._ledger.healthy:
                        break  # it tries small writes by itself: what is owed waits until they succeed
                    _log.exception("journal: outcome of transition %d is given up", transition)
                del self._owed[transition]

    async def open(
        self,
        swap_id: str,
        engine: str,
        action: Action | str,
        from_state: State,
        to_state: State,
        reason: str,
        plan: Mapping[str, Any] | None = None,
        decision: str | None = None,
    ) -> Entry:
        """Write the intent. Raises LedgerError: then nothing may start. ``decision`` is what the swap was decided from,
        packed; once a swap is enough."""
        name = action.value if isinstance(action, Action) else action
        intent = Intent(swap_id, engine, name, from_state, to_state, reason, plan or {}, self.wall(), decision)
        return Entry(self, await self._ledger.open_transition(intent))
