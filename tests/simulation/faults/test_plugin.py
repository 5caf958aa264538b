"""Engines that free by bytes, and masters that leave host RAM, while things go wrong with it."""

import pytest

from rotator.sim.faults.plugin import Plugin
from rotator.sim.faults.script import Arm, Event, Kill
from tests.simulation.faults.stories import ask, engine, played

ELASTIC = {"awake_gib": 60.0, "planned_gib": 60.0, "kv_gib": 30.0, "elastic": True, "host_gib": 29.0}
PAIR = (engine("a", **ELASTIC), engine("b", **ELASTIC))
TURNS = (ask(1, "a"), ask(6, "b"), ask(12, "a"), ask(18, "b"), ask(24, "a"))
DISK = (engine("a", disk=True), engine("b", disk=True))


def test_two_engines_take_turns_by_their_caches_alone() -> None:
    outcome = played(*TURNS, engines=PAIR, host_gib=1.0)  # no room for any masters
    assert outcome.requests["whole"] >= len(TURNS)


@pytest.mark.parametrize(
    "event",
    [
        Arm(5, "a", "free", "lie"),
        Arm(5, "a", "free", "less"),
        Arm(5, "a", "free", "rank_fails"),
        Arm(5, "a", "free", "lost"),
        Arm(5, "a", "free", "hang"),
        Arm(11, "a", "restore", "noop"),
        Arm(11, "a", "restore", "oom"),
        Arm(11, "a", "restore", "garbage"),
        Kill(6, "sleep", 40),
        Kill(12, "wake", 4),
    ],
    ids=lambda e: getattr(e, "how", f"killed before {getattr(e, 'before', '')}"),
)
def test_bytes_that_were_not_freed_or_not_brought_back_cost_an_engine_and_no_truth(event: Event) -> None:
    outcome = played(*TURNS, event, engines=PAIR)
    assert outcome.requests["whole"] >= 3


@pytest.mark.parametrize("how", ["", "error", "rank_fails", "lost", "hang", "crash"])
def test_masters_go_to_disk_and_the_engine_wakes_from_there(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    place = Plugin._place

    async def noted(plugin: Plugin, where: str) -> tuple[int, bytes]:
        asked.append(where)
        return await place(plugin, where)

    monkeypatch.setattr(Plugin, "_place", noted)
    armed = (Arm(5, "a", "masters", how),) if how else ()
    outcome = played(ask(1, "a"), ask(6, "b"), *armed, ask(25, "a"), engines=DISK, idle_sink_s=6.0)
    assert "disk" in asked or how in ("lost", "hang", "error", "rank_fails", "crash")
    assert outcome.requests["whole"] >= 3
