"""Intent before, outcome after: every transition through this one door."""

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from rotator.core.values import Action, Command, GpuId, State, Step, Swap
from rotator.ports import Intent, Ledger, LedgerError, Outcome

_log = logging.getLogger(__name__)


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
    """One open line of the journal. Closing it twice, or after a failed write, is harmless: a restart resolves it."""

    def __init__(self, ledger: Ledger, id: int, wall: Callable[[], float]) -> None:
        self._ledger = ledger
        self._id = id
        self._wall = wall
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
        outcome = Outcome(result, state, error, phases_s or {}, before or {}, after or {}, self._wall())
        try:
            await self._ledger.close_transition(self._id, outcome)
        except LedgerError as e:
            _log.error("journal: outcome of transition %d not written: %s", self._id, e)


class Journal:
    def __init__(self, ledger: Ledger, wall: Callable[[], float] = time.time) -> None:
        self._ledger = ledger
        self._wall = wall

    async def open(
        self,
        swap_id: str,
        engine: str,
        action: Action | str,
        from_state: State,
        to_state: State,
        reason: str,
        plan: Mapping[str, Any] | None = None,
    ) -> Entry:
        """Write the intent. Raises LedgerError: then nothing may start."""
        name = action.value if isinstance(action, Action) else action
        intent = Intent(swap_id, engine, name, from_state, to_state, reason, plan or {}, self._wall())
        return Entry(self._ledger, await self._ledger.open_transition(intent), self._wall)
