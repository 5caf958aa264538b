"""Who yields for a wish: the cheapest engines that may be asked, or which hurdle keeps them from it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from rotator.core import reasons
from rotator.core.eviction import Option, cheapest, deepen_option, sleep_options, stop_option
from rotator.core.grounds import Grounds
from rotator.core.hostram import HostBytes, clipped, fits, left_for, spread
from rotator.core.ladder import relief
from rotator.core.placement import gib
from rotator.core.turns import margin, served, stays_until_s
from rotator.core.values import (
    Action,
    Blocked,
    BlockKind,
    Command,
    Depth,
    Engine,
    GpuId,
    Level,
    State,
)

PASSING = frozenset({BlockKind.BUSY, BlockKind.STAY})
"""What passes by itself. A wish blocked by one of these keeps its GPUs closed to later wishes."""


@dataclass(slots=True)
class Wish:
    """An engine to be brought in, and on whose account."""

    engine: Engine
    command: Command | None = None
    preload: bool = False  # disturbs nobody who is busy
    reason: str = ""  # who wants it, where that is neither an operator nor a client
    ahead: bool = False  # in advance of clients that are expected

    @property
    def force(self) -> bool:
        return self.command is not None and self.command.force

    @property
    def by_clients(self) -> bool:
        """Whether only clients want it: then turns are weighed against each other."""
        return self.command is None and not self.preload and not self.reason


@dataclass(frozen=True, slots=True)
class _Hurdle:
    """Why an engine that is in the way may not be asked to yield now."""

    kind: BlockKind
    until_s: float | None = None


@dataclass(frozen=True, slots=True)
class _Ways:
    """The ways to room for one wish: engines ``open`` to be asked, and those ``barred`` by a hurdle."""

    deficits: dict[GpuId, int]
    host_free: HostBytes
    open: list[Engine] = field(default_factory=list)
    barred: list[tuple[_Hurdle, Engine]] = field(default_factory=list)

    def lifting(self, kind: BlockKind) -> list[tuple[_Hurdle, list[Engine]]]:
        """Engines barred by that kind, as they come free: minimum stays end one by one, all else counts at once."""
        group = sorted(((h, e) for h, e in self.barred if h.kind is kind), key=lambda item: item[0].until_s or 0.0)
        if kind is BlockKind.STAY:
            return [(hurdle, [engine]) for hurdle, engine in group]
        return [(group[0][0], [engine for _, engine in group])] if group else []


_PLENTY = 1 << 62  # bytes of host RAM that no fleet runs out of

_Searching = Callable[[_Ways, Sequence[Engine]], tuple[Option, ...] | None]


class Yielding(Grounds):
    """The search for room."""

    def _find_room(
        self, wish: Wish, deficits: dict[GpuId, int], besides: frozenset[str], host_free: HostBytes
    ) -> tuple[Option, ...] | Blocked:
        """The cheapest engines to yield: by sleeping if that can do, else with stops among them."""
        ways = _Ways(deficits, host_free)
        self._sort_out(wish, ways, self.room.awake, besides)
        chosen = self._by_sleeps(ways, ways.open) if self._enough(deficits, ways.open) else None
        if self._policy.ladder and (chosen is None or any(o.action is Action.STOP for o in chosen)):
            chosen = self._by_relief(wish, ways, chosen)
        if chosen is None:  # rather wait a little for another's sleep than stop anybody
            waits = self._lift(wish, ways, (BlockKind.BUSY, BlockKind.STAY), list(ways.open), self._by_sleeps)
            if waits is not None:
                return waits
            self._sort_out(wish, ways, self._asleep, besides)
            chosen = self._by_stops(ways, ways.open)
        return self._why_not(wish, ways) if chosen is None else chosen

    def _by_relief(self, wish: Wish, ways: _Ways, stopping: tuple[Option, ...] | None) -> tuple[Option, ...] | None:
        """Where only host RAM keeps engines from sleeping: drop the masters that are least regretted, if that costs
        less than stopping somebody."""
        asleep = (
            self._by_sleeps(replace(ways, host_free=_PLENTY), ways.open)
            if self._enough(ways.deficits, ways.open, by_sleep=True)
            else None
        )
        if asleep is None:
            return stopping
        short = sum(o.host_bytes for o in asleep) - clipped(ways.host_free)
        besides = {o.engine.name for o in asleep} | {wish.engine.name}
        others = [e for e in self._engines.values() if e.name not in besides and self._may_sink(e)]
        dropped = relief(others, self.room.charged, short, self._policy, stops=True)
        if dropped is None:
            return stopping
        relieved = (*dropped, *asleep)
        cost_s = sum(o.cost_s for o in relieved)
        return relieved if stopping is None or cost_s < sum(o.cost_s for o in stopping) else stopping

    @cached_property
    def _asleep(self) -> dict[GpuId, list[Engine]]:
        return self.room.asleep()

    def _sort_out(
        self, wish: Wish, ways: _Ways, residents: Mapping[GpuId, Sequence[Engine]], besides: frozenset[str]
    ) -> None:
        """Divide the residents of the wanted GPUs into those that may be asked to yield and the others."""
        found = {engine.name: engine for gpu in ways.deficits for engine in residents[gpu]}
        busy = sum([served(e) for e in found.values() if e.state is State.AWAKE and e.demand.in_flight])
        for name in sorted(found):  # equal costs are decided by name, not by the order of a dict
            engine = found[name]
            if engine is wish.engine or engine.name in besides:
                continue
            hurdle = self._hurdle(engine, wish, busy)
            if hurdle is None:
                ways.open.append(engine)
            else:
                ways.barred.append((hurdle, engine))

    def _hurdle(self, engine: Engine, wish: Wish, busy: float) -> _Hurdle | None:
        """What forbids to ask the engine now; what lasts comes first. ``busy``: how many all in the way serve now."""
        demand, awake = engine.demand, engine.state is State.AWAKE
        deepens = engine.elastic and engine.depth is Depth.KV and self._policy.elastic
        if engine.pinned or not (awake or deepens or engine.can_stop):
            return _Hurdle(BlockKind.PINNED)
        if not self._unreadable.isdisjoint(engine.gpus):
            return _Hurdle(BlockKind.GPU_UNKNOWN)
        if not wish.force:
            flying = demand.in_flight or demand.frozen
            if (demand.in_flight and not engine.can_freeze) if awake else (flying and not deepens):
                return _Hurdle(BlockKind.UNFREEZABLE)
            if awake and (demand.in_flight or demand.waiting):
                if wish.preload:
                    return _Hurdle(BlockKind.BUSY)
                until_s = engine.awake_since_s + self._policy.min_stay_s
                if self._now_s >= until_s and wish.by_clients and self._policy.swap_share is not None:
                    until_s = self._turn_ends_s(engine, wish.engine, busy)
                if self._now_s < until_s:
                    return _Hurdle(BlockKind.STAY, until_s)
        return None if self._closed.keys().isdisjoint(engine.gpus) else _Hurdle(BlockKind.BUSY)

    def _turn_ends_s(self, engine: Engine, wish: Engine, busy: float) -> float:
        """When a busy engine's turn ends for the wish, with those counted who would come in beside it."""
        beside, mine = 0.0, frozenset(wish.gpus)
        if len(engine.gpus) > len(mine):
            freed, taken = frozenset(engine.gpus), set(mine)
            for gpu in engine.gpus:
                for other in self._wanted_on[gpu] if gpu not in taken else ():
                    if taken.isdisjoint(other.gpus) and freed.issuperset(other.gpus):
                        beside += served(other)
                        taken.update(other.gpus)
                        break
        ends_s = stays_until_s(
            engine,
            wish,
            self._now_s,
            self._policy,
            interrupted=busy,
            beside=beside,
            rivals=self._rivals(wish),
            margin=margin(self._policy, max([self._rivals_on[gpu] for gpu in wish.gpus]) - 1),
            swapping=max([self._gpus[gpu].swapping for gpu in engine.gpus if gpu in self._gpus], default=0.0),
        )
        look_s = self._now_s + self._due_from_s - wish.demand.oldest_wait_s
        return min(ends_s, look_s) if look_s > self._now_s else ends_s

    # -- searching among them ------------------------------------------------------------------------------------------

    def sleeps(
        self, engine: Engine, *, preferred_only: bool = False, wanted: Mapping[GpuId, int] | None = None
    ) -> list[Option]:
        """The ways in which an engine can sleep (deeper), the preferred one first."""
        charged = self.room.charged[engine.name]
        if engine.state is State.AWAKE:
            return sleep_options(engine, charged, self._policy, preferred_only=preferred_only, wanted=wanted)
        deeper = deepen_option(engine, charged, self._policy, wanted or {})
        return [] if deeper is None else [deeper]

    def _by_sleeps(self, ways: _Ways, engines: Sequence[Engine]) -> tuple[Option, ...] | None:
        """The cheapest of these to sleep; to stop only where an engine has no level at which it could."""
        room = clipped(ways.host_free)
        # Then nobody needs another level.
        plenty = fits(sum([spread(engine, engine.host_bytes) for engine in engines]), room)
        offers = []
        for engine in engines:
            if engine.state is State.AWAKE or engine.depth is Depth.KV:
                sleeps = self.sleeps(engine, preferred_only=plenty, wanted=ways.deficits)
                able = any(fits(o.host_bytes, room) for o in sleeps)
                offers.append(sleeps if able else [*sleeps, *self._stops(engine, sleeps)])
        return cheapest(ways.deficits, offers, ways.host_free)

    def _by_stops(self, ways: _Ways, engines: Sequence[Engine]) -> tuple[Option, ...] | None:
        """The last resort: sleeping engines and awake ones may be stopped too."""
        if not self._enough(ways.deficits, engines):
            return None
        offers = []
        for engine in engines:
            sleeps = self.sleeps(engine, wanted=ways.deficits)
            offers.append([*sleeps, *self._stops(engine, sleeps)])
        return cheapest(ways.deficits, offers, ways.host_free)

    def _stops(self, engine: Engine, sleeps: Sequence[Option]) -> list[Option]:
        if not engine.can_stop or (engine.depth is Depth.KV and engine.demand.frozen):
            return []
        at_least_s = sleeps[-1].cost_s if sleeps else 0.0
        return [stop_option(engine, self.room.charged[engine.name], self._policy, at_least_s)]

    def _enough(self, deficits: dict[GpuId, int], engines: Iterable[Engine], by_sleep: bool = False) -> bool:
        """Whether these engines hold enough between them, if host RAM were no matter."""
        lacking = dict(deficits)
        for engine in engines:
            holds = self.room.charged[engine.name]
            if by_sleep or not engine.can_stop:
                holds = tuple([max(0, now - rest) for now, rest in zip(holds, engine.residue_bytes, strict=True)])
            for gpu, size in zip(engine.gpus, holds, strict=True):
                if gpu in lacking:
                    lacking[gpu] -= size
        return max(lacking.values()) <= 0

    # -- why not -------------------------------------------------------------------------------------------------------

    def _why_not(self, wish: Wish, ways: _Ways) -> Blocked:
        """Lift the hurdles one after another, the soonest to pass first: the one that makes room is the reason."""
        pool = list(ways.open)
        kinds = (BlockKind.BUSY, BlockKind.STAY, BlockKind.UNFREEZABLE)
        waits = self._lift(wish, ways, kinds, pool, self._by_stops)
        if waits is not None:
            return waits
        if self._enough(ways.deficits, pool):
            return self._no_host_ram(wish, pool, ways.host_free)
        for kind in (BlockKind.GPU_UNKNOWN, BlockKind.PINNED):
            for _, engines in ways.lifting(kind):
                pool.extend(engines)
                if self._enough(ways.deficits, pool):
                    return self._waits_for(wish, kind, engines[0], None)
        gpu, lacking = max(ways.deficits.items(), key=lambda item: item[1])
        reason = f"{wish.engine.name} lacks {gib(lacking)} on {gpu} even if all others yielded"
        return Blocked(wish.engine.name, BlockKind.NEVER_FITS, reason, None, wish.command)

    def _lift(
        self, wish: Wish, ways: _Ways, kinds: Sequence[BlockKind], pool: list[Engine], search: _Searching
    ) -> Blocked | None:
        """Add the engines barred by these kinds to the pool, one kind after another, until it makes enough room."""
        for kind in kinds:
            for hurdle, engines in ways.lifting(kind):
                pool.extend(engines)
                if self._can(ways, pool, search):
                    if kind is BlockKind.BUSY or (kind is BlockKind.STAY and self._keeps_turn(wish.engine)):
                        self._keep_ways(wish.engine, ways)
                    return self._waits_for(wish, kind, engines[0], hurdle.until_s)
        return None

    def _can(self, ways: _Ways, pool: Sequence[Engine], search: _Searching) -> bool:
        """Whether these engines can make room."""
        if not self._enough(ways.deficits, pool):
            return False
        needed = sum([spread(e, e.host_bytes) for e in pool])
        if fits(needed, ways.host_free) and self._enough(ways.deficits, pool, by_sleep=True):
            return all(_may_sleep(e) for e in pool) or search(ways, pool) is not None
        return search(ways, pool) is not None

    def _keep_ways(self, waiting: Engine, ways: _Ways) -> None:
        """Close the GPUs of all who may have to yield: else swaps elsewhere on them could make them busy for ever."""
        yielding = [*ways.open, *(e for h, e in ways.barred if h.kind in PASSING)]
        awake = [e for e in yielding if e.state is State.AWAKE]
        for engine in awake if self._enough(ways.deficits, awake, by_sleep=True) else yielding:
            self._keep(waiting, engine.gpus)

    def _waits_for(self, wish: Wish, kind: BlockKind, other: Engine, until_s: float | None) -> Blocked:
        """Blocked by another engine that would have to make room."""
        name, streams = other.name, reasons.count(other.demand.in_flight or other.demand.frozen, "stream")
        closed = next((f"{gpu}: {self._closed[gpu]}" for gpu in other.gpus if gpu in self._closed), "it is busy")
        text = {
            BlockKind.BUSY: f"waits until {name} can make room ({closed})",
            BlockKind.STAY: f"waits until {name} has had its turn, {(until_s or 0.0) - self._now_s:.1f} s more",
            BlockKind.UNFREEZABLE: f"{name} has {streams} that may not be cut or frozen: wait, or force",
            BlockKind.GPU_UNKNOWN: f"{name} is in the way, on a GPU that cannot be read",
            BlockKind.PINNED: f"{name} is in the way and pinned: unpin it or put it to sleep",
        }[kind]
        return Blocked(wish.engine.name, kind, text, until_s, wish.command)

    def _no_host_ram(self, wish: Wish, pool: Sequence[Engine], host_free: HostBytes) -> Blocked:
        largest = max(pool, key=lambda e: e.host_bytes)
        left = max(0, left_for(largest, host_free))
        reason = (
            f"{reasons.names(e.name for e in pool)} would have to sleep, host RAM has {gib(left)} left "
            f"and {largest.name} needs {gib(largest.host_bytes)}: raise the budget, allow level 2, or stop a sleeper"
        )
        return Blocked(wish.engine.name, BlockKind.HOST_RAM, reason, None, wish.command)


def _may_sleep(engine: Engine) -> bool:
    """Whether a sleep of it surely frees all but its residue."""
    return engine.state is State.AWAKE and not engine.unified and engine.levels != (Level.PAUSE,)
