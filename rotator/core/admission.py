"""One plan in the making: bringing an engine in, with whoever must yield for it, or saying why not."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rotator.core import reasons
from rotator.core.eviction import Option, cheapest, covers, sleep_options, stop_option
from rotator.core.lifecycle import is_moving
from rotator.core.placement import Room, gib, need
from rotator.core.values import (
    Action,
    Blocked,
    BlockKind,
    Command,
    Engine,
    EngineName,
    GpuId,
    Health,
    Snapshot,
    State,
    Step,
    Swap,
)

PASSING = frozenset({BlockKind.BUSY, BlockKind.STAY})
"""What passes by itself. A wish blocked by one of these keeps its GPUs closed to later wishes."""


@dataclass(frozen=True, slots=True)
class Wish:
    """An engine to be brought in, and on whose account."""

    engine: Engine
    command: Command | None = None
    preload: bool = False

    @property
    def force(self) -> bool:
        return self.command is not None and self.command.force


@dataclass(frozen=True, slots=True)
class _Hurdle:
    """Why an engine that is in the way may not be asked to yield now."""

    kind: BlockKind
    until_s: float | None = None


class Planning:
    """One plan in the making.

    Every GPU takes part in one swap at most, so ``room`` is never updated: what a swap frees nobody else in this plan
    may take. Only host RAM is shared between swaps, and only ever taken.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self.swaps: list[Swap] = []
        self.blocked: list[Blocked] = []
        self.asked: set[EngineName] = set()  # whose wish was served or blocked already
        self.room = Room(snapshot.gpus, snapshot.engines.values())
        self.host_free_bytes = snapshot.host_budget_bytes - snapshot.host_used_bytes
        self._now_s = snapshot.now_s
        self._gpus = snapshot.gpus
        self._engines = snapshot.engines
        self._policy = snapshot.policy
        self._closed: dict[GpuId, str] = dict.fromkeys(snapshot.claimed, "a transition is under way")
        for engine in snapshot.engines.values():
            if is_moving(engine.state):
                self._closed.update(dict.fromkeys(engine.gpus, f"{engine.name} is {engine.state.value}"))

    # -- bringing an engine in ---------------------------------------------------------------------------------------

    def admit(
        self, wish: Wish, yielding: tuple[Option, ...] = (), forced: frozenset[str] = frozenset()
    ) -> Blocked | None:
        """Plan a swap that brings the wished engine in, or block the wish and say why.

        ``yielding`` make room in any case; those in ``forced`` with their streams aborted.
        """
        self.asked.add(wish.engine.name)
        blocked = self._out_of_question(wish)
        if blocked is None:
            blocked = self._make_room(wish, yielding, forced)
        if blocked is not None:
            self.block(blocked)
        return blocked

    def _out_of_question(self, wish: Wish) -> Blocked | None:
        """What blocks the wish whoever yields: first what lasts, so that a lasting obstacle never holds GPUs."""
        engine = wish.engine
        if engine.state is State.QUARANTINED:
            reason = f"{engine.name} is quarantined: look at its evidence, then release it"
            return Blocked(engine.name, BlockKind.QUARANTINED, reason, None, wish.command)
        if engine.state is State.FAILED and engine.retry_at_s > self._now_s and wish.command is None:
            reason = f"{engine.name} failed and is tried again in {engine.retry_at_s - self._now_s:.1f} s"
            return Blocked(engine.name, BlockKind.BACKOFF, reason, engine.retry_at_s)
        most = self.room.most
        for index, (gpu, size) in enumerate(zip(engine.gpus, engine.awake_bytes, strict=True)):
            known = self._gpus.get(gpu)
            if known is None or known.health is not Health.OK:
                return self._unhealthy(engine, gpu, wish.command)
            if size > most[gpu] and (hopeless := self.room.hopeless(engine, index)) is not None:
                kind, within = hopeless
                what = "with everything else gone" if kind is BlockKind.NEVER_FITS else "beside what is pinned"
                reason = f"{engine.name} needs {gib(size)} on {gpu} and could have {gib(max(0, within))} {what}"
                return Blocked(engine.name, kind, reason, None, wish.command)
        return self.shut(engine, wish.command)

    def _unhealthy(self, engine: Engine, gpu: GpuId, command: Command | None) -> Blocked:
        if gpu in self._gpus and self._gpus[gpu].health is Health.CORDONED:
            return Blocked(engine.name, BlockKind.CORDONED, f"{gpu} is cordoned: uncordon it", None, command)
        reason = f"{gpu} cannot be read: nothing begins there until it can"
        return Blocked(engine.name, BlockKind.GPU_UNKNOWN, reason, None, command)

    def shut(self, engine: Engine, command: Command | None) -> Blocked | None:
        """Whether a GPU of the engine cannot be read, moves, is in a swap of this plan, or kept for an earlier wish."""
        closed = self._closed
        for gpu in engine.gpus:
            if gpu not in self._gpus or self._gpus[gpu].health is Health.UNKNOWN:
                return self._unhealthy(engine, gpu, command)
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

    def sleeps(self, engine: Engine) -> list[Option]:
        """The ways in which an awake engine can sleep, the preferred one first."""
        return sleep_options(engine, self.room.charged[engine.name], self._policy)

    def _find_room(
        self, wish: Wish, deficits: dict[GpuId, int], besides: frozenset[str], host_free: int
    ) -> tuple[Option, ...] | Blocked:
        """The cheapest engines to yield: by sleeping if that can do, else with stops among them."""
        free_to_go: list[Engine] = []
        in_the_way: list[tuple[_Hurdle, Engine]] = []
        for engine in self._residents(deficits):
            if engine is wish.engine or engine.name in besides:
                continue
            hurdle = self._hurdle(engine, wish)
            if hurdle is None:
                free_to_go.append(engine)
            else:
                in_the_way.append((hurdle, engine))
        chosen = self._choose(deficits, free_to_go, host_free)
        return self._why_not(wish, deficits, free_to_go, in_the_way, host_free) if chosen is None else chosen

    def _residents(self, deficits: Iterable[GpuId]) -> Iterable[Engine]:
        """Awake and sleeping engines on these GPUs, each once."""
        found: dict[str, Engine] = {}
        for gpu in deficits:
            for engine in self.room.residents[gpu]:
                if engine.state is State.AWAKE or engine.state is State.ASLEEP:
                    found[engine.name] = engine
        return found.values()

    def _hurdle(self, engine: Engine, wish: Wish) -> _Hurdle | None:
        """What forbids to ask the engine now; what lasts comes first."""
        demand, awake = engine.demand, engine.state is State.AWAKE
        if engine.pinned or not (awake or engine.can_stop):
            return _Hurdle(BlockKind.PINNED)
        for gpu in engine.gpus:
            if gpu not in self._gpus or self._gpus[gpu].health is Health.UNKNOWN:
                return _Hurdle(BlockKind.GPU_UNKNOWN)
        if not wish.force:
            if (demand.in_flight and not engine.can_freeze) if awake else (demand.in_flight or demand.frozen):
                return _Hurdle(BlockKind.UNFREEZABLE)
            if awake and (demand.in_flight or demand.waiting):
                stays_until_s = engine.awake_since_s + self._policy.min_stay_s
                if wish.preload:
                    return _Hurdle(BlockKind.BUSY)
                if self._now_s < stays_until_s:
                    return _Hurdle(BlockKind.STAY, stays_until_s)
        return None if self._closed.keys().isdisjoint(engine.gpus) else _Hurdle(BlockKind.BUSY)

    def _choose(
        self, deficits: dict[GpuId, int], engines: Sequence[Engine], host_free: int
    ) -> tuple[Option, ...] | None:
        """By sleeps, with a stop only for who has no level to sleep at; if that cannot do, by sleeps and any stops."""
        charged, policy, gentle, rough = self.room.charged, self._policy, [], []
        for engine in engines:
            awake = engine.state is State.AWAKE
            sleeps = self.sleeps(engine) if awake else []
            stops: list[Option] = []
            if engine.can_stop:
                at_least_s = sleeps[-1].cost_s if sleeps else 0.0
                stops = [stop_option(engine, charged[engine.name], policy, at_least_s)]
            can_sleep = any(o.host_bytes <= max(0, host_free) for o in sleeps)
            gentle.append(sleeps if can_sleep or not awake else sleeps + stops)
            rough.append(sleeps + stops)
        chosen = cheapest(deficits, gentle, host_free)
        return cheapest(deficits, rough, host_free) if chosen is None else chosen

    def _covers(self, deficits: dict[GpuId, int], engines: Iterable[Engine]) -> bool:
        """Whether these engines hold enough, if host RAM were no matter."""
        charged = self.room.charged
        return covers(
            deficits,
            [
                [*self.sleeps(e), *([stop_option(e, charged[e.name], self._policy)] if e.can_stop else [])]
                for e in engines
            ],
        )

    # -- why not -----------------------------------------------------------------------------------------------------

    def _why_not(
        self,
        wish: Wish,
        deficits: dict[GpuId, int],
        free_to_go: Sequence[Engine],
        in_the_way: Sequence[tuple[_Hurdle, Engine]],
        host_free: int,
    ) -> Blocked:
        """Lift the hurdles one after another, the soonest to pass first: the one that makes room is the reason."""
        pool = list(free_to_go)
        for kind in (BlockKind.BUSY, BlockKind.STAY, BlockKind.UNFREEZABLE):
            group = [(h, e) for h, e in in_the_way if h.kind is kind]
            for hurdle, engine in sorted(group, key=lambda item: (item[0].until_s or 0.0, item[1].name)):
                pool.append(engine)
                if self._choose(deficits, pool, host_free) is not None:
                    if kind in PASSING:
                        self._keep_ways(wish.engine, deficits, free_to_go, in_the_way)
                    return self._waits_for(wish, kind, engine, hurdle.until_s)
        if self._covers(deficits, pool):
            return self._no_host_ram(wish, pool, host_free)
        for kind in (BlockKind.GPU_UNKNOWN, BlockKind.PINNED):
            group = [(h, e) for h, e in in_the_way if h.kind is kind]
            pool.extend(e for _, e in group)
            if group and self._covers(deficits, pool):
                return self._waits_for(wish, kind, group[0][1], None)
        gpu, lacking = max(deficits.items(), key=lambda item: item[1])
        reason = f"{wish.engine.name} lacks {gib(lacking)} on {gpu} even if all others yielded"
        return Blocked(wish.engine.name, BlockKind.NEVER_FITS, reason, None, wish.command)

    def _keep_ways(
        self,
        waiting: Engine,
        deficits: dict[GpuId, int],
        free_to_go: Sequence[Engine],
        in_the_way: Sequence[tuple[_Hurdle, Engine]],
    ) -> None:
        """Close the GPUs of all who may have to yield: else swaps elsewhere on them could make them busy for ever."""
        ways = [*free_to_go, *(e for h, e in in_the_way if h.kind in PASSING)]
        awake = [e for e in ways if e.state is State.AWAKE]
        by_sleep = covers(deficits, [self.sleeps(e) for e in awake])
        for engine in awake if by_sleep else ways:
            self._keep(waiting, engine.gpus)

    def _keep(self, waiting: Engine, gpus: Iterable[GpuId]) -> None:
        phrase = f"kept for {waiting.name}, whose turn comes first"
        for gpu in gpus:
            self._closed.setdefault(gpu, phrase)

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

    def _no_host_ram(self, wish: Wish, pool: Sequence[Engine], host_free: int) -> Blocked:
        largest = max(pool, key=lambda e: e.host_bytes)
        reason = (
            f"{reasons.names(e.name for e in pool)} would have to sleep, host RAM has {gib(max(0, host_free))} left "
            f"and {largest.name} needs {gib(largest.host_bytes)}: raise the budget, allow level 2, or stop a sleeper"
        )
        return Blocked(wish.engine.name, BlockKind.HOST_RAM, reason, None, wish.command)

    # -- into the plan -----------------------------------------------------------------------------------------------

    def block(self, blocked: Blocked) -> None:
        """Note that a wish is not served. For a reason that passes, its GPUs stay closed to later wishes."""
        self.blocked.append(blocked)
        if blocked.kind in PASSING and blocked.engine in self._engines:
            engine = self._engines[blocked.engine]
            self._keep(engine, engine.gpus)

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
        reason = f"{reasons.wanted(engine, wish.command)}; {reasons.needs(engine, needed, self.room.free)}"
        evict = []
        for option in (*yielding, *chosen):
            commanded = option not in chosen
            why = f"makes room for {engine.name}{', as an operator asked' if commanded else ''}"
            force = option.engine.name in forced if commanded else wish.force
            evict.append(self._evict_step(option, why, force))
        admit = Step(
            action=Action.WAKE if asleep else Action.START,
            engine=engine.name,
            reason=reason,
            expected_s=engine.wake_cost_s if asleep else engine.start_cost_s,
            bytes_per_gpu=tuple(zip(engine.gpus, needed, strict=True)),
        )
        whole = f"{reason}; {reasons.names(s.engine for s in evict)} must make room" if evict else reason
        self._commit(tuple(evict), admit, whole, wish.command)

    def _evict_step(self, option: Option, why: str, force: bool) -> Step:
        """One engine's yielding, and the host RAM it takes. Expected: its drain and what its last sleep took."""
        engine = option.engine
        drain_s = self._policy.drain_bound_s if engine.demand.in_flight and not force else 0.0
        step = Step(
            action=option.action,
            engine=engine.name,
            reason=reasons.yields(option, why, self._policy, self.host_free_bytes, force),
            level=option.level,
            force=force,
            drain_bound_s=0.0 if force else self._policy.drain_bound_s,
            expected_s=drain_s + engine.sleep_cost_s,
            bytes_per_gpu=tuple((gpu, -size) for gpu, size in option.frees.items()),
        )
        self.host_free_bytes -= option.host_bytes
        return step

    def _commit(self, evict: tuple[Step, ...], admit: Step | None, reason: str, command: Command | None) -> None:
        names = [step.engine for step in (*evict, admit) if step is not None]
        gpus = frozenset(gpu for name in names for gpu in self._engines[name].gpus)
        phrase = f"a swap for {names[-1]} begins"
        for gpu in gpus:
            self._closed[gpu] = phrase
        expected_s = max((s.expected_s for s in evict), default=0.0) + (admit.expected_s if admit else 0.0)
        self.swaps.append(Swap(evict, admit, reason, gpus, expected_s, command))
