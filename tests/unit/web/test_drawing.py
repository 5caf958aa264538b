"""What is drawn: swaps from the journal, plots from samples, and text that stays text."""

import dataclasses
from typing import Any

from rotator.ports import Incident
from rotator.service.events import EventBus
from rotator.web.feed import Feed
from rotator.web.page import parts, text
from rotator.web.page.charts import options
from rotator.web.page.swaps import from_rows
from rotator.web.page.vram import FOREIGN, Vram
from tests.unit.api.fakes import FakeOperations, engine_view

GIB = 1 << 30
EVIL = '<img src=x onerror="alert(1)">'


def look(**changed: Any) -> dict[str, Any]:
    """What the feed tells of a small fleet, as JSON would carry it."""
    ops = FakeOperations()
    ops.views["odd"] = dataclasses.replace(engine_view("odd", EVIL, state="failed"), reason=EVIL, held_by=EVIL)
    ops.info = lambda: {
        "version": EVIL,
        "started_at": 1.0,
        "host_memory": {"budget_bytes": 9 * GIB, "masters_bytes": 1},
    }  # type: ignore[method-assign]
    ops.incidents = lambda: (Incident("i1", 1.0, EVIL, "serious", EVIL, advice=EVIL),)  # type: ignore[method-assign]
    told = Feed(ops, EventBus(), FakeApi()).look()
    plain = {k: _plain(v) for k, v in told.items()}
    return {**plain, **changed}


class FakeApi:
    async def __call__(self, *_: Any) -> None:
        return None


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def row(swap: str, engine: str, action: str, at: float, **more: Any) -> dict[str, Any]:
    return {
        "swap_id": swap, "engine": engine, "action": action, "reason": f"{action} it", "opened_at_wall_s": at,
        "closed_at_wall_s": at + 1.0, "result": "ok", "error": None, "plan": {}, "phases_s": {}, "bytes_before": {},
        "bytes_after": {}, **more,
    }  # fmt: skip


def test_a_swap_is_one_line_with_both_sides_its_phases_and_its_bytes():
    plan = {"reason": "b is wanted", "admit": {"bytes_per_gpu": {"0": 70 * GIB}}}
    rows = [
        row("s1", "b", "wake", 11.0, plan=plan, phases_s={"wake": 1.0, "canary": 0.2, "total": 2.5}),
        row("s1", "a", "sleep", 10.0, plan=plan, phases_s={"drain": 0.1}, bytes_before={"0": 80}, bytes_after={"0": 2}),
    ]
    (line,) = from_rows(rows, {})
    assert (line.admit, line.evicts, line.reason) == ("b", [("a", "sleep")], "b is wanted")
    assert (line.begun_wall_s, line.total_s, line.result) == (10.0, 2.5, "ok")
    assert (line.freed_bytes, line.taken_bytes) == (78, 70 * GIB)
    assert "loaded 70.0 GiB at 70 GiB/s" in parts.swap_list([line])


def test_a_failed_swap_says_why_and_one_under_way_has_no_end():
    failed = row("s1", "b", "wake", 1.0, result="failed", error="its wake failed: rank 1")
    going = row("s2", "a", "sleep", 5.0, result="open", closed_at_wall_s=None)
    told = {"s1": {"error": "its wake failed", "phases_s": {"wake": 3.0}}}
    newest, oldest = from_rows([going, failed], told)
    assert (newest.id, newest.total_s) == ("s2", None)
    assert (oldest.result, oldest.phases_s) == ("failed", {"wake": 3.0})
    assert "its wake failed: rank 1" in parts.swap_list([oldest])


def test_nothing_that_others_wrote_becomes_markup():
    now = look(
        queue=[{"id": EVIL, "model": EVIL, "engine": EVIL, "waited_s": 1.0, "deadline_in_s": 2.0, "eta_s": None}]
    )
    shades = text.colors(now["engines"])
    evil = from_rows([row(EVIL, EVIL, "wake", 1.0, error=EVIL, result="failed", plan={"reason": EVIL})], {})
    event = {"kind": EVIL, "engine": EVIL, "at_wall_s": 1.0, "data": {"reason": EVIL, EVIL: EVIL}}
    steps = {"swaps": [], "blocked": [{"engine": EVIL, "kind": EVIL, "reason": EVIL, "until_in_s": None}]}
    drawn = [
        *(cell for e in now["engines"] for cell in (parts.engine_name(e, "red"), parts.engine_state(e, None))),
        *(parts.engine_work({**e, "canary": EVIL}) for e in now["engines"]),
        parts.status(now, True), parts.queue(now), parts.swap_list(evil), parts.incidents(now["incidents"], [event]),
        parts.plan(steps, EVIL), parts.legend(now, shades), parts.host(now, shades), parts.calendar(now),
        *(parts.gpu_head({**g, "name": EVIL, "reason": EVIL}, shades) for g in now["gpus"]),
        *(parts.gpu_table({**g, "by_engine": {EVIL: 1}}, {}, "5 min") for g in now["gpus"]),
    ]  # fmt: skip
    assert all("<img" not in piece for piece in drawn)
    assert sum("&lt;img" in piece for piece in drawn) >= 9


def test_figures_are_rounded_as_people_read_them():
    assert [text.gib(v) for v in (None, 0, GIB // 2, 328 * GIB)] == ["?", "0.0", "0.5", "328"]
    assert [text.seconds(v) for v in (None, 0.05, 1.23, 300, 9000)] == ["–", "50 ms", "1.2 s", "5 min", "2.5 h"]


def test_a_plot_holds_what_the_ledger_sampled_and_what_was_seen_since():
    vram = Vram()
    vram.fill("g", [{"at_wall_s": 100.0 + i, "by_holder": {"a": i * GIB, FOREIGN: 0}} for i in range(60)])
    vram.see({"id": "g", "read_at_wall_s": 162.0, "by_engine": {"a": 7 * GIB}, "foreign_bytes": GIB})
    curves = vram.curves("g", ["a", FOREIGN], 300.0, 162.0)
    assert curves.by_holder["a"][-1] == 7.0
    assert curves.by_holder[FOREIGN][-1] == 1.0
    assert 30.0 in curves.by_holder["a"]
    assert curves.times_ms == sorted(curves.times_ms)


def test_a_time_in_which_nobody_looked_is_a_hole_and_not_a_line():
    vram = Vram()
    vram.fill("g", [{"at_wall_s": t, "by_holder": {"a": GIB}} for t in (100.0, 101.0, 200.0, 201.0)])
    values = vram.curves("g", ["a"], 300.0, 201.0).by_holder["a"]
    assert None in values[values.index(1.0) :]
    assert values[-1] == 1.0


def test_rings_of_samples_are_bounded_whatever_comes():
    vram = Vram()
    vram.fill("g", [{"at_wall_s": float(i), "by_holder": {"a": i}} for i in range(20_000)])
    curves = vram.curves("g", ["a"], 3600.0, 20_000.0)
    assert len(curves.times_ms) <= 151
    assert vram.last_wall_s("g") == 19_999.0


def test_a_chart_stacks_its_holders_below_the_reserve():
    vram = Vram()
    vram.fill("g", [{"at_wall_s": 10.0, "by_holder": {"a": GIB, FOREIGN: GIB}}])
    gpu = {"total_bytes": 96 * GIB, "reserve_bytes": 2 * GIB}
    made = options(gpu, vram.curves("g", ["a", FOREIGN], 60.0, 11.0), {"a": "#123456"})
    assert [s["name"] for s in made["series"]] == ["a", "foreign processes"]
    assert {s["stack"] for s in made["series"]} == {"held"}
    assert made["series"][-1]["markLine"]["data"] == [{"yAxis": 94.0}]
    assert made["yAxis"]["max"] == 96.0
