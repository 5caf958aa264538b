"""The section ``calendar``: when which engines are kept awake, and which ones the service returns to."""

from functools import cached_property
from typing import Annotated, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from rotator.config_base import Section
from rotator.crons import BEGINS_A_DAY_MAX, SPAN_MAX_S, Cron, Recurrence, zone

HOUR_S = 3600.0


def _zone(name: str) -> str:
    zone(name)
    return name


def _cron(line: str) -> str:
    return " ".join(Cron(line).line.split())


Zone = Annotated[str, AfterValidator(_zone)]
CronLine = Annotated[str, AfterValidator(_cron)]


class WindowConfig(Section):
    """A time that comes again and again, in which some engines are kept awake. Give ``end`` or ``duration_h``."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="said in reasons and events")
    engines: tuple[str, ...] = Field(min_length=1, description="woken at its start and never evicted while it lasts")
    start: CronLine = Field(
        description="cron line: minute, hour, day of month, month, weekday by name, e.g. `0 22 * * mon-fri`"
    )
    end: CronLine | None = Field(default=None, description="cron line: it lasts until this comes next")
    duration_h: float | None = Field(
        default=None, gt=0, le=SPAN_MAX_S / HOUR_S, description="elapsed hours, also when clocks change meanwhile"
    )
    timezone: Zone | None = Field(default=None, description="of both, as `Europe/Berlin`; the calendar's if absent")
    priority: int = Field(
        default=0, ge=-100, le=100, description="of windows that do not fit together the higher one holds"
    )
    ahead_s: float = Field(
        default=0, ge=0, le=HOUR_S, description="begin this much earlier, so that a wake or start is over by then"
    )

    @model_validator(mode="after")
    def _ends(self) -> Self:
        if (self.end is None) == (self.duration_h is None):
            raise ValueError("give exactly one of 'end' and 'duration_h'")
        if len(set(self.engines)) != len(self.engines):
            raise ValueError("'engines' names one twice: remove one")
        if Cron(self.start).begins_a_day_max() > BEGINS_A_DAY_MAX:
            raise ValueError(f"'start' comes more than {BEGINS_A_DAY_MAX} times a day: a window begins at most hourly")
        if self.end is not None and next(iter(self.recurrence("UTC").spans(0.0, SPAN_MAX_S * 13)), None) is None:
            raise ValueError(f"'end' never comes within 31 days after 'start' ({self.start}): use 'duration_h'")
        return self

    def recurrence(self, default_zone: str) -> Recurrence:
        duration_s = None if self.duration_h is None else self.duration_h * HOUR_S
        end = None if self.end is None else Cron(self.end)
        return Recurrence(Cron(self.start), zone(self.timezone or default_zone), end, duration_s, self.ahead_s)


class CalendarConfig(Section):
    """Without windows and default engines there is no calendar. Reservations for once are made over REST."""

    timezone: Zone = Field(default="UTC", description="of windows that name none, and of times shown to people")
    windows: tuple[WindowConfig, ...] = ()
    default_engines: tuple[str, ...] = Field(
        default=(), description="come back at the end of a window and where nobody uses their GPUs"
    )
    default_after_s: float | None = Field(
        default=None,
        gt=0,
        description="an engine that was idle this long makes room for a default one; absent: only after a window",
    )

    @field_validator("windows")
    @classmethod
    def _names_unique(cls, windows: tuple[WindowConfig, ...]) -> tuple[WindowConfig, ...]:
        names = [w.name for w in windows]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"'{name}' is the name of more than one window: rename one")
        return windows

    @cached_property
    def recurrences(self) -> tuple[tuple[WindowConfig, Recurrence], ...]:
        """Every window with its evaluated cron lines."""
        return tuple((window, window.recurrence(self.timezone)) for window in self.windows)

    def unknown(self, engines: set[str]) -> str | None:
        """What names an engine that the file does not have."""
        for window in self.windows:
            for name in window.engines:
                if name not in engines:
                    return f"calendar: window '{window.name}': '{name}' is no engine here: name one"
        for name in self.default_engines:
            if name not in engines:
                return f"calendar.default_engines: '{name}' is no engine here: name one"
        return None
