"""What one plan stands on: the room as it is, which GPUs are closed to whom, and whose turn must come."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set
from functools import cached_property

from rotator.core.hostram import free_of
from rotator.core.placement import Room
from rotator.core.policy import due_from_s, rivals_on
from rotator.core.turns import due_in_s
from rotator.core.values import (
    Blocked,
    BlockKind,
    Command,
    Engine,
    GpuId,
    Health,
    Snapshot,
)


class Grounds:
    """What wishes of one plan are judged by.

    Every GPU takes part in one swap at most, so ``room`` is never updated: what a swap frees nobody else in this plan
    may take. Only host RAM is shared between swaps, and only ever taken.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self.turns: Sequence[Engine] = ()  # all that clients want, first turn first
        self.room = Room(snapshot.gpus, snapshot.engines.values())
        self.host_free_bytes = free_of(snapshot)
        self._now_s = snapshot.now_s
        self._snapshot = snapshot
        self._due_from_s = due_from_s(snapshot.policy)
        self._gpus = snapshot.gpus
        self._engines = snapshot.engines
        self._policy = snapshot.policy
        self._unreadable = {g.id for g in snapshot.gpus.values() if g.health is Health.UNKNOWN} | self.room.missing
        self._cordons = {g.id: g.cordoned for g in snapshot.gpus.values() if g.cordoned or g.health is Health.CORDONED}
        self._unfit = {g.id for g in snapshot.gpus.values() if g.health is Health.CORDONED} | self._unreadable
        self._closed: dict[GpuId, str] = dict.fromkeys(snapshot.claimed, "a transition is under way")
        for engine in self.room.moving:
            self._closed.update(dict.fromkeys(engine.gpus, f"{engine.name} is {engine.state.value}"))

    # -- what is closed, and to whom -----------------------------------------------------------------------------------

    def shut(self, engine: Engine, command: Command | None) -> Blocked | None:
        """Whether a GPU of the engine cannot be read, moves, is in a swap of this plan, or kept for an earlier wish."""
        if not self._unreadable.isdisjoint(engine.gpus):
            return self._unhealthy(engine, command, self._unreadable)
        return self._taken(engine, command)

    def _taken(self, engine: Engine, command: Command | None) -> Blocked | None:
        closed = self._closed
        for gpu in engine.gpus:
            if gpu in closed:
                return Blocked(engine.name, BlockKind.BUSY, f"{gpu}: {closed[gpu]}", None, command)
        return None

    def _unhealthy(self, engine: Engine, command: Command | None, bad: Set[GpuId]) -> Blocked:
        if bad is self._unfit and (gpu := next((g for g in engine.gpus if g in self._cordons), None)) is not None:
            why = f" ({self._cordons[gpu]})" if self._cordons[gpu] else ""  # it lasts, so it goes before what passes
            return Blocked(
                engine.name,
                BlockKind.CORDONED,
                f"{gpu} is cordoned{why}: `rotator cordon --undo` lets work on it again",
                None,
                command,
            )
        gpu = next(gpu for gpu in engine.gpus if gpu in bad)
        reason = f"{gpu} cannot be read: nothing begins there until it can"
        return Blocked(engine.name, BlockKind.GPU_UNKNOWN, reason, None, command)

    def _may_sink(self, engine: Engine) -> bool:
        return self._closed.keys().isdisjoint(engine.gpus) and self._unreadable.isdisjoint(engine.gpus)

    def _keep(self, waiting: Engine, gpus: Iterable[GpuId]) -> None:
        closed = self._closed
        for gpu in gpus:
            if gpu not in closed:
                closed[gpu] = f"kept for {waiting.name}, whose turn comes first"

    # -- whose turn it must be -----------------------------------------------------------------------------------------

    def _keeps_turn(self, engine: Engine) -> bool:
        """Whether a wish that waits for another's turn to end keeps its GPUs closed to later wishes. Where turns are
        priced it only does so when it is overdue: before, whoever outweighs the turn may take it."""
        policy = self._policy
        if policy.swap_share is None or policy.longest_wait_s is None:
            return True
        return self._is_due(engine)

    def _is_due(self, engine: Engine) -> bool:
        if engine.demand.oldest_wait_s < self._due_from_s and not engine.demand.frozen:
            return False
        return due_in_s(engine, self._policy, self._rivals(engine)) <= 0.0

    def _rivals(self, wish: Engine) -> int:
        """How many others want its GPUs or are busy there; 0, uncounted, as long as that cannot make the wish due."""
        if wish.demand.oldest_wait_s < self._due_from_s and not wish.demand.frozen:
            return 0
        return max([self._rivals_on[gpu] for gpu in wish.gpus]) - 1

    @cached_property
    def _rivals_on(self) -> Mapping[GpuId, int]:
        return rivals_on(self._snapshot)

    @cached_property
    def _wanted_on(self) -> dict[GpuId, list[Engine]]:
        """Engines that clients want, by GPU, first turn first."""
        wanted: dict[GpuId, list[Engine]] = defaultdict(list)
        widest = max([len(engine.gpus) for awake in self.room.awake.values() for engine in awake], default=0)
        for engine in self.turns:
            if len(engine.gpus) < widest:  # wider ones come in beside nobody
                for gpu in engine.gpus:
                    wanted[gpu].append(engine)
        return wanted
