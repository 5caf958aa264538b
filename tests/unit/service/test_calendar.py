"""Windows, reservations and default engines over a fake box, under virtual time."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from rotator.config import FleetConfig
from rotator.config_calendar import CalendarConfig
from rotator.core.values import Command, CommandKind, State
from rotator.ports import LedgerError
from rotator.service.calendar import Keeper
from rotator.service.events import EventBus
from rotator.service.operations import CommandRefused, ReservationConflict, ReservationWrong, UnknownReservation
from rotator.service.traffic import EngineUnavailable
from rotator.sim.clock import run
from tests.fakes import FakeLedger, Service, make_box, make_config, make_service

BERLIN = ZoneInfo("Europe/Berlin")
PAIR = {"a": ((0,), 80.0), "b": ((0,), 80.0)}


class Wall:
    """Unix seconds that run with the loop's clock from a local time on, and can be set."""

    def __init__(self, text: str) -> None:
        self.offset_s = 0.0
        self._text = text

    def set_to(self, text: str) -> None:
        self.offset_s = self.at(text) - asyncio.get_running_loop().time()

    def __call__(self) -> float:
        if not self.offset_s:
            self.set_to(self._text)
        return self.offset_s + asyncio.get_running_loop().time()

    @staticmethod
    def at(text: str) -> float:
        return datetime.fromisoformat(text).replace(tzinfo=BERLIN).timestamp()


def calendar(text: str) -> str:
    return "calendar:\n  timezone: Europe/Berlin\n" + "\n".join(f"  {line}" for line in text.strip().splitlines())


OFFICE = calendar(
    """
windows:
- {name: office, engines: [a], start: '0 9 * * mon-fri', end: '0 17 * * *'}
"""
)


def story(
    text: str, wall: Wall, told: Callable[[Service], Any], box: dict[str, Any] = PAIR, ledger: FakeLedger | None = None
) -> None:
    async def play() -> None:
        made = make_box(**box)
        config = make_config(made, text)
        async with make_service(made, config, ledger, wall=wall) as service:
            await told(service)

    run(play())


def begun(service: Service, kind: str = "calendar.begun") -> list[str]:
    return [e.data["entry"] for e in service.bus.since(0) if e.kind == kind]


def test_a_window_wakes_its_engine_at_its_start_and_keeps_others_out_until_its_end() -> None:
    wall = Wall("2026-11-23T08:59:00")

    async def told(service: Service) -> None:
        await service.ask("b")
        assert service.state("a") is State.STOPPED
        await asyncio.sleep(60)
        await service.until("a", State.AWAKE, 60)
        assert service.operator.engine("a").held_by == "window 'office'"
        with pytest.raises(EngineUnavailable, match=r"a is kept awake by window 'office' \(until Mon 2026-11-23 17:00"):
            await service.ask("b")
        with pytest.raises(CommandRefused, match="kept awake by window 'office'"):
            await service.operator.command(Command(CommandKind.WAKE, "b"), wait=True, deadline_s=60)
        wall.set_to("2026-11-23T16:59:59")
        await asyncio.sleep(3)
        assert await service.ask("b") < 60
        assert begun(service) == begun(service, "calendar.ended") == ["window 'office'"]

    story(OFFICE, wall, told)


def test_a_request_that_can_wait_for_the_end_of_the_window_waits_and_is_told_how_long() -> None:
    wall = Wall("2026-11-23T16:58:00")

    async def told(service: Service) -> None:
        await service.until("a", State.AWAKE, 60)
        asked = asyncio.create_task(service.ask("b"))
        await asyncio.sleep(1)
        eta_s = service.loop.eta_s("b")
        assert eta_s is not None
        assert eta_s >= Wall.at("2026-11-23T17:00:00") - wall() - 2
        assert 60 < await asked < 180

    story(OFFICE, wall, told)


def test_after_a_restart_in_the_middle_of_a_window_it_holds() -> None:
    async def told(service: Service) -> None:
        await service.until("a", State.AWAKE, 60)
        assert service.operator.calendar().windows[0].in_force

    story(OFFICE, Wall("2026-11-23T12:00:00"), told)


@pytest.mark.parametrize("back", ["2026-11-23T08:55:00", "2026-11-23T12:00:00"])
def test_a_clock_that_is_set_back_does_not_begin_a_window_twice(back: str) -> None:
    wall = Wall("2026-11-23T08:59:55")

    async def told(service: Service) -> None:
        await service.until("a", State.AWAKE, 120)
        if back > "2026-11-23T09":
            wall.set_to("2026-11-23T17:00:01")
            await asyncio.sleep(2)
        wall.set_to(back)
        await asyncio.sleep(600)
        assert begun(service) == ["window 'office'"]

    story(OFFICE, wall, told)


def test_a_clock_that_jumps_over_a_window_leaves_it_out() -> None:
    wall = Wall("2026-11-23T08:00:00")

    async def told(service: Service) -> None:
        wall.set_to("2026-11-23T18:00:00")
        await asyncio.sleep(60)
        assert begun(service) == []
        wall.set_to("2026-11-24T09:00:00")
        await asyncio.sleep(60)
        assert begun(service) == ["window 'office'"]

    story(OFFICE, wall, told)


def test_a_window_is_not_begun_a_second_time_in_the_repeated_hour_of_autumn() -> None:
    text = calendar("windows:\n- {name: short, engines: [a], start: '30 2 * * *', duration_h: 0.25}")
    bus = EventBus()
    keeper = Keeper(_World(make_config(make_box(**PAIR), text), bus))
    midnight = Wall.at("2026-10-25T00:00:00")
    for minute in range(0, 6 * 60, 5):
        keeper.advance(minute * 60.0, midnight + minute * 60.0)
    told = [(e.kind, (e.data["entry"])) for e in bus.since(0)]
    assert told == [("calendar.begun", "window 'short'"), ("calendar.ended", "window 'short'")]


@dataclass(frozen=True)
class _World:
    config: FleetConfig
    bus: EventBus


def test_an_operator_who_puts_a_held_engine_away_has_the_last_word_for_that_time() -> None:
    async def told(service: Service) -> None:
        await service.until("a", State.AWAKE, 60)
        await service.operator.command(Command(CommandKind.SLEEP, "a"), wait=True, deadline_s=60)
        await asyncio.sleep(120)
        assert service.state("a") is State.ASLEEP
        assert await service.ask("b") < 60
        assert service.operator.calendar().windows[0].waived == ("a",)
        await service.operator.command(Command(CommandKind.WAKE, "a"), wait=True, deadline_s=60)
        with pytest.raises(EngineUnavailable, match="kept awake"):
            await service.ask("b")

    story(OFFICE, Wall("2026-11-23T12:00:00"), told)


def test_streams_in_flight_at_the_start_of_a_window_freeze_and_are_not_cut() -> None:
    async def told(service: Service) -> None:
        await service.ask("b")
        asked = asyncio.create_task(service.ask("b", serves_s=300.0))
        await asyncio.sleep(120)
        assert service.state("a") is State.AWAKE
        assert not asked.done()
        assert "abort" not in " ".join(service.box.log)
        asked.cancel()

    story(OFFICE, Wall("2026-11-23T08:59:30"), told)


def test_the_default_engine_comes_back_at_the_end_of_a_window() -> None:
    text = OFFICE + "\n  default_engines: [b]"

    async def told(service: Service) -> None:
        await service.until("a", State.AWAKE, 60)
        await asyncio.sleep(60)
        assert service.state("b") is State.STOPPED
        await service.until("b", State.AWAKE, 120)
        assert service.state("a") is State.ASLEEP

    story(text, Wall("2026-11-23T16:58:00"), told)


def test_the_default_engine_comes_back_when_the_other_was_idle_for_long_enough() -> None:
    text = calendar("default_engines: [b]\ndefault_after_s: 300")

    async def told(service: Service) -> None:
        await service.until("b", State.AWAKE, 60)
        await service.ask("a")
        await asyncio.sleep(250)
        assert service.state("a") is State.AWAKE
        await asyncio.sleep(60)
        assert service.state("b") is State.AWAKE

    story(text, Wall("2026-11-23T12:00:00"), told)


def test_a_default_engine_that_an_operator_put_away_stays_away() -> None:
    async def told(service: Service) -> None:
        await service.until("b", State.AWAKE, 60)
        await service.operator.command(Command(CommandKind.SLEEP, "b"), wait=True, deadline_s=60)
        await asyncio.sleep(60)
        assert service.state("b") is State.ASLEEP

    story(calendar("default_engines: [b]"), Wall("2026-11-23T12:00:00"), told)


def test_a_window_that_a_changed_file_no_longer_has_lets_go_at_once() -> None:
    async def told(service: Service) -> None:
        await service.until("a", State.AWAKE, 60)
        world = service.loop.world
        world.config = world.config.model_copy(update={"calendar": CalendarConfig()})
        assert await service.ask("b") < 60
        ended = [e.data["reason"] for e in service.bus.since(0) if e.kind == "calendar.ended"]
        assert ended == ["it was taken back"]

    story(OFFICE, Wall("2026-11-23T12:00:00"), told)


# -- reservations ----------------------------------------------------------------------------------------------------


async def reserve(service: Service, *engines: str, **fields: Any) -> int:
    given = {"start": None, "end": None, "duration_s": None, "priority": 0, "note": ""} | fields
    view = await service.operator.reserve(engines, **given)
    assert view.id is not None
    return view.id


def test_a_reservation_holds_from_its_start_to_its_end_and_is_gone_afterwards() -> None:
    wall = Wall("2026-11-23T12:00:00")

    async def told(service: Service) -> None:
        await service.ask("b")
        start, end = datetime(2026, 11, 23, 12, 5), datetime(2026, 11, 23, 12, 30)
        await reserve(service, "a", start=start, end=end, note="tests")
        assert [r.begins for r in service.operator.reservations()] == ["Mon 2026-11-23 12:05 CET"]
        await asyncio.sleep(280)
        assert service.state("b") is State.AWAKE
        await asyncio.sleep(60)
        assert service.state("a") is State.AWAKE
        assert service.operator.engine("a").held_by.endswith("(tests)")
        wall.set_to("2026-11-23T12:29:58")
        await asyncio.sleep(5)
        assert service.operator.reservations() == ()
        assert await service.ask("b") < 60

    story(calendar("windows: []"), wall, told)


def test_a_reservation_survives_a_restart() -> None:
    ledger = FakeLedger()

    async def told(service: Service) -> None:
        await reserve(service, "a", duration_s=36000.0)

    async def again(service: Service) -> None:
        await service.until("a", State.AWAKE, 60)
        assert [r.in_force for r in service.operator.reservations()] == [True]

    story("", Wall("2026-11-23T12:00:00"), told, ledger=ledger)
    story("", Wall("2026-11-23T13:00:00"), again, ledger=ledger)


def test_a_reservation_that_is_dropped_lets_go_at_once() -> None:
    async def told(service: Service) -> None:
        id = await reserve(service, "a", duration_s=36000.0)
        await service.until("a", State.AWAKE, 60)
        assert (await service.operator.unreserve(id)).in_force
        assert await service.ask("b") < 60
        assert service.ledger.reservations == {}
        with pytest.raises(UnknownReservation, match="there are none"):
            await service.operator.unreserve(id)

    story("", Wall("2026-11-23T12:00:00"), told)


def test_a_reservation_that_does_not_fit_beside_another_is_refused_with_its_name_and_bytes() -> None:
    async def told(service: Service) -> None:
        id = await reserve(service, "a", duration_s=3600.0, note="first")
        said = rf"needs 80.0 GiB on GPU 0.*95.0 GiB.*a is kept awake by reservation {id} \(first\).*with 80.0 GiB"
        with pytest.raises(ReservationConflict, match=said):
            await reserve(service, "b", start=datetime(2026, 11, 23, 11, 30, tzinfo=ZoneInfo("UTC")), duration_s=60.0)
        await reserve(service, "b", start=datetime(2026, 11, 23, 13, 0), duration_s=60.0)
        assert len(service.ledger.reservations) == 2

    story(OFFICE.replace("'0 9 * * mon-fri'", "'0 9 * * sun'"), Wall("2026-11-23T12:00:00"), told)


def test_a_reservation_is_refused_for_what_begins_in_the_middle_of_it() -> None:
    async def told(service: Service) -> None:
        await reserve(service, "a", start=datetime(2026, 11, 23, 13, 0), duration_s=60.0)
        with pytest.raises(ReservationConflict, match="from Mon 2026-11-23 13:00 CET"):
            await reserve(service, "b", duration_s=7200.0)

    story(OFFICE.replace("mon-fri", "sun"), Wall("2026-11-23T12:00:00"), told)


def test_a_reservation_yields_to_a_window_unless_its_priority_is_higher() -> None:
    async def told(service: Service) -> None:
        with pytest.raises(ReservationConflict, match="window 'office'"):
            await reserve(service, "b", duration_s=3600.0)
        await reserve(service, "b", duration_s=3600.0, priority=1)
        await service.until("b", State.AWAKE, 120)

    story(OFFICE, Wall("2026-11-23T12:00:00"), told)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"start": datetime(2026, 11, 23, 11, 0), "duration_s": 60.0}, "start: Mon 2026-11-23 11:00 CET is past"),
        ({"end": datetime(2026, 11, 23, 11, 0)}, "end: .* is not after the start"),
        ({"duration_s": 40 * 86400.0}, "lasts at most 31 days"),
        ({"start": datetime(2028, 1, 1), "duration_s": 60.0}, "at most 366 days ahead"),
        ({}, "exactly one of"),
    ],
)
def test_times_that_make_no_sense_are_refused(fields: dict[str, Any], said: str) -> None:
    async def told(service: Service) -> None:
        with pytest.raises(ReservationWrong, match=said):
            await reserve(service, "a", **fields)
        assert service.ledger.reservations == {}

    story(OFFICE.replace("mon-fri", "sun"), Wall("2026-11-23T12:00:00"), told)


def test_two_reservations_asked_for_at_once_are_not_both_promised() -> None:
    async def told(service: Service) -> None:
        both = await asyncio.gather(
            reserve(service, "a", duration_s=60.0), reserve(service, "b", duration_s=60.0), return_exceptions=True
        )
        assert [type(r) for r in both] == [int, ReservationConflict]

    story("", Wall("2026-11-23T12:00:00"), told)


def test_a_reservation_that_cannot_be_written_is_not_promised() -> None:
    async def told(service: Service) -> None:
        service.ledger.broken = True
        with pytest.raises(LedgerError):
            await reserve(service, "a", duration_s=60.0)
        assert service.operator.reservations() == ()

    story("", Wall("2026-11-23T12:00:00"), told)
