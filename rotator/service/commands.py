"""Operators' commands on their way: waiting for their turn, in a swap, answered."""

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rotator.core.values import (
    Action,
    Blocked,
    BlockKind,
    Command,
    CommandKind,
    Plan,
    State,
    Swap,
)
from rotator.service.mailbox import Asked
from rotator.service.operations import CommandFailed, CommandRefused, CommandResult, CommandTimeout, ShuttingDown
from rotator.service.records import ActiveSwap

if TYPE_CHECKING:
    from rotator.service.loop import Loop

PENDING_MAX = 256
_AIMS = {
    CommandKind.WAKE: (State.AWAKE, Action.WAKE),
    CommandKind.START: (State.AWAKE, Action.START),
    CommandKind.SLEEP: (State.ASLEEP, Action.SLEEP),
    CommandKind.STOP: (State.STOPPED, Action.STOP),
}
_PASSING = frozenset({BlockKind.BUSY, BlockKind.STAY, BlockKind.BACKOFF, BlockKind.UNFREEZABLE, BlockKind.GPU_UNKNOWN})


@dataclass(slots=True, eq=False)
class _Pending:
    command: Command
    answer: asyncio.Future[CommandResult]
    expires_at_s: float
    asked_at_s: float
    plan: Plan


class Desk:
    """Part of the loop's task: only the loop calls it."""

    def __init__(self, loop: "Loop") -> None:
        self._loop = loop
        self._pending: list[_Pending] = []
        self._in_swap: dict[str, list[_Pending]] = {}
        self._closed = False

    def take(self, asked: Asked) -> None:
        now = self._loop.now_s()
        plan = self._loop.plan_for(asked.commands)
        for command, answer in zip(asked.commands, asked.answers, strict=True):
            entry = _Pending(command, answer, asked.expires_at_s, now, plan)
            if self._satisfied(command):
                self._succeed(entry, {})
            elif self._closed and not asked.closing:
                _refuse(entry, ShuttingDown())
            elif len(self._pending) >= PENDING_MAX:
                _refuse(entry, CommandRefused("too many commands are pending: wait until some are done"))
            else:
                self._pending.append(entry)

    def close(self) -> None:
        """The service ends: who waits or comes is refused."""
        self._closed = True
        pending, self._pending = self._pending, []
        for entry in pending:
            _refuse(entry, ShuttingDown())

    def pending_commands(self) -> tuple[Command, ...]:
        return tuple(p.command for p in self._pending)

    def next_expiry_s(self) -> float | None:
        return min((p.expires_at_s for p in self._pending), default=None)

    def drop_expired(self, now_s: float) -> None:
        for entry in [p for p in self._pending if p.expires_at_s <= now_s]:
            self._pending.remove(entry)
            why = f"{entry.command.kind.value} of {entry.command.engine} did not get its turn in time"
            _refuse(entry, CommandTimeout(why))

    def begun(self, swap_id: str, swap: Swap) -> tuple[Command, ...]:
        """Take the commands that this swap serves out of the line."""
        served = {step.engine: step.action for step in swap.evict}
        if swap.admit:
            served[swap.admit.engine] = swap.admit.action
        mine = [p for p in self._pending if _serves(served.get(p.command.engine), p.command.kind)]
        self._pending = [p for p in self._pending if p not in mine]
        self._in_swap[swap_id] = mine
        for entry in mine:
            wakes = entry.command.kind in (CommandKind.WAKE, CommandKind.START)
            (self._loop.calendar.unwaive if wakes else self._loop.calendar.waive)(entry.command.engine)
        return tuple(p.command for p in mine)

    def ended(self, active: ActiveSwap) -> None:
        for entry in self._in_swap.pop(active.id, []):
            engine = self._loop.fleet.engines.get(entry.command.engine)
            if self._satisfied(entry.command):
                self._succeed(entry, active.phases_s)
            else:
                why = active.error or (engine.reason if engine else "the engine was removed")
                _refuse(entry, CommandFailed(f"{entry.command.kind.value} of {entry.command.engine}: {why}"))

    def blocked(self, blocked: Blocked) -> None:
        """A command that only has to wait stays in line; one that makes no sense is refused."""
        for entry in [p for p in self._pending if p.command == blocked.command]:
            if self._satisfied(entry.command):
                self._pending.remove(entry)
                self._succeed(entry, {})
            elif blocked.kind not in _PASSING:
                self._pending.remove(entry)
                _refuse(entry, CommandRefused(blocked.reason))

    def _satisfied(self, command: Command) -> bool:
        engine = self._loop.fleet.engines.get(command.engine)
        if engine is None or engine.state is not _AIMS[command.kind][0]:
            return False
        return command.level is None or command.kind is not CommandKind.SLEEP or engine.level is command.level

    def _succeed(self, entry: _Pending, phases_s: dict[str, float]) -> None:
        if entry.answer.done():
            return
        engine = self._loop.fleet.engines[entry.command.engine]
        seconds = self._loop.now_s() - entry.asked_at_s
        action = _AIMS[entry.command.kind][1]
        entry.answer.set_result(
            CommandResult(engine.name, action, engine.state.value, entry.plan, True, seconds, dict(phases_s))
        )


def _serves(action: Action | None, kind: CommandKind) -> bool:
    if kind in (CommandKind.WAKE, CommandKind.START):
        return action in (Action.WAKE, Action.START)
    return action is _AIMS[kind][1]


def _refuse(entry: _Pending, error: Exception) -> None:
    if not entry.answer.done():
        entry.answer.set_exception(error)
