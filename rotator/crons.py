"""Cron lines as wall time in a zone, and the spans of time that they begin and end.

APScheduler's CronTrigger reads and evaluates the lines, in a calendar without zones: which wall times match. What such
a time means as an instant is decided here, so that each counts once: one that the clocks jump over in spring means the
end of the jump, and of one that they show twice in autumn the first counts.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from apscheduler.triggers.cron import CronTrigger

SPAN_MAX_S = 31 * 86400.0  # no span lasts longer: it bounds how far back one is looked for
BEGINS_A_DAY_MAX = 24
_FIELDS = ("minute", "hour", "day", "month", "day_of_week")
_SEARCH = timedelta(days=8 * 366)  # a 29th of February comes within that
_NAMES = "sun mon tue wed thu fri sat"


@dataclass(frozen=True, slots=True)
class Span:
    """From ``begins_wall_s`` until just before ``ends_wall_s``, Unix seconds."""

    begins_wall_s: float
    ends_wall_s: float


class Cron:
    """Five fields: minute, hour, day of month, month, day of week. Raises ValueError that says what to write."""

    def __init__(self, line: str) -> None:
        self.line = line
        words = line.split()
        if len(words) != len(_FIELDS):
            raise ValueError(
                f"'{line}' has {len(words)} fields: write minute hour day month weekday, e.g. '0 22 * * mon-fri'"
            )
        if any(c.isdigit() for c in words[4]):
            raise ValueError(
                f"'{line}': write weekdays by name ({_NAMES.replace(' ', ', ')}): a number means another day elsewhere"
            )
        self._fields = dict(zip(_FIELDS, (w.lower() for w in words), strict=True))
        try:
            self._trigger(None)
        except ValueError as e:
            raise ValueError(f"'{line}' is no cron line: {e}") from None
        if next(self.between(_EPOCH, _EPOCH + _SEARCH), None) is None:
            raise ValueError(f"'{line}' never comes: no date matches it")

    def between(self, first: datetime, last: datetime) -> Iterator[datetime]:
        """Matching wall times (naive) from ``first`` to ``last``, both inclusive, in order."""
        trigger = self._trigger(last)
        at = trigger.get_next_fire_time(None, first.replace(tzinfo=UTC))
        while at is not None and at.replace(tzinfo=None) <= last:
            yield at.replace(tzinfo=None)
            after = at + timedelta(microseconds=1)
            at = trigger.get_next_fire_time(None, after)

    def begins_a_day_max(self) -> int:
        """How often it comes on the busiest of the days that it has at all."""
        first = next(self.between(_EPOCH, _EPOCH + _SEARCH))
        day = first.replace(hour=0, minute=0)
        count = 0
        for _ in self.between(day, day + timedelta(days=1) - timedelta(minutes=1)):
            count += 1
            if count > BEGINS_A_DAY_MAX:
                break
        return count

    def _trigger(self, last: datetime | None) -> CronTrigger:
        end = None if last is None else last.replace(tzinfo=UTC)
        return CronTrigger(**self._fields, timezone=UTC, end_date=end)


_JUMP = timedelta(hours=3)  # no clock jumps further
_EPOCH = datetime(2024, 1, 1)  # a Monday in a leap year


def zone(name: str) -> ZoneInfo:
    """Raises ValueError for what is no name of the IANA data base."""
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError(f"there is no time zone '{name}': give one as Europe/Berlin or UTC") from None


def instant(wall: datetime, where: ZoneInfo) -> float:
    """Unix seconds of a naive wall time: the first of two, the end of a jump for one that it leaves out."""
    early = wall.replace(tzinfo=where, fold=0).timestamp()
    if wall_time(early, where) == wall:
        return early
    # The clocks jump over it. Its two readings, by the offset after and before, lie around the jump.
    low, high = int(wall.replace(tzinfo=where, fold=1).timestamp()), int(early)
    before = wall_time(low, where) - datetime.fromtimestamp(low, UTC).replace(tzinfo=None)
    while high - low > 1:
        middle = (low + high) // 2
        offset = wall_time(middle, where) - datetime.fromtimestamp(middle, UTC).replace(tzinfo=None)
        low, high = (middle, high) if offset == before else (low, middle)
    return float(high)


def wall_time(at_wall_s: float, where: ZoneInfo) -> datetime:
    """What clocks there show, naive."""
    return datetime.fromtimestamp(at_wall_s, where).replace(tzinfo=None, fold=0)


@dataclass(frozen=True, slots=True)
class Recurrence:
    """Spans that begin by a cron line and last ``duration_s`` (elapsed, whatever clocks do), or until another line."""

    start: Cron
    where: ZoneInfo
    end: Cron | None = None
    duration_s: float | None = None
    ahead_s: float = 0.0

    def spans(self, from_wall_s: float, until_wall_s: float) -> Iterator[Span]:
        """Spans that last at some time within [from, until), in order of their begins, each once."""
        first = self._first(from_wall_s)
        last = wall_time(until_wall_s + self.ahead_s, self.where) + _JUMP
        seen: float | None = None
        for wall in self.start.between(first, last):
            begins = instant(wall, self.where)
            ends = self._end(wall, begins)
            if begins != seen and begins < ends and begins - self.ahead_s < until_wall_s and ends > from_wall_s:
                yield Span(begins - self.ahead_s, ends)
            seen = begins

    def next_after(self, at_wall_s: float) -> Span | None:
        """The first span that begins after that moment, within the next years."""
        first = wall_time(at_wall_s + self.ahead_s, self.where) - _JUMP
        for wall in self.start.between(first, first + _SEARCH):
            begins = instant(wall, self.where)
            ends = self._end(wall, begins)
            if begins - self.ahead_s > at_wall_s and begins < ends:
                return Span(begins - self.ahead_s, ends)
        return None

    def _first(self, from_wall_s: float) -> datetime:
        """A wall time from which on every begin must be looked at, for spans that last at that moment or later."""
        at = wall_time(from_wall_s, self.where) - _JUMP
        if self.end is None:
            return at - timedelta(seconds=self.duration_s or 0.0)
        # What began before the last end is over: mostly that is a day ago, seldom a month.
        for back in (timedelta(days=1), timedelta(days=8), timedelta(seconds=SPAN_MAX_S)):
            ends = list(self.end.between(at - back, at))
            if ends:
                return ends[-1]
        return at - timedelta(seconds=SPAN_MAX_S)

    def _end(self, wall: datetime, begins_wall_s: float) -> float:
        if self.end is None:
            return begins_wall_s + (self.duration_s or 0.0)
        after = wall + timedelta(minutes=1)
        found = next(self.end.between(after, after + timedelta(seconds=SPAN_MAX_S)), None)
        return begins_wall_s if found is None else instant(found, self.where)
