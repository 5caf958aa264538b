"""One plan in the making: bringing an engine in, with whoever must yield for it, or saying why not."""

from dataclasses import dataclass, replace

from rotator.core import reasons
from rotator.core.eviction import Option
from rotator.core.hostram import clipped, fits, least
from rotator.core.ladder import Descent
from rotator.core.placement import gib, need
from rotator.core.turns import drain_s
from rotator.core.values import (
    Action,
    Blocked,
    BlockKind,
    Command,
    Engine,
    EngineName,
    GpuId,
    Snapshot,
    State,
    Step,
    Swap,
)
from rotator.core.yielding import Wish, Yielding


@dataclass(frozen=True, slots=True)
class _Ahead:
    """A wish that waits for a turn to end and keeps no GPU closed."""

    gpus: frozenset[GpuId]
    most_bytes: int
    blocked: Blocked


class Planning(Yielding):
    """One plan in the making: what is decided so far, and what that leaves open."""

    def __init__(self, snapshot: Snapshot) -> None:
        super().__init__(snapshot)
        self.swaps: list[Swap] = []
        self.blocked: list[Blocked] = []
        self.asked: set[EngineName] = set()  # whose wish was served or blocked already
        self._stayed: dict[GpuId, _Ahead] = {}
        self._least = min(self.room.most.values(), default=0)  # nobody who needs less can be hopeless anywhere

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

    # -- into the plan -------------------------------------------------------------------------------------------------

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
