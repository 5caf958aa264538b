"""Answers wishes that a plan does not serve: who waits for what cannot come is told why, now."""

from typing import TYPE_CHECKING

from rotator.core.values import Blocked, BlockKind, State
from rotator.core.yielding import PASSING

if TYPE_CHECKING:
    from rotator.service.loop import Loop

HOPELESS = frozenset(
    {BlockKind.NEVER_FITS, BlockKind.PINNED, BlockKind.QUARANTINED, BlockKind.CORDONED, BlockKind.HOST_RAM}
)
BY_BYTES = frozenset({BlockKind.NEVER_FITS, BlockKind.HOST_RAM})
BYTES_GRACE_S = 3.0


class Refuser:
    """Part of the loop's task: only the loop calls it."""

    def __init__(self, loop: "Loop") -> None:
        self._loop = loop

    def answer(self, blocked: Blocked) -> None:
        if blocked.command is not None:
            self._loop.desk.blocked(blocked)
            return
        if blocked.kind not in PASSING:
            self._end_stalled(blocked)
        if self._is_hopeless(blocked) and self._loop.world.traffic.waiting(blocked.engine):
            self._turn_away(blocked)

    def _end_stalled(self, blocked: Blocked) -> None:
        """A stream whose turn is not on the way ends, for all to see, once it has stood still for as long as it may."""
        name = blocked.engine
        reason = f"it stood still for as long as it may, and {name} cannot go on: {blocked.reason}"
        self._loop.world.traffic.cut_stalled(name, reason)

    def _turn_away(self, blocked: Blocked) -> None:
        """Waiting cannot help: whoever waits learns why now. The next one who comes makes us look again."""
        traffic, name = self._loop.world.traffic, blocked.engine
        if blocked.kind in BY_BYTES and traffic.oldest_wait_s(name) < BYTES_GRACE_S:
            return  # a process that is just ending may still hold them: the next readings tell
        traffic.fail(name, f"{name} cannot be had: {blocked.reason}")
        if self._loop.fleet.engines[name].state is not State.QUARANTINED:
            traffic.clear_failure(name)

    def _is_hopeless(self, blocked: Blocked) -> bool:
        """Whether waiting cannot help: it lasts, or the calendar lasts longer than anybody may wait."""
        if blocked.kind is not BlockKind.HELD:
            return blocked.kind in HOPELESS
        engine = self._loop.fleet.engines[blocked.engine].config
        patience_s = engine.wait_deadline_s or self._loop.world.config.gateway.wait_deadline_s
        return blocked.until_s is not None and blocked.until_s - self._loop.now_s() > patience_s
