"""Cron windows: what a line means in a zone, also where clocks change, and what mistakes in it are told."""

from datetime import datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest

from rotator.config import ConfigError, parse
from rotator.crons import Cron, Recurrence, Span, instant

BERLIN = ZoneInfo("Europe/Berlin")
NEW_YORK = ZoneInfo("America/New_York")


def at(text: str, where: ZoneInfo = BERLIN, fold: int = 0) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=where, fold=fold).timestamp()


def spans(start: str, day: str, days: int = 1, where: ZoneInfo = BERLIN, **more: object) -> list[Span]:
    found = Recurrence(Cron(start), where, **more)  # type: ignore[arg-type]
    return list(found.spans(at(day, where), at(day, where) + days * 86400))


def test_a_window_begins_and_ends_by_its_lines_in_its_zone():
    night = spans("0 22 * * mon-fri", "2026-11-20", 3, end=Cron("0 6 * * *"))  # Friday to Sunday
    assert night == [
        Span(at("2026-11-19T22:00"), at("2026-11-20T06:00")),
        Span(at("2026-11-20T22:00"), at("2026-11-21T06:00")),
    ]
    assert spans("0 22 * * *", "2026-11-20", where=NEW_YORK, duration_s=60.0)[0].begins_wall_s == at(
        "2026-11-20T22:00", NEW_YORK
    )


def test_a_begin_that_clocks_jump_over_in_spring_comes_when_they_have_jumped():
    (gap,) = spans("30 2 * * *", "2026-03-29T00:00", duration_s=3600.0)
    assert gap == Span(at("2026-03-29T03:00"), at("2026-03-29T04:00"))


def test_begins_that_clocks_jump_over_together_come_once():
    gap = spans("15,45 2 * * *", "2026-03-29T00:00", duration_s=600.0)
    assert gap == [Span(at("2026-03-29T03:00"), at("2026-03-29T03:10"))]


def test_a_window_whose_begin_and_end_are_both_jumped_over_does_not_come():
    assert spans("10 2 * * *", "2026-03-29T00:00", end=Cron("50 2 * * *")) == []


def test_a_window_that_ends_after_the_jump_is_shorter_not_longer():
    (found,) = spans("30 2 * * *", "2026-03-29T00:00", end=Cron("30 3 * * *"))
    assert found == Span(at("2026-03-29T03:00"), at("2026-03-29T03:30"))


def test_a_begin_that_clocks_show_twice_in_autumn_comes_once_and_first():
    found = [s for s in spans("30 2 * * *", "2026-10-25T00:00", duration_s=1800.0) if s.begins_wall_s]
    assert found == [Span(at("2026-10-25T02:30"), at("2026-10-25T02:30") + 1800)]
    assert found[0].ends_wall_s < at("2026-10-25T02:30", fold=1)


def test_a_night_by_duration_is_elapsed_time_and_by_an_end_line_what_clocks_show():
    by_hours = spans("0 22 * * *", "2026-10-24T12:00", duration_s=8 * 3600.0)[-1]
    by_clock = spans("0 22 * * *", "2026-10-24T12:00", end=Cron("0 6 * * *"))[-1]
    assert by_hours.ends_wall_s == at("2026-10-25T05:00")
    assert by_clock.ends_wall_s == at("2026-10-25T06:00")
    assert by_clock.ends_wall_s - by_clock.begins_wall_s == 9 * 3600


@pytest.mark.parametrize("where", [BERLIN, NEW_YORK, ZoneInfo("Australia/Lord_Howe"), ZoneInfo("UTC")])
def test_wall_times_in_order_are_instants_in_order(where: ZoneInfo):
    for month, day in ((3, 8), (3, 29), (4, 5), (10, 4), (10, 25), (11, 1)):
        minutes = [instant(datetime(2026, month, day, m // 60, m % 60), where) for m in range(0, 300, 5)]
        assert minutes == sorted(minutes)


@pytest.mark.parametrize("end", ["0 6 * * *", "0 6 * * mon", "0 6 1 * *", "0,30 * * * *"])
@pytest.mark.parametrize("start", ["0 22 * * *", "0 22 * * fri", "0 5,12,22 * * *"])
def test_the_span_that_lasts_at_a_moment_is_found_however_long_ago_it_began(start: str, end: str):
    every = Recurrence(Cron(start), BERLIN, Cron(end))
    begin, days = at("2026-03-01T00:00"), 60
    known = list(every.spans(begin, begin + days * 86400))
    for hour in range(32 * 24, days * 24, 37):
        moment = begin + hour * 3600
        lasting = [s for s in known if s.begins_wall_s <= moment < s.ends_wall_s]
        assert list(every.spans(moment, moment + 1)) == lasting


def test_a_begin_ahead_moves_the_begin_and_not_the_end():
    (found,) = spans("0 9 * * *", "2026-11-20", duration_s=3600.0, ahead_s=120.0)
    assert found == Span(at("2026-11-20T08:58"), at("2026-11-20T10:00"))


def test_the_next_span_is_found_far_ahead_too():
    leap = Recurrence(Cron("0 0 29 2 *"), BERLIN, duration_s=3600.0).next_after(at("2026-11-20"))
    assert leap is not None
    assert leap.begins_wall_s == at("2028-02-29")


FLEET = """
engines: [{name: a, gpus: [0], command: [x]}]
calendar: {windows: [{name: w, engines: [a], start: '0 22 * * *', duration_h: 8}]}
"""


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("'0 22 * * *'", "'0 22 * *'", "has 4 fields: write minute hour day month weekday"),
        ("'0 22 * * *'", "'0 22 * * 1-5'", "write weekdays by name"),
        ("'0 22 * * *'", "'0 25 * * *'", "is no cron line"),
        ("'0 22 * * *'", "'0 22 31 2 *'", "never comes"),
        ("'0 22 * * *'", "'*/5 * * * *'", "at most hourly"),
        ("duration_h: 8", "duration_h: 8, end: '0 6 * * *'", "give exactly one of 'end' and 'duration_h'"),
        ("duration_h: 8", "end: '0 6 1 1 *'", ""),
        ("duration_h: 8", "duration_h: 8, timezone: Berlin", "there is no time zone 'Berlin'"),
        ("engines: [a], start", "engines: [b], start", "window 'w': 'b' is no engine here: name one"),
        ("{windows", "{default_engines: [c], windows", "default_engines: 'c' is no engine here"),
        ("duration_h: 8}", "duration_h: 8}, {name: w, engines: [a], start: '0 1 * * *', duration_h: 1}", "rename one"),
    ],
)
def test_a_mistake_in_the_calendar_is_told_with_its_place_and_fix(old: str, new: str, said: str):
    text = FLEET.replace(old, new)
    assert text != FLEET
    if not said:
        assert parse(text, base=Path()).calendar.windows[0].end == "0 6 1 1 *"  # in winter it does come
        return
    with pytest.raises(ConfigError) as raised:
        parse(text, base=Path())
    assert said in str(raised.value)
    assert "calendar" in str(raised.value)


def test_an_end_that_is_never_near_a_begin_is_refused():
    text = FLEET.replace("'0 22 * * *', duration_h: 8", "'0 0 1 6 *', end: '0 0 1 9 *'")
    with pytest.raises(ConfigError, match="use 'duration_h'"):
        parse(text, base=Path())
