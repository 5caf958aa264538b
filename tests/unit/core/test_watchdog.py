"""When an engine is judged wedged, slow or without draft weights, and when it must not be."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from rotator.core.watchdog import (
    Bounds,
    Kind,
    ResidueBounds,
    Track,
    Verdict,
    Vitals,
    noticed_within_s,
    observe,
    residue_growth,
)

BOUNDS = Bounds(stall_s=60, stall_young_s=180, young_s=300, stall_warned_s=30, probe_every_s=None)
OLD = Track(-1e9).resumed(0.0)
BUSY = Vitals(0.0, in_flight=2, running=2, generated=100, prompted=50, steps=40)
GIB = 1 << 30


def looks(
    track: Track, vitals: Iterable[Vitals], bounds: Bounds = BOUNDS, *, probes: bool | None = False
) -> tuple[Track, list[Verdict]]:
    """Look again and again; a probe that is asked for is answered (True), left (False), or never ends (None)."""
    verdicts = []
    for now in vitals:
        track, verdict = observe(track, now, bounds)
        verdicts.append(verdict)
        if verdict.kind is Kind.PROBE and probes is not None:
            track = track.probed(now.at_s, probes)
    return track, verdicts


def still(seconds: int, **more: object) -> list[Vitals]:
    return [replace(BUSY, at_s=float(s), **more) for s in range(0, seconds + 1, 5)]  # type: ignore[arg-type]


def kinds(verdicts: Iterable[Verdict]) -> list[Kind]:
    return [v.kind for v in verdicts]


def test_requests_without_any_movement_for_the_whole_bound_and_no_answer_to_a_probe_are_a_wedge() -> None:
    _, verdicts = looks(OLD, still(60))
    assert kinds(verdicts[:6]) == [Kind.WELL] * 6
    assert kinds(verdicts[6:12]) == [Kind.PROBE] * 6
    assert verdicts[-1].kind is Kind.WEDGED
    assert "60 s with 2 requests" in verdicts[-1].reason


def test_standing_still_alone_condemns_nobody_while_probes_are_answered_or_still_out() -> None:
    for answered in (True, None):
        _, verdicts = looks(OLD, still(600), probes=answered)
        assert Kind.WEDGED not in kinds(verdicts)


@pytest.mark.parametrize("moves", ["generated", "prompted", "steps", "kv_share"])
def test_a_long_prefill_is_alive_as_long_as_anything_of_it_moves(moves: str) -> None:
    change: dict[str, Any] = {}
    vitals = [replace(v, **(change | {moves: i * 0.001})) for i, v in enumerate(still(600))]
    assert set(kinds(looks(OLD, vitals)[1])) == {Kind.WELL}


def test_an_engine_that_was_launched_lately_has_the_longer_bound_for_it_compiles() -> None:
    young = Track(0.0).resumed(0.0)
    _, verdicts = looks(young, still(175))
    assert Kind.WEDGED not in kinds(verdicts)
    assert looks(young, still(180))[1][-1].kind is Kind.WEDGED


def test_broadcast_warnings_shorten_the_bound_and_prove_nothing_alone() -> None:
    warned = [replace(v, warnings=int(v.at_s >= 10)) for v in still(30)]
    assert looks(OLD, warned)[1][-1].kind is Kind.WEDGED
    assert looks(OLD, still(30))[1][-1].kind is Kind.PROBE
    moving = [replace(v, generated=v.at_s) for v in warned]
    assert set(kinds(looks(OLD, moving)[1])) == {Kind.WELL}


def test_an_idle_engine_stands_still_for_ever_and_is_well() -> None:
    idle = [replace(v, in_flight=0, running=0) for v in still(3000)]
    assert set(kinds(looks(OLD, idle)[1])) == {Kind.WELL}


def test_an_engine_that_wedged_while_idle_is_found_by_its_regular_probe() -> None:
    bounds = replace(BOUNDS, probe_every_s=100)
    idle = [replace(v, in_flight=0, running=0) for v in still(170)]
    _, verdicts = looks(OLD, idle, bounds)
    assert verdicts[20].kind is Kind.PROBE
    assert verdicts[-1].kind is Kind.WEDGED
    assert Kind.WEDGED not in kinds(looks(OLD, idle, bounds, probes=True)[1])


def test_gateway_requests_that_the_engine_never_counted_are_work_too() -> None:
    unseen = [replace(v, running=0) for v in still(60)]
    assert looks(OLD, unseen)[1][-1].kind is Kind.WEDGED


def test_a_wake_begins_all_clocks_anew_and_keeps_what_was_learned() -> None:
    track, _ = looks(OLD, still(55))
    again = track.resumed(1000.0)
    assert again.learned == track.learned
    assert observe(again, replace(BUSY, at_s=1001.0), BOUNDS)[1].kind is Kind.WELL


def test_a_wedge_is_noticed_within_the_time_that_is_promised() -> None:
    assert noticed_within_s(BOUNDS, every_s=5, probe_deadline_s=10) == 70
    assert noticed_within_s(BOUNDS, every_s=5, probe_deadline_s=50) == 95


# -- throughput and acceptance ----------------------------------------------------------------------------------------


def decoding(rates: Iterable[float], running: int = 4) -> list[Vitals]:
    made, generated = [Vitals(0.0, running, running)], 0.0
    for i, rate in enumerate(rates, start=1):
        generated += 30 * rate
        made.append(Vitals(30.0 * i, running, running, generated=generated, steps=i))
    return made


def test_an_engine_far_below_its_own_median_for_some_windows_is_slow() -> None:
    _, verdicts = looks(OLD, decoding([200.0] * 12 + [30.0] * 6))
    assert kinds(verdicts[:-1]) == [Kind.WELL] * 18
    assert verdicts[-1].kind is Kind.SLOW
    assert "usual at this load are 200" in verdicts[-1].reason


def test_a_single_slow_window_another_load_or_no_baseline_is_not_slow() -> None:
    dips = [200.0] * 12 + [20.0] * 5 + [200.0] + [20.0] * 5
    assert Kind.SLOW not in kinds(looks(OLD, decoding(dips))[1])
    assert Kind.SLOW not in kinds(looks(OLD, decoding([20.0] * 30))[1])
    track, _ = looks(OLD, decoding([800.0] * 12, running=32))
    assert Kind.SLOW not in kinds(looks(track.resumed(0.0), decoding([20.0] * 12, running=1))[1])


def test_a_window_over_which_the_load_changed_much_is_not_judged() -> None:
    track, _ = looks(OLD, decoding([800.0] * 12, running=8))
    changing = [replace(v, running=8 if i % 2 else 1) for i, v in enumerate(decoding([50.0] * 12))]
    assert Kind.SLOW not in kinds(looks(track.resumed(0.0), changing)[1])


def test_slow_windows_do_not_become_the_new_usual() -> None:
    track, _ = looks(OLD, decoding([200.0] * 12 + [30.0] * 40))
    assert max(track.learned.rates[2]) == min(track.learned.rates[2]) == 200.0


def drafting(shares: Iterable[tuple[float, ...]]) -> list[Vitals]:
    made, totals = [Vitals(0.0, drafts=0.0, accepted=(0.0, 0.0))], [0.0, 0.0]
    for i, share in enumerate(shares, start=1):
        totals = [t + 1000 * s for t, s in zip(totals, share, strict=True)]
        made.append(Vitals(30.0 * i, drafts=1000.0 * i, accepted=tuple(totals), generated=float(i)))
    return made


def test_acceptance_that_falls_to_about_zero_is_told_with_what_was_usual() -> None:
    _, verdicts = looks(OLD, drafting([(0.8, 0.5)] * 4 + [(0.0, 0.0)] * 6))
    assert kinds(verdicts[:-1]) == [Kind.WELL] * 10
    assert verdicts[-1].kind is Kind.ACCEPTANCE
    assert "80.0%, 50.0%" in verdicts[-1].reason


def test_poor_later_positions_or_few_drafts_are_no_loss_of_draft_weights() -> None:
    assert set(kinds(looks(OLD, drafting([(0.3, 0.0)] * 30))[1])) == {Kind.WELL}
    few = replace(BOUNDS, drafts_min=5000)
    assert set(kinds(looks(OLD, drafting([(0.0, 0.0)] * 30), few)[1])) == {Kind.WELL}


# -- residue ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("residues", "restarts"),
    [
        ((13, 27, 41), True),  # the field's, before it hurt
        ((2, 3, 4, 5, 6), True),
        ((2, 9), False),  # one jump: a workspace that came to stay
        ((2, 9, 9, 9), False),
        ((2, 3, 2, 3, 2), False),
        ((), False),
    ],
)
def test_residue_that_goes_on_growing_asks_for_a_restart(residues: tuple[int, ...], restarts: bool) -> None:
    why = residue_growth(tuple(r * GIB for r in residues), ResidueBounds(4 * GIB, 2))
    assert bool(why) is restarts
