"""The calendar as it stands now: which windows and reservations are in force, when they begin and end, told as events.

Part of the loop's task: only the loop and what runs within its task calls what changes anything here. Cron lines and
zones become intervals on the loop's clock; what they ask for is decided by the planner (``core/calendar.py``).

A window in force is known by its name and begin. One that has begun does not begin again, and one in force stays so,
when the wall clock is set back a little; when the clock jumps over a whole window, that window is left out.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol

from rotator.config import FleetConfig
from rotator.config_calendar import CalendarConfig
from rotator.core import values
from rotator.core.values import EngineName
from rotator.crons import zone
from rotator.ports import Reservation

AHEAD_S = 24 * 3600.0  # the planner knows what begins within this
REFRESH_S = 12 * 3600.0
SET_BACK_MAX_S = 3600.0  # a clock that goes back further was wrong before: nothing that it said holds
_OVER_MAX = 1024


class Bus(Protocol):
    def publish(self, kind: str, engine: str | None = None, **data: Any) -> object: ...


class World(Protocol):
    @property
    def config(self) -> FleetConfig: ...

    @property
    def bus(self) -> Bus: ...


@dataclass(frozen=True, slots=True)
class Entry:
    """One time of a window, or a reservation. ``id`` is the reservation's, 0 for a window."""

    name: str
    engines: tuple[EngineName, ...]
    begins_wall_s: float
    ends_wall_s: float
    priority: int
    zone: str
    id: int = 0
    note: str = ""
    until: str = field(init=False, compare=False)  # its end in words: every plan shows it, and dates are slow

    def __post_init__(self) -> None:
        object.__setattr__(self, "until", moment(self.ends_wall_s, self.zone))

    @property
    def key(self) -> tuple[str, float]:
        """A reservation is one however its times are read; a window comes again."""
        return (f"r{self.id}", 0.0) if self.id else (self.name, self.begins_wall_s)

    @property
    def said(self) -> str:
        if not self.id:
            return f"window '{self.name}'"
        return f"reservation {self.id}" + (f" ({self.note})" if self.note else "")

    def window(self, begins_s: float, ends_s: float, engines: tuple[EngineName, ...]) -> values.Window:
        return values.Window(self.said, engines, begins_s, ends_s, self.priority, self.until)


def moment(at_wall_s: float, where: str) -> str:
    """A time for people, as clocks there show it."""
    return datetime.fromtimestamp(at_wall_s, zone(where)).strftime("%a %Y-%m-%d %H:%M %Z")


class Keeper:
    def __init__(self, world: World) -> None:
        self._world = world
        self._read: CalendarConfig | None = None  # the configuration that ``_entries`` were made from
        self._entries: tuple[Entry, ...] = ()
        self._refresh_at_wall_s = 0.0
        self._last_wall_s = float("-inf")
        self._active: dict[tuple[str, float], Entry] = {}
        self._over: dict[tuple[str, float], float] = {}  # what has ended, by its begin
        self._waived: set[tuple[tuple[str, float], EngineName]] = set()
        self._waived_defaults: set[EngineName] = set()
        self._released_s: dict[EngineName, float] = {}
        self.reservations: dict[int, Reservation] = {}

    @property
    def config(self) -> CalendarConfig:
        return self._world.config.calendar

    # -- reservations ------------------------------------------------------------------------------------------------

    def restore(self, kept: Iterable[Reservation]) -> None:
        self.reservations = {made.id: made for made in kept}
        self._refresh_at_wall_s = 0.0

    def add(self, made: Reservation) -> None:
        self.reservations[made.id] = made
        self._refresh_at_wall_s = 0.0

    def remove(self, id: int) -> None:
        self.reservations.pop(id, None)
        self._refresh_at_wall_s = 0.0

    # -- the clock ---------------------------------------------------------------------------------------------------

    def advance(self, now_s: float, now_wall_s: float) -> bool:
        """Let what is due begin and end. Whether anything did."""
        set_back = now_wall_s < self._last_wall_s - SET_BACK_MAX_S
        if set_back:
            self._over = {key: begun for key, begun in self._over.items() if begun <= now_wall_s}
        if set_back or self._read is not self.config or now_wall_s >= self._refresh_at_wall_s:
            self._refresh(now_wall_s)
        self._last_wall_s = now_wall_s if set_back else max(now_wall_s, self._last_wall_s)
        due = {e.key: e for e in self._entries if e.begins_wall_s <= now_wall_s < e.ends_wall_s}
        changed = False
        for key, entry in tuple(self._active.items()):
            if key in due:
                self._active[key] = due[key]
            elif (why := self._ended(entry, now_wall_s)) is not None:
                self._end(entry, now_s, why, is_over=now_wall_s >= entry.ends_wall_s)
                changed = True
        for key, entry in due.items():
            if key not in self._active and key not in self._over:
                self._active[key] = entry
                self._tell("calendar.begun", entry, until=entry.until)
                changed = True
        return changed

    def is_due(self, now_wall_s: float) -> bool:
        """Whether ``advance`` would change anything."""
        if self._read is not self.config or now_wall_s < self._last_wall_s - SET_BACK_MAX_S:
            return True
        if any(now_wall_s >= e.ends_wall_s for e in self._active.values()):
            return True
        return now_wall_s >= self._refresh_at_wall_s or any(
            e.begins_wall_s <= now_wall_s < e.ends_wall_s and e.key not in self._active and e.key not in self._over
            for e in self._entries
        )

    def _ended(self, entry: Entry, now_wall_s: float) -> str | None:
        """Why an entry that was in force is so no longer; None where the clock was only set back a little."""
        if now_wall_s >= entry.ends_wall_s:
            return "its time is over"
        if entry.id not in self.reservations if entry.id else not self._is_configured(entry):
            return "it was taken back"
        if now_wall_s < entry.begins_wall_s - SET_BACK_MAX_S:
            return "the clock was set back: its time has not come"
        return None if now_wall_s < entry.begins_wall_s else "its times were changed"

    def _is_configured(self, entry: Entry) -> bool:
        return any(window.name == entry.name for window in self.config.windows)

    def _end(self, entry: Entry, now_s: float, why: str, *, is_over: bool) -> None:
        del self._active[entry.key]
        self._waived = {(key, name) for key, name in self._waived if key != entry.key}
        if is_over:
            self._over[entry.key] = entry.begins_wall_s
            while len(self._over) > _OVER_MAX:
                del self._over[next(iter(self._over))]
            if entry.id:
                self.reservations.pop(entry.id, None)
        for name in entry.engines:
            if not any(name in other.engines for other in self._active.values()):
                self._released_s[name] = now_s
        self._tell("calendar.ended", entry, reason=why)

    def _tell(self, kind: str, entry: Entry, **data: Any) -> None:
        self._world.bus.publish(
            kind, entry.engines[0] if len(entry.engines) == 1 else None, entry=entry.said, engines=entry.engines, **data
        )

    def _refresh(self, now_wall_s: float) -> None:
        config = self._read = self.config
        self._entries = (*self.spans(now_wall_s, now_wall_s + AHEAD_S), *self.reserved())
        self._refresh_at_wall_s = now_wall_s + REFRESH_S
        names = {name for window in config.windows for name in window.engines} | set(config.default_engines)
        names |= {name for made in self.reservations.values() for name in made.engines}
        self._released_s = {name: at_s for name, at_s in self._released_s.items() if name in names}

    # -- what it holds -----------------------------------------------------------------------------------------------

    def spans(self, from_wall_s: float, until_wall_s: float) -> tuple[Entry, ...]:
        """Every time of a window that lasts at some moment within the bounds."""
        return tuple(
            Entry(
                window.name,
                window.engines,
                span.begins_wall_s,
                span.ends_wall_s,
                window.priority,
                window.timezone or self.config.timezone,
            )
            for window, recurrence in self.config.recurrences
            for span in recurrence.spans(from_wall_s, until_wall_s)
        )

    def reserved(self) -> tuple[Entry, ...]:
        return tuple(self.entry(made) for made in self.reservations.values())

    def entry(self, made: Reservation) -> Entry:
        bounds = (made.begins_wall_s, made.ends_wall_s)
        return Entry("", made.engines, *bounds, made.priority, self.config.timezone, made.id, made.note)

    def active(self) -> tuple[Entry, ...]:
        return tuple(self._active.values())

    def in_force(self, entry: Entry) -> bool:
        return entry.key in self._active

    def hold(self, engine: EngineName) -> Entry | None:
        """What is in force for the engine, that which lasts longest. Whether it is overruled is in the plan."""
        held = [entry for entry in self._active.values() if engine in self._held(entry)]
        return max(held, key=lambda entry: entry.ends_wall_s, default=None)

    def waived(self, entry: Entry) -> tuple[EngineName, ...]:
        """Engines of the entry that an operator put away while it lasts."""
        return tuple(name for name in entry.engines if (entry.key, name) in self._waived)

    def wants(self, engine: EngineName) -> bool:
        """Whether a wake of the engine is still wanted by the calendar."""
        return engine in self._defaults() or any(engine in self._held(e) for e in self._active.values())

    def snapshot(self, now_s: float, now_wall_s: float) -> values.Calendar:
        """What the planner sees, on the loop's clock."""
        if not self._entries and not self.config.default_engines:
            return _EMPTY
        ahead_s = now_s - now_wall_s
        windows = []
        for entry in self._active.values():
            begins_s = min(now_s, entry.begins_wall_s + ahead_s)
            windows.append(entry.window(begins_s, entry.ends_wall_s + ahead_s, self._held(entry)))
        windows += [
            entry.window(entry.begins_wall_s + ahead_s, entry.ends_wall_s + ahead_s, entry.engines)
            for entry in self._entries
            if entry.key not in self._active and entry.key not in self._over and entry.begins_wall_s > now_wall_s
        ]
        after_s = self.config.default_after_s
        return values.Calendar(tuple(windows), self._defaults(), after_s, dict(self._released_s))

    def _held(self, entry: Entry) -> tuple[EngineName, ...]:
        return tuple(name for name in entry.engines if (entry.key, name) not in self._waived)

    def _defaults(self) -> tuple[EngineName, ...]:
        return tuple(name for name in self.config.default_engines if name not in self._waived_defaults)

    # -- operators ---------------------------------------------------------------------------------------------------

    def waive(self, engine: EngineName) -> None:
        """An operator puts the engine away: the later word. What holds it now lets go of it until its end; as a default
        it stays away until it is next awake."""
        for entry in self._active.values():
            if engine in self._held(entry):
                self._waived.add((entry.key, engine))
                self._world.bus.publish("calendar.waived", engine, entry=entry.said, reason="an operator put it away")
        if engine in self.config.default_engines:
            self._waived_defaults.add(engine)

    def unwaive(self, engine: EngineName) -> None:
        """An operator wants it back."""
        self._waived = {(key, name) for key, name in self._waived if name != engine}
        self.woke(engine)

    def woke(self, engine: EngineName) -> None:
        self._waived_defaults.discard(engine)


_EMPTY = values.Calendar()


def as_window(entry: Entry) -> values.Window:
    """The entry on the wall clock: for questions about other times than now."""
    return entry.window(entry.begins_wall_s, entry.ends_wall_s, entry.engines)
