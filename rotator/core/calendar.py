"""What the calendar asks for now: who is kept awake, who is overruled by whom, and which default engine comes back.

Windows come as intervals on the snapshot's clock, and their ends in words: zones, crons and clocks are the caller's
business. A window pins its engines as long as it lasts and calls those that are not awake; its calls go through the
planner like any wish, so nobody's stream is ever aborted for one. Windows that do not fit together are served by
priority, then the one that began first; the others are told what is in their way.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from rotator.core.lifecycle import is_moving
from rotator.core.placement import Room, gib, need
from rotator.core.values import (
    Blocked,
    BlockKind,
    Calendar,
    Engine,
    EngineName,
    Gpu,
    GpuId,
    Snapshot,
    State,
    Window,
)


@dataclass(frozen=True, slots=True)
class Hold:
    """One engine that the calendar keeps awake. ``by`` is for people: which entry, and until when."""

    engine: EngineName
    by: str
    until_s: float


@dataclass(frozen=True, slots=True)
class Call:
    """An engine that the calendar wants awake and that is not."""

    engine: EngineName
    reason: str


@dataclass(frozen=True, slots=True)
class Schedule:
    """``calls`` are for held engines and take their turn before clients; ``defaults`` come last and disturb nobody."""

    held: Mapping[EngineName, Hold] = field(default_factory=dict)
    calls: tuple[Call, ...] = ()
    defaults: tuple[Call, ...] = ()
    overruled: tuple[Blocked, ...] = ()
    look_again_at_s: float | None = None


NOTHING = Schedule()


def resolve(snapshot: Snapshot) -> Schedule:
    """What the calendar asks for at ``snapshot.now_s``. The same snapshot gives the same schedule; costs nothing where
    there is neither a window nor a default."""
    calendar, now_s = snapshot.calendar, snapshot.now_s
    if not calendar.windows and not calendar.defaults:
        return NOTHING
    bookings = Bookings(snapshot.gpus, snapshot.engines.values())
    held: dict[EngineName, Hold] = {}
    overruled: list[Blocked] = []
    for window in in_force(calendar.windows, now_s):
        for name in window.engines:
            engine = snapshot.engines.get(name)
            if engine is None:
                continue
            conflict = None if name in held else bookings.book(engine, window)
            if conflict is None:
                held[name] = _later(held.get(name), Hold(name, said(window), window.ends_s))
            else:
                reason = f"{said(window)} wants {name} awake: {conflict.text}"
                overruled.append(Blocked(name, BlockKind.HELD, reason, conflict.until_s))
    calls = tuple(
        Call(name, f"{hold.by} keeps {name} awake")
        for name, hold in held.items()
        if snapshot.engines[name].state is not State.AWAKE and not is_moving(snapshot.engines[name].state)
    )
    defaults, rested_s = _defaults(snapshot, held)
    times = [t for w in calendar.windows for t in (w.begins_s, w.ends_s) if t > now_s]
    return Schedule(held, calls, defaults, tuple(overruled), min([*times, *rested_s], default=None))


def applied(snapshot: Snapshot, schedule: Schedule) -> Snapshot:
    """The snapshot with the held engines pinned, and marked with who holds them."""
    if not schedule.held:
        return snapshot
    marked = {
        name: replace(snapshot.engines[name], pinned=True, held_by=hold.by, held_until_s=hold.until_s)
        for name, hold in schedule.held.items()
    }
    return replace(snapshot, engines={**snapshot.engines, **marked})


def in_force(windows: Iterable[Window], now_s: float) -> list[Window]:
    """Windows that last now, in the order in which they are served."""
    now = (w for w in windows if w.begins_s <= now_s < w.ends_s)
    return sorted(now, key=lambda w: (-w.priority, w.begins_s, w.name))


def said(window: Window) -> str:
    return f"{window.name} (until {window.until})" if window.until else window.name


def _later(old: Hold | None, new: Hold) -> Hold:
    return new if old is None or new.until_s > old.until_s else old


# -- what fits together ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Conflict:
    """Why an engine cannot be awake beside those that are booked. ``until_s`` is when the first of them ends."""

    text: str
    until_s: float | None
    others: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Booking:
    engine: EngineName
    bytes: int
    why: str
    until_s: float | None


class Bookings:
    """Bytes that are spoken for on each GPU: by pinned engines, by what cannot leave, and by windows.

    Judged by footprints against what a GPU has less its reserve. What is foreign now may be gone when it matters: that
    is left to the plan of that moment.
    """

    def __init__(self, gpus: Mapping[GpuId, Gpu], engines: Iterable[Engine]) -> None:
        self._room = {id: gpu.total_bytes - gpu.reserve_bytes for id, gpu in gpus.items()}
        self._booked: dict[GpuId, list[_Booking]] = {id: [] for id in gpus}
        for engine in engines:
            if engine.pinned:
                self._add(engine, engine.awake_bytes, "is pinned", None)
            elif not engine.can_stop:
                self._add(engine, engine.residue_bytes, "is attached and keeps that asleep", None)

    def book(self, engine: Engine, window: Window) -> Conflict | None:
        """Take the engine's bytes for the window, or say what they collide with."""
        for gpu, size in zip(engine.gpus, engine.awake_bytes, strict=True):
            others = [b for b in self._booked.get(gpu, ()) if b.engine != engine.name]
            taken = sum(b.bytes for b in others)
            if size + taken > self._room.get(gpu, 0):
                return self._conflict(gpu, size, others)
        self._add(engine, engine.awake_bytes, f"is kept awake by {said(window)}", window.ends_s)
        return None

    def _add(self, engine: Engine, sizes: tuple[int, ...], why: str, until_s: float | None) -> None:
        for gpu, size in zip(engine.gpus, sizes, strict=True):
            if gpu in self._booked:
                kept = [b for b in self._booked[gpu] if b.engine != engine.name]
                self._booked[gpu] = [*kept, _Booking(engine.name, size, why, until_s)]

    def _conflict(self, gpu: GpuId, size: int, others: list[_Booking]) -> Conflict:
        room = self._room.get(gpu, 0)
        what = "; ".join(f"{b.engine} {b.why} with {gib(b.bytes)}" for b in others)
        text = f"it needs {gib(size)} on {gpu}, which has {gib(room)}" + (f", where {what}" if what else "")
        until_s = min((b.until_s for b in others if b.until_s is not None), default=None)
        return Conflict(text, until_s, tuple(b.engine for b in others))


def collisions(
    gpus: Mapping[GpuId, Gpu], engines: Mapping[EngineName, Engine], windows: Iterable[Window]
) -> Iterator[tuple[float, Window, EngineName, Conflict]]:
    """Every moment at which a window begins whose engine does not fit beside those in force: when, which window, which
    engine, with what. In order of time; a window's engine is told once a moment."""
    every = tuple(windows)
    for at_s in sorted({w.begins_s for w in every}):
        bookings, held = Bookings(gpus, engines.values()), set[EngineName]()
        for window in in_force(every, at_s):
            for name in window.engines:
                if name not in engines or name in held:
                    continue
                conflict = bookings.book(engines[name], window)
                if conflict is None:
                    held.add(name)
                else:
                    yield at_s, window, name, conflict


def clashes(
    gpus: Mapping[GpuId, Gpu], engines: Mapping[EngineName, Engine], new: Window, others: Iterable[Window]
) -> Iterator[tuple[float, EngineName, Conflict]]:
    """Moments at which an engine of the ``new`` window would not fit beside all the others, which come first."""
    around = tuple(w for w in others if w.begins_s < new.ends_s and w.ends_s > new.begins_s)
    for at_s in sorted({max(w.begins_s, new.begins_s) for w in (*around, new)}):
        bookings = Bookings(gpus, engines.values())
        for window in in_force(around, at_s):
            for name in window.engines:
                if name in engines:
                    bookings.book(engines[name], window)
        for name in new.engines:
            conflict = bookings.book(engines[name], new)
            if conflict is not None:
                yield at_s, name, conflict


# -- default engines -------------------------------------------------------------------------------------------------


def _defaults(snapshot: Snapshot, held: Mapping[EngineName, Hold]) -> tuple[tuple[Call, ...], list[float]]:
    """Defaults that may come back now, and when others may, as far as time alone decides it."""
    asleep = [
        engine
        for engine in (snapshot.engines.get(name) for name in snapshot.calendar.defaults)
        if engine and engine.name not in held and engine.state in (State.ASLEEP, State.STOPPED, State.FAILED)
    ]
    if not asleep:
        return (), []
    room = Room(snapshot.gpus, snapshot.engines.values())
    due: list[Call] = []
    rested_s: list[float] = []
    for engine in asleep:
        at_s, why = _free_for(engine, snapshot, held, room)
        if at_s is not None and at_s <= snapshot.now_s:
            due.append(Call(engine.name, f"{engine.name} is the default engine and {why}"))
        elif at_s is not None:
            rested_s.append(at_s)
    return tuple(due), rested_s


def _free_for(
    engine: Engine, snapshot: Snapshot, held: Mapping[EngineName, Hold], room: Room
) -> tuple[float | None, str]:
    """When the default may have its GPUs without disturbing anybody, and why; None: time alone does not bring it."""
    wanted = zip(engine.gpus, need(engine, room.charged[engine.name]), strict=True)
    if all(size <= room.free[gpu] for gpu, size in wanted):
        return snapshot.now_s, "there is room for it"
    others = {e.name: e for gpu in engine.gpus for e in room.awake[gpu]}
    at_s, why = snapshot.now_s, "nobody uses its GPUs"
    for other in others.values():
        if other.pinned or other.name in held or other.name in snapshot.calendar.defaults:
            continue  # it stays: whether there is room beside it is for the planner to say
        if other.demand.waiting or other.demand.in_flight:
            return None, ""
        rested = _rested_at_s(other, snapshot.calendar)
        if rested is None:
            return None, ""
        at_s = max(at_s, rested)
        why = f"{other.name} has not been used since its time ended or for long enough"
    return at_s, why


def _rested_at_s(engine: Engine, calendar: Calendar) -> float | None:
    """When an idle engine has been idle for long enough: at once if its window ended after it was last used."""
    used_s = engine.demand.last_used_s
    released_s = calendar.released_s.get(engine.name)
    if released_s is not None and released_s >= max(used_s, engine.awake_since_s):
        return released_s
    if calendar.default_after_s is None:
        return None
    return max(used_s, engine.awake_since_s) + calendar.default_after_s
