"""Reservations: engines kept awake once. Checked against what is promised, kept in the ledger, then in force."""

import asyncio
from datetime import datetime

from rotator.core.calendar import clashes
from rotator.core.values import EngineName
from rotator.crons import SPAN_MAX_S, instant, zone
from rotator.ports import Reservation
from rotator.service.calendar import Entry, as_window, moment
from rotator.service.loop import Loop
from rotator.service.operations import (
    CalendarView,
    EntryView,
    ReservationConflict,
    ReservationWrong,
    UnknownReservation,
)

PENDING_MAX = 1000
AHEAD_MAX_S = 366 * 86400.0
_LATE_S = 5.0  # a begin that was "now" when the request left


class Reservations:
    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._one_at_a_time = asyncio.Lock()  # two that were checked at once could both be taken

    # -- looking -----------------------------------------------------------------------------------------------------

    def calendar(self) -> CalendarView:
        """Windows in force and each one's next time, reservations, defaults."""
        keeper, config = self._loop.calendar, self._loop.calendar.config
        now = self._loop.wall_s()
        windows = [entry for entry in keeper.active() if not entry.id]
        for window, recurrence in config.recurrences:
            span = recurrence.next_after(now)
            if span is not None:
                where = window.timezone or config.timezone
                bounds = (span.begins_wall_s, span.ends_wall_s)
                windows.append(Entry(window.name, window.engines, *bounds, window.priority, where))
        windows.sort(key=lambda e: (e.begins_wall_s, e.name))
        return CalendarView(
            timezone=config.timezone,
            windows=tuple(self._view(e) for e in windows),
            reservations=self.reservations(),
            default_engines=config.default_engines,
            default_after_s=config.default_after_s,
        )

    def reservations(self) -> tuple[EntryView, ...]:
        """Those that have not ended, in the order of their begins."""
        entries = sorted(self._loop.calendar.reserved(), key=lambda e: (e.begins_wall_s, e.id))
        return tuple(self._view(e) for e in entries if e.ends_wall_s > self._loop.wall_s())

    def _view(self, entry: Entry) -> EntryView:
        keeper = self._loop.calendar
        return EntryView(
            id=entry.id or None,
            name=entry.name or None,
            engines=entry.engines,
            begins_wall_s=entry.begins_wall_s,
            ends_wall_s=entry.ends_wall_s,
            begins=moment(entry.begins_wall_s, entry.zone),
            ends=entry.until,
            priority=entry.priority,
            note=entry.note,
            in_force=keeper.in_force(entry),
            waived=keeper.waived(entry),
        )

    # -- changing ----------------------------------------------------------------------------------------------------

    async def reserve(
        self,
        engines: tuple[EngineName, ...],
        start: datetime | None,
        end: datetime | None,
        duration_s: float | None,
        priority: int,
        note: str,
    ) -> EntryView:
        """Raises ReservationWrong, ReservationConflict, LedgerError."""
        begins, ends = self._bounds(start, end, duration_s)
        async with self._one_at_a_time:
            self._refuse_conflict(Reservation(engines, begins, ends, priority, note))
            id = await self._loop.world.ledger.add_reservation(Reservation(engines, begins, ends, priority, note))
            made = Reservation(engines, begins, ends, priority, note, id)

            def keep() -> None:
                self._loop.calendar.add(made)
                self._loop.world.bus.publish("reservation.made", None, id=id, engines=engines, note=note)
                self._loop.tick()

            await self._loop.do(keep)
        return self._view(self._loop.calendar.entry(made))

    async def unreserve(self, id: int) -> EntryView:
        """Raises UnknownReservation, LedgerError."""
        made = self._loop.calendar.reservations.get(id)
        if made is None:
            known = ", ".join(map(str, sorted(self._loop.calendar.reservations))) or "none"
            raise UnknownReservation(f"there is no reservation {id}: there are {known}")
        view = self._view(self._loop.calendar.entry(made))
        await self._loop.world.ledger.drop_reservation(id)

        def forget() -> None:
            self._loop.calendar.remove(id)
            self._loop.world.bus.publish("reservation.dropped", None, id=id, engines=made.engines, note=made.note)
            self._loop.tick()

        await self._loop.do(forget)
        return view

    def _bounds(self, start: datetime | None, end: datetime | None, duration_s: float | None) -> tuple[float, float]:
        now = self._loop.wall_s()
        begins = now if start is None else self._instant(start)
        if (end is None) == (duration_s is None):
            raise ReservationWrong("end: give exactly one of 'end' and 'duration_s'")
        ends = begins + (duration_s or 0.0) if end is None else self._instant(end)
        zone_name = self._loop.calendar.config.timezone
        if begins < now - _LATE_S:
            raise ReservationWrong(f"start: {moment(begins, zone_name)} is past: it is {moment(now, zone_name)}")
        if ends <= begins:
            raise ReservationWrong(f"end: {moment(ends, zone_name)} is not after the start {moment(begins, zone_name)}")
        if ends - begins > SPAN_MAX_S:
            raise ReservationWrong(f"end: a reservation lasts at most {SPAN_MAX_S / 86400:.0f} days: pin the engine")
        if begins > now + AHEAD_MAX_S:
            raise ReservationWrong(f"start: at most {AHEAD_MAX_S / 86400:.0f} days ahead")
        return begins, ends

    def _instant(self, at: datetime) -> float:
        """A time without a zone is meant in the calendar's."""
        if at.tzinfo is not None:
            return at.timestamp()
        return instant(at, zone(self._loop.calendar.config.timezone))

    def _refuse_conflict(self, made: Reservation) -> None:
        """Against every other reservation, and windows that a higher priority does not overrule."""
        keeper, snapshot = self._loop.calendar, self._loop.snapshot()
        if len(keeper.reservations) >= PENDING_MAX:
            raise ReservationConflict(f"there are {PENDING_MAX} reservations already: drop one first")
        windows = [e for e in keeper.spans(made.begins_wall_s, made.ends_wall_s) if e.priority >= made.priority]
        others = [as_window(e) for e in (*keeper.reserved(), *windows)]
        new = as_window(keeper.entry(made))
        where = keeper.config.timezone
        found = next(clashes(snapshot.gpus, snapshot.engines, new, others), None)
        if found is not None:
            at_s, name, conflict = found
            text = self._loop.fleet.wording().text(conflict.text)
            raise ReservationConflict(f"{name} cannot be kept awake from {moment(at_s, where)}: {text}")
