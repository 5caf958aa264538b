"""What of turns and times cannot hold at once, with numbers and times."""

from typing import Any

from rotator.check import Finding, check_fleet
from rotator.config import FleetConfig
from rotator.core.values import State
from rotator.ports import EngineRecord, Recovered, Residency
from tests.unit.check.fakes import GIB, FakeDevices, FakeMachine


def fleet(*engines: dict[str, Any], **more: Any) -> FleetConfig:
    own = [{"command": ["x"], "footprint": {"awake_gib": 80, "host_gib": 1}} | e for e in engines]
    return FleetConfig.model_validate({"engines": own, **more})


PAIR = ({"name": "a", "gpus": [0]}, {"name": "b", "gpus": [0]})


async def check(config: FleetConfig, known: Recovered | None = None) -> list[Finding]:
    machine = FakeMachine()
    machine.known = known
    return [f for f in await check_fleet(config, FakeDevices(1), machine) if "host_memory" not in f.line]


def timed(wake_s: float, *names: str) -> Recovered:
    records = {n: EngineRecord(n, State.ASLEEP, wake_s=wake_s, sleep_s=wake_s) for n in names}
    return Recovered(records, (), (), ())


async def test_bounds_that_cannot_hold_at_once_are_told_with_numbers():
    stays = fleet(*PAIR, policies={"min_stay_s": 300, "longest_wait_s": 60, "swap_share": None})
    (found,) = await check(stays)
    assert not found.is_error
    assert found.line.startswith("policies: 2 engines take turns on GPU-0 (a, b): with min_stay_s 300")
    assert "more than longest_wait_s 60: raise longest_wait_s above" in found.line
    assert found.line.endswith("(swaps that were not measured yet are taken as 2 s)")


async def test_bounds_that_hold_are_not_mentioned():
    assert await check(fleet(*PAIR)) == []


async def test_measured_swaps_are_believed_rather_than_guessed():
    config = fleet(*PAIR, policies={"longest_wait_s": 60, "swap_share": 0.1})
    assert await check(config, timed(0.5, "a", "b")) == []
    found = [f.line for f in await check(config, timed(30.0, "a", "b"))]
    assert any("cost 120.0 s a round" in line for line in found)
    assert not any("not measured" in line for line in found)


async def test_measured_bytes_are_believed_rather_than_configured():
    known = Recovered({}, (Residency("a", "GPU-0", awake_bytes=97 * GIB),), (), ())
    (found,) = await check(fleet({"name": "a", "gpus": [0]}), known)
    assert "engine 'a' needs 97.0 GiB on GPU-0" in found.line


def windows(*entries: str, **more: Any) -> dict[str, Any]:
    keys = ("name", "engines", "start", "duration_h", "priority")
    made = [dict(zip(keys, entry.split("|"), strict=False)) for entry in entries]
    return {
        "calendar": {"timezone": "Europe/Berlin", "windows": [{**w, "engines": [w["engines"]]} for w in made], **more}
    }


async def test_windows_that_overlap_and_do_not_fit_are_told_with_the_time_and_the_bytes():
    (found,) = await check(fleet(*PAIR, **windows("day|a|0 9 * * mon-fri|9", "late|b|0 17 * * *|2")))
    assert found.is_error
    assert found.line.startswith("calendar: window 'late': b cannot be kept awake from Mon 2026-11-23 17:00 CET and ")
    assert (
        "it needs 80.0 GiB on GPU-0, which has 95.0 GiB, where a is kept awake by window 'day' with 80.0 GiB"
        in found.line
    )
    assert found.line.endswith("give one a higher priority to say who wins")


async def test_a_collision_that_a_priority_decides_is_only_worth_a_warning():
    (found,) = await check(fleet(*PAIR, **windows("day|a|0 9 * * *|9|5", "late|b|0 17 * * *|2")))
    assert not found.is_error


async def test_windows_that_do_not_meet_or_fit_together_are_well():
    assert await check(fleet(*PAIR, **windows("day|a|0 9 * * *|8", "late|b|0 17 * * *|2"))) == []
    small = [e | {"footprint": {"awake_gib": 40, "host_gib": 1}} for e in PAIR]
    assert await check(fleet(*small, **windows("day|a|0 9 * * *|9", "late|b|0 17 * * *|2"))) == []


async def test_a_collision_of_windows_that_come_once_a_year_is_found_too():
    (found,) = await check(fleet(*PAIR, **windows("spring|a|0 9 1 5 *|9", "may|b|0 10 1 5 *|2")))
    assert "Sat 2027-05-01 10:00 CEST" in found.line
