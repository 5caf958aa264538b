"""One plan in the making: bringing an engine in, with whoever must yield for it, or saying why not."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cached_property

from rotator.core import reasons
from rotator.core.eviction import Option, cheapest, deepen_option, sleep_options, stop_option
from rotator.core.hostram import HostBytes, clipped, fits, free_of, least, left_for, spread
from rotator.core.ladder import Descent, relief
from rotator.core.placement import Room, gib, need
from rotator.core.policy import due_from_s, rivals_on
from rotator.core.turns import drain_s, due_in_s, served, stays_until_s
from rotator.core.values import (
    Action,
    Blocked,
    BlockKind,
    Command,
    Depth,
    Engine,
    EngineName,
    GpuId,
    Health,
    Level,
    Snapshot,
    State,
    Step,
    Swap,
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
class _Ahead:
    """A wish that waits for a turn to end and keeps no GPU closed."""

    gpus: frozenset[GpuId]
    most_bytes: int
    blocked: Blocked


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


class Planning:
    """One plan in the making.

    Every GPU takes part in one swap at most, so ``room`` is never updated: what a swap frees nobody else in this plan
    may take. Only host RAM is shared between swaps, and only ever taken.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self.swaps: list[Swap] = []
        self.blocked: list[Blocked] = []
        self._stayed: dict[GpuId, _Ahead] = {}
        self.turns: Sequence[Engine] = ()  # all that clients want, first turn first
        self.asked: set[EngineName] = set()  # whose wish was served or blocked already
        self.room = Room(snapshot.gpus, snapshot.engines.values())
        self.host_free_bytes = free_of(snapshot)
        self._least = min(self.room.most.values(), default=0)  # nobody who needs less can be hopeless anywhere
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

    # -- bringing an engine in ---------------------------------------------------------------------------------------

    def admit(
        self, wish: Wish, yielding: tuple[Option, ...] = (), forced: frozenset[str] = frozenset()
    ) -> Blocked | None:
        """Plan a swap that brings the wished engine in, or block the wish and say why.

        ``yielding`` make room in any case; those in ``forced`` with their streams aborted.
        """
        self.asked.add(wish.engine.name)
        blocked = self._out_of_question(wish, named=bool(yielding))
        if blocked is None:
            blocked = self._make_room(wish, yielding, forced)
        if blocked is not None:
            if blocked.kind is BlockKind.PINNED:
                blocked = self._by_calendar(blocked, wish.engine)
            self.block(blocked)
        return blocked

    def turned_away(self, engine: Engine) -> bool:
        """The common case of ``admit``, written out: a sleeper whose GPUs move or are kept for an earlier wish."""
        closed, gpus = self._closed, engine.gpus
        if engine.state is not State.ASLEEP or self._unfit or max(engine.awake_bytes) > self._least:
            return False
        for gpu in gpus:
            if gpu in closed:
                break
        else:
            return self._waits_behind(engine)
        self.asked.add(engine.name)
        self.blocked.append(Blocked(engine.name, BlockKind.BUSY, f"{gpu}: {closed[gpu]}"))
        kept = None
        for other in gpus:
            if other not in closed:
                kept = kept or f"kept for {engine.name}, whose turn comes first"
                closed[other] = kept
        return True

    def _waits_behind(self, engine: Engine) -> bool:
        """Whether a wish before it, on no more GPUs and of no more bytes, waits for a turn to end: then so does this
        one, which outweighs no turn that the other does not."""
        for index, gpu in enumerate(engine.gpus):
            ahead = self._stayed.get(gpu)
            if ahead is None or engine.awake_bytes[index] < ahead.most_bytes or not ahead.gpus.issubset(engine.gpus):
                continue
            if self._is_due(engine):
                return False
            self.asked.add(engine.name)
            reason = f"waits behind {ahead.blocked.engine}, which {ahead.blocked.reason}"
            self.blocked.append(Blocked(engine.name, BlockKind.STAY, reason, ahead.blocked.until_s))
            return True
        return False

    def _by_calendar(self, blocked: Blocked, engine: Engine) -> Blocked:
        """What is pinned by the calendar is in the way for a time that is known."""
        wanted = frozenset(engine.gpus)
        holders = [e for e in self._engines.values() if e.held_by and e is not engine and not wanted.isdisjoint(e.gpus)]
        if not holders:
            return blocked
        until_s = min((e.held_until_s for e in holders if e.held_until_s is not None), default=None)
        said = "; ".join(f"{e.name} is kept awake by {e.held_by}" for e in holders)
        return replace(blocked, kind=BlockKind.HELD, reason=f"{blocked.reason}; {said}", until_s=until_s)

    def _out_of_question(self, wish: Wish, named: bool) -> Blocked | None:
        """What blocks the wish whoever yields: first what lasts, so that a lasting obstacle never holds GPUs.

        ``named``: an operator named who yields, which may be a pinned engine.
        """
        engine = wish.engine
        if engine.state is State.ASLEEP:
            pass  # nothing in its own state forbids a wake
        elif engine.state is State.QUARANTINED:
            reason = f"{engine.name} is quarantined: look at its evidence, then release it"
            return Blocked(engine.name, BlockKind.QUARANTINED, reason, None, wish.command)
        elif engine.state is State.FAILED and engine.retry_at_s > self._now_s and wish.command is None:
            reason = f"{engine.name} failed and is tried again in {engine.retry_at_s - self._now_s:.1f} s"
            return Blocked(engine.name, BlockKind.BACKOFF, reason, engine.retry_at_s)
        if not self._unfit.isdisjoint(engine.gpus):
            return self._unhealthy(engine, wish.command, self._unfit)
        if max(engine.awake_bytes) > self._least:
            hopeless = self._hopeless(engine, wish.command)
            if hopeless is not None and not (named and hopeless.kind is BlockKind.PINNED):
                return hopeless
        return self._taken(engine, wish.command)

    def _hopeless(self, engine: Engine, command: Command | None) -> Blocked | None:
        most = self.room.most
        for index, (gpu, size) in enumerate(zip(engine.gpus, engine.awake_bytes, strict=True)):
            if size > most[gpu] and (hopeless := self.room.hopeless(engine, index)) is not None:
                kind, within = hopeless
                what = "with everything else gone" if kind is BlockKind.NEVER_FITS else "beside what is pinned"
                reason = f"{engine.name} needs {gib(size)} on {gpu} and could have {gib(max(0, within))} {what}"
                return Blocked(engine.name, kind, reason, None, command)
        return None

    def _unhealthy(self, engine: Engine, command: Command | None, bad: Set[GpuId]) -> Blocked:
        if bad is self._unfit and (gpu := next((g for g in engine.gpus if g in self._cordons), None)) is not None:
            why = f" ({self._cordons[gpu]})" if self._cordons[gpu] else ""  # it lasts, so it goes before what passes
            return Blocked(engine.name, BlockKind.CORDONED, f"{gpu} is cordoned{why}: uncordon it", None, command)
        gpu = next(gpu for gpu in engine.gpus if gpu in bad)
        reason = f"{gpu} cannot be read: nothing begins there until it can"
        return Blocked(engine.name, BlockKind.GPU_UNKNOWN, reason, None, command)

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

    def _make_room(self, wish: Wish, yielding: tuple[Option, ...], forced: frozenset[str]) -> Blocked | None:
        engine, free = wish.engine, self.room.free
        needed = need(engine, self.room.charged[engine.name])
        deficits: dict[GpuId, int] = {}
        for gpu, size in zip(engine.gpus, needed, strict=True):
            if size > free[gpu] and size > 0:
                lacking = size - free[gpu] - sum(o.frees.get(gpu, 0) for o in yielding)
                if lacking > 0:
                    deficits[gpu] = lacking
        chosen: tuple[Option, ...] = ()
        if deficits:
            host_free = self.host_free_bytes - sum(o.host_bytes for o in yielding)
            found = self._find_room(wish, deficits, frozenset(o.engine.name for o in yielding), host_free)
            if isinstance(found, Blocked):
                return found
            chosen = found
        self._commit_swap(wish, needed, yielding, chosen, forced)
        return None

    # -- who yields --------------------------------------------------------------------------------------------------

    def sleeps(
        self, engine: Engine, *, preferred_only: bool = False, wanted: Mapping[GpuId, int] | None = None
    ) -> list[Option]:
        """The ways in which an engine can sleep (deeper), the preferred one first."""
        charged = self.room.charged[engine.name]
        if engine.state is State.AWAKE:
            return sleep_options(engine, charged, self._policy, preferred_only=preferred_only, wanted=wanted)
        deeper = deepen_option(engine, charged, self._policy, wanted or {})
        return [] if deeper is None else [deeper]

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

    def _may_sink(self, engine: Engine) -> bool:
        return self._closed.keys().isdisjoint(engine.gpus) and self._unreadable.isdisjoint(engine.gpus)

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
            swapping=max([self._gpus[gpu].swapping for gpu in engine.gpus if gpu in self._gpus], default=0.0),
        )
        look_s = self._now_s + self._due_from_s - wish.demand.oldest_wait_s
        return min(ends_s, look_s) if look_s > self._now_s else ends_s

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

    # -- why not -----------------------------------------------------------------------------------------------------

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

    def _keep(self, waiting: Engine, gpus: Iterable[GpuId]) -> None:
        closed = self._closed
        for gpu in gpus:
            if gpu not in closed:
                closed[gpu] = f"kept for {waiting.name}, whose turn comes first"

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

    # -- into the plan -----------------------------------------------------------------------------------------------

    def block(self, blocked: Blocked) -> None:
        """Note that a wish is not served. For a reason that passes, its GPUs stay closed to later wishes."""
        self.blocked.append(blocked)
        engine = self._engines.get(blocked.engine)
        if engine is None:
            return
        if blocked.kind is BlockKind.BUSY or (blocked.kind is BlockKind.STAY and self._keeps_turn(engine)):
            self._keep(engine, engine.gpus)
        elif blocked.kind is BlockKind.STAY and blocked.command is None:
            ahead = _Ahead(frozenset(engine.gpus), max(engine.awake_bytes), blocked)
            for gpu in engine.gpus:
                known = self._stayed.get(gpu)
                if known is None or ahead.most_bytes < known.most_bytes:
                    self._stayed[gpu] = ahead

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

    def fits(self, engine: Engine) -> bool:
        """Whether it could come in without disturbing anybody, nor any wish that waits for the same GPUs."""
        gpus = frozenset(engine.gpus)
        if not gpus.isdisjoint(self._closed) or not gpus.isdisjoint(self._unfit):
            return False
        wanted = zip(engine.gpus, need(engine, self.room.charged[engine.name]), strict=True)
        if any(size > self.room.free[gpu] for gpu, size in wanted):
            return False
        waiting = (self._engines[b.engine] for b in self.blocked if b.engine in self._engines)
        return all(gpus.isdisjoint(other.gpus) for other in waiting)

    def sink(self, descent: Descent) -> None:
        """Let an engine go a rung down, unless something moves on its GPUs or they are kept for somebody."""
        engine = descent.option.engine
        if engine.name in self.asked or not self._may_sink(engine):
            return
        if not fits(descent.option.host_bytes, clipped(self.host_free_bytes)):
            return
        step = self._evict_step(descent.option, descent.why, force=False)
        self.host_free_bytes = least(self.host_free_bytes, self.host_free_bytes + descent.option.host_bytes)
        self._commit((step,), None, step.reason, None)

    def commit_alone(self, option: Option, command: Command) -> None:
        """Put an engine to sleep, or stop it, because an operator asked."""
        step = self._evict_step(option, reasons.wanted(option.engine, command), command.force)
        self._commit((step,), None, step.reason, command)

    def _commit_swap(
        self,
        wish: Wish,
        needed: tuple[int, ...],
        yielding: tuple[Option, ...],
        chosen: tuple[Option, ...],
        forced: frozenset[str],
    ) -> None:
        engine = wish.engine
        asleep = engine.state is State.ASLEEP
        who = wish.reason or reasons.wanted(engine, wish.command)
        reason = f"{who}; {reasons.needs(engine, needed, self.room.free)}"
        why = f"makes room for {engine.name}"
        host_free = self.host_free_bytes
        evict = [self._evict_step(o, f"{why}, as an operator asked", o.engine.name in forced) for o in yielding]
        rival = wish.engine if wish.by_clients else None
        # What a window freezes stands still for the whole of it: work in flight gets the longest time to finish.
        patient = bool(wish.reason) and not wish.preload
        evict += [self._evict_step(o, why, wish.force, rival, patient) for o in chosen]
        self.host_free_bytes = least(host_free, self.host_free_bytes)  # what is dropped for this swap is for this swap
        admit = Step(
            action=Action.WAKE if asleep else Action.START,
            engine=engine.name,
            reason=reason,
            expected_s=engine.wake_cost_s if asleep else engine.start_cost_s,
            bytes_per_gpu=tuple(zip(engine.gpus, needed, strict=True)),
        )
        whole = f"{reason}; {reasons.names(s.engine for s in evict)} must make room" if evict else reason
        self._commit(tuple(evict), admit, whole, wish.command, wish.ahead)

    def _evict_step(
        self, option: Option, why: str, force: bool, rival: Engine | None = None, patient: bool = False
    ) -> Step:
        """One engine's yielding, and the host RAM it takes. Expected: its drain and what its last sleep took."""
        engine, flying = option.engine, option.engine.demand.in_flight
        bound_s = 0.0 if force or option.action is Action.SINK else drain_s(engine, rival, self._policy)
        if patient and not force:
            bound_s = max(bound_s, self._policy.drain_max_s)
        step = Step(
            action=option.action,
            engine=engine.name,
            reason=reasons.yields(option, why, bound_s, self.host_free_bytes, force),
            level=option.level,
            force=force,
            drain_bound_s=bound_s,
            expected_s=(bound_s if flying else 0.0) + engine.sleep_cost_s,
            bytes_per_gpu=tuple((gpu, -size) for gpu, size in option.frees.items()),
            depth=option.depth,
        )
        self.host_free_bytes -= option.host_bytes
        return step

    def _commit(
        self, evict: tuple[Step, ...], admit: Step | None, reason: str, command: Command | None, ahead: bool = False
    ) -> None:
        names = [step.engine for step in (*evict, admit) if step is not None]
        gpus = frozenset(gpu for name in names for gpu in self._engines[name].gpus)
        phrase = f"a swap for {names[-1]} begins"
        for gpu in gpus:
            self._closed[gpu] = phrase
        expected_s = max((s.expected_s for s in evict), default=0.0) + (admit.expected_s if admit else 0.0)
        self.swaps.append(Swap(evict, admit, reason, gpus, expected_s, command, ahead))


def _may_sleep(engine: Engine) -> bool:
    """Whether a sleep of it surely frees all but its residue."""
    return engine.state is State.AWAKE and not engine.unified and engine.levels != (Level.PAUSE,)
