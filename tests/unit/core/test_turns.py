"""Contended turns: who is next, when a turn ends, whether streams finish or freeze; never starving, never thrashing."""

import random
from dataclasses import dataclass, field, replace
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rotator.config_policies import PoliciesConfig
from rotator.core.fairness import bounds_feasible, contradictions, least_round_s
from rotator.core.history import SwapTime
from rotator.core.planner import plan
from rotator.core.policy import by_turn
from rotator.core.turns import drain_s, due_in_s, quota_s, served, stays_until_s, urgency
from rotator.core.values import Action, BlockKind, Demand, Depth, Engine, Gpu, Level, Policy, Snapshot, State, Swap
from tests.unit.core.fleets import TOTAL, awake, engine, only_swap, snapshot, waiting

OURS = Policy(swap_share=0.1, urgency=True, preempt=True, longest_wait_s=300.0)
NOW_S = 1000.0


def busy(
    name: str = "a", flying: int = 1, since_s: float = 0.0, service_s: float | None = 20.0, **more: object
) -> Engine:
    demand = Demand(in_flight=flying, service_s=service_s)
    return awake(name, awake_since_s=since_s, demand=demand, sleep_cost_s=1.0, wake_cost_s=1.0, **more)


def wish(name: str = "b", many: int = 1, oldest_s: float = 1.0, **more: object) -> Engine:
    demand = Demand(many, oldest_s, service_s=20.0, **more)  # type: ignore[arg-type]
    return engine(name, demand=demand, sleep_cost_s=1.0, wake_cost_s=1.0)


# -- order -------------------------------------------------------------------------------------------------------------


def test_whoever_serves_more_at_once_goes_first_and_waiting_makes_up_for_it() -> None:
    many, old = wish("many", 4, 1.0), wish("old", 1, 250.0)
    assert [e.name for e in by_turn(snapshot(many, wish("few", 2, 1.0), old, policy=OURS))] == ["old", "many", "few"]


def test_a_wish_that_is_due_goes_before_all_others_and_the_oldest_first() -> None:
    late, later = wish("late", 1, 260.0), wish("later", 1, 280.0)
    assert due_in_s(late, OURS, rivals=2) == 0.0
    assert [e.name for e in by_turn(snapshot(wish("many", 50, 20.0), late, later, policy=OURS))] == [
        "later", "late", "many"
    ]  # fmt: skip


def test_a_wish_is_due_early_enough_for_every_rival_to_have_its_quota_before() -> None:
    for rivals in (1, 3, 10):
        due_s = due_in_s(wish(oldest_s=0.0), OURS, rivals)
        assert due_s + rivals * quota_s(wish(), OURS, rivals) <= 300.0
        assert due_s > 100.0


def test_an_engine_serves_no_more_at_once_than_it_has_slots() -> None:
    assert served(replace(wish(many=50), slots=8)) == 8.0
    assert urgency(replace(wish(many=50), slots=8), OURS) < urgency(wish(many=50), OURS)


def test_one_client_counts_no_more_than_its_share_for_the_turn() -> None:
    crowd = replace(wish("crowd", 100), demand=Demand(100, 1.0, weight=8.0))
    assert by_turn(snapshot(crowd, wish("others", 20, 1.0), policy=OURS))[0].name == "others"


# -- how long a turn lasts ---------------------------------------------------------------------------------------------


def test_swaps_that_have_cost_more_than_their_share_make_turns_longer() -> None:
    cheap = stays_until_s(busy(flying=1), wish(many=9), NOW_S, OURS, swapping=0.09)
    dear = stays_until_s(busy(flying=1), wish(many=9), NOW_S, OURS, swapping=0.2)
    assert cheap <= NOW_S < dear
    assert stays_until_s(busy(flying=1), wish(many=9), NOW_S, OURS, swapping=0.3) > dear
    fleet = snapshot(busy(), wish(many=9), policy=OURS, gpus=[Gpu("0", TOTAL, swapping=0.2)])
    (blocked,) = plan(fleet).blocked
    assert blocked.kind is BlockKind.STAY
    assert NOW_S < (blocked.until_s or 0.0) <= dear


def test_the_time_of_swaps_is_forgotten() -> None:
    time = SwapTime()
    time.spent(30.0, 100.0)
    assert time.share(100.0) == pytest.approx(0.1)
    time.spent(30.0, 100.0)
    assert time.share(100.0) == pytest.approx(0.2)
    assert time.share(1000.0) < 0.02


def test_a_turn_ends_when_so_many_times_as_many_would_be_served() -> None:
    assert stays_until_s(busy(flying=2), wish(many=5), NOW_S, OURS) > NOW_S
    assert stays_until_s(busy(flying=2), wish(many=6), NOW_S, OURS) <= NOW_S


def test_between_two_whose_gpus_nobody_else_wants_fewer_are_enough() -> None:
    pair = replace(OURS, pair_margin=2.0)
    two = [busy(flying=2), wish(many=4, oldest_s=0.0)]
    assert plan(snapshot(*two, policy=OURS)).swaps == ()
    assert only_swap(plan(snapshot(*two, policy=pair))).admit is not None
    assert plan(snapshot(*two, wish("third", many=1, oldest_s=0.0), policy=pair)).swaps == ()


def test_waiting_ends_every_turn() -> None:
    ends_s = stays_until_s(busy(flying=6), wish(many=1), NOW_S, OURS)
    assert NOW_S < ends_s <= NOW_S + 300.0
    assert stays_until_s(busy(flying=6), wish(many=1, oldest_s=ends_s - NOW_S + 1.0), ends_s, OURS) <= ends_s


def test_a_turn_that_nobody_uses_ends_at_once() -> None:
    idle = awake("a", awake_since_s=NOW_S - 0.1)
    assert only_swap(plan(snapshot(idle, wish(), policy=OURS))).evict[0].engine == "a"


def test_no_turn_is_shorter_than_the_minimum_stay_also_for_a_wish_that_is_due() -> None:
    late = wish(oldest_s=1000.0)
    fresh = busy(since_s=NOW_S - 0.5)
    assert stays_until_s(fresh, late, NOW_S, OURS) >= fresh.awake_since_s + OURS.min_stay_s
    blocked = plan(snapshot(fresh, late, policy=OURS)).blocked
    assert [(b.kind, b.until_s) for b in blocked] == [(BlockKind.STAY, fresh.awake_since_s + OURS.min_stay_s)]


def test_as_long_as_a_wish_is_due_no_turn_is_longer_than_its_quota() -> None:
    late, quota = wish(oldest_s=1000.0), quota_s(wish(), OURS, 1)
    ends_s = stays_until_s(busy(flying=50, since_s=NOW_S - 5.0), late, NOW_S, OURS)
    assert NOW_S < ends_s <= NOW_S - 5.0 + quota
    assert stays_until_s(busy(flying=50, since_s=NOW_S - quota), late, NOW_S, OURS) <= NOW_S


def test_light_engines_that_come_in_together_count_together_against_a_heavy_one() -> None:
    heavy = busy("heavy", flying=2, gpus="0123")
    lights = [replace(wish(f"light{g}", 2), gpus=(g,), awake_bytes=(80,), residue_bytes=(5,)) for g in "0123"]
    assert plan(snapshot(heavy, lights[0], policy=OURS)).swaps == ()
    assert only_swap(plan(snapshot(heavy, *lights, policy=OURS))).evict[0].engine == "heavy"


def test_a_wish_that_waits_for_a_turn_to_end_does_not_keep_others_from_free_room() -> None:
    wide = replace(wish("wide", 1), gpus=("0", "1"), awake_bytes=(80, 80), residue_bytes=(5, 5))
    narrow = replace(wish("narrow", 1, 0.5), gpus=("1",))
    result = plan(snapshot(busy(gpus="0", flying=5), wide, narrow, policy=OURS))
    assert [s.admit.engine for s in result.swaps if s.admit] == ["narrow"]


def test_a_wish_that_is_due_keeps_its_gpus_for_itself() -> None:
    late = replace(wish("late", 1, 1000.0), gpus=("0", "1"), awake_bytes=(80, 80), residue_bytes=(5, 5))
    narrow = replace(wish("narrow", 9, 0.5), gpus=("1",))
    assert plan(snapshot(busy(gpus="0", flying=5, since_s=NOW_S - 0.5), late, narrow, policy=OURS)).swaps == ()


# -- finish or freeze --------------------------------------------------------------------------------------------------


def test_many_streams_that_soon_end_may_finish_for_one_who_waits() -> None:
    assert 0.0 < drain_s(busy(flying=20, service_s=1.0), wish(), OURS) <= OURS.drain_max_s


def test_a_priced_drain_never_makes_the_wish_overdue_by_more_than_an_unpriced_one() -> None:
    patient, pressed = wish(), replace(wish(), demand=replace(wish().demand, oldest_wait_s=OURS.longest_wait_s or 0.0))
    long = busy(flying=200, service_s=500.0)
    assert drain_s(long, patient, OURS) == OURS.drain_max_s
    assert drain_s(long, pressed, OURS) == OURS.drain_bound_s


def test_few_streams_freeze_at_once_for_many_who_wait() -> None:
    assert drain_s(busy(flying=1), wish(many=5), OURS) == 0.0
    step = only_swap(plan(snapshot(busy(flying=1), wish(many=5), policy=OURS))).evict[0]
    assert step.drain_bound_s == 0.0
    assert "freeze at once" in step.reason


def test_nothing_is_priced_without_a_time_of_service_or_with_pricing_switched_off() -> None:
    assert drain_s(busy(service_s=None), wish(many=5), OURS) == OURS.drain_bound_s
    assert drain_s(busy(), wish(many=5), replace(OURS, preempt=False)) == OURS.drain_bound_s
    assert drain_s(busy(), None, OURS) == OURS.drain_bound_s


def test_streams_that_have_stood_still_for_long_are_due_before_their_bound() -> None:
    frozen = engine("f", wake_cost_s=2.0, demand=Demand(frozen=1, oldest_wait_s=5.0, stall_left_s=1.5))
    assert due_in_s(frozen, OURS) == 0.0
    later = replace(frozen, demand=replace(frozen.demand, stall_left_s=60.0))
    assert due_in_s(later, OURS, rivals=0) == 58.0
    least_s = OURS.min_stay_s + OURS.drain_bound_s + later.sleep_cost_s + later.wake_cost_s
    assert due_in_s(later, OURS, rivals=3) == 58.0 - 3 * least_s  # each rival may have its least turn first
    assert by_turn(snapshot(frozen, wish(many=50), policy=OURS))[0].name == "f"


# -- by bytes ----------------------------------------------------------------------------------------------------------


ELASTIC = Policy(elastic=True)


def test_an_elastic_engine_frees_no_more_than_is_lacking_and_keeps_its_weights() -> None:
    giving = awake("a", awake=60, kv_bytes=(40,), elastic=True, host_bytes=20, demand=Demand(likely_wanted=0.5))
    step = only_swap(plan(snapshot(giving, engine("b", awake=70, demand=waiting()), policy=ELASTIC))).evict[0]
    assert (step.action, step.level, step.depth) == (Action.SLEEP, Level.PAUSE, Depth.KV)
    assert step.bytes_per_gpu == (("0", -30),)
    assert "KV cache first" in step.reason


def test_an_engine_asleep_by_bytes_is_charged_with_what_it_still_holds_and_wakes_by_the_rest() -> None:
    resting = engine("a", awake=60, residue=5, held_bytes=(25,), depth=Depth.KV, elastic=True, demand=waiting())
    swap = only_swap(plan(snapshot(resting, awake("b", awake=30, pinned=True), policy=ELASTIC)))
    assert swap.admit is not None
    assert swap.admit.bytes_per_gpu == (("0", 35),)
    assert swap.evict == ()


def test_an_engine_asleep_by_bytes_frees_more_when_more_is_lacking() -> None:
    resting = engine("a", awake=60, residue=5, held_bytes=(25,), depth=Depth.KV, elastic=True, host_bytes=20)
    fleet = snapshot(resting, engine("b", awake=85, demand=waiting()), policy=ELASTIC)
    step = only_swap(plan(fleet)).evict[0]
    assert (step.action, step.bytes_per_gpu) == (Action.SINK, (("0", -10),))


def test_elastic_sleeps_switched_off_are_whole_sleeps() -> None:
    giving = awake("a", awake=60, kv_bytes=(40,), elastic=True, host_bytes=20)
    step = only_swap(plan(snapshot(giving, engine("b", awake=70, demand=waiting())))).evict[0]
    assert step.level is Level.HOST


# -- bounds that contradict each other ---------------------------------------------------------------------------------


def crowd(many: int, gib: int = 80) -> tuple[list[Engine], dict[str, Gpu]]:
    return [engine(f"e{i}", awake=gib, wake_cost_s=2.0, sleep_cost_s=1.0) for i in range(many)], {"0": Gpu("0", TOTAL)}


def test_bounds_that_cannot_hold_together_are_told_with_what_would_help() -> None:
    engines, gpus = crowd(6)
    policy = Policy(min_stay_s=10.0, drain_bound_s=5.0, longest_wait_s=60.0)
    (line,) = contradictions(engines, policy, gpus)
    assert "6 engines take turns on 0" in line
    assert f"raise longest_wait_s above {least_round_s(engines, policy):.0f}" in line
    assert not bounds_feasible(engines, policy, gpus)
    assert contradictions(engines, replace(policy, longest_wait_s=600.0), gpus) == ()
    assert bounds_feasible(engines, replace(policy, longest_wait_s=None), gpus)


def test_a_share_of_swaps_that_the_longest_wait_does_not_allow_is_told() -> None:
    engines, gpus = crowd(6)
    (line,) = contradictions(engines, Policy(min_stay_s=0.0, longest_wait_s=120.0, swap_share=0.1), gpus)
    assert "10% of 180 s" in line


def test_engines_that_all_fit_beside_each_other_do_not_contend() -> None:
    engines, gpus = crowd(4, gib=20)
    assert contradictions(engines, Policy(min_stay_s=100.0, longest_wait_s=5.0), gpus) == ()


# -- played through ----------------------------------------------------------------------------------------------------

TICK_S = 0.5
SWAP_S = 2.0  # half of it sleep, half wake


@dataclass
class Stage:
    """Engines on one GPU that hold one of them at a time, requests that take their time, and the plans carried out."""

    names: list[str]
    rates_per_s: dict[str, float]
    rng: random.Random
    policy: Policy
    service_s: float = 4.0
    now_s: float = 0.0
    on: str | None = None
    since_s: float = -inf
    coming: str | None = None
    ready_s: float = 0.0
    queues: dict[str, list[float]] = field(default_factory=dict)
    left_s: dict[str, list[float]] = field(default_factory=dict)
    frozen_since_s: dict[str, float] = field(default_factory=dict)
    waits_s: list[float] = field(default_factory=list)
    stays_s: list[float] = field(default_factory=list)
    swaps: int = 0
    contended_s: float = 0.0
    spent: SwapTime = field(default_factory=SwapTime)

    def engine(self, name: str) -> Engine:
        line, flying = self.queues.setdefault(name, []), self.left_s.setdefault(name, [])
        state = State.AWAKE if name == self.on else State.WAKING if name == self.coming else State.ASLEEP
        frozen = len(flying) if state is State.ASLEEP else 0
        oldest = [*line[:1], *([self.frozen_since_s[name]] if frozen else [])]
        demand = Demand(
            len(line), self.now_s - min(oldest) if oldest else 0.0, len(flying), frozen, service_s=self.service_s
        )
        return engine(name, state=state, awake=90, residue=1, demand=demand, awake_since_s=self.since_s,
                      wake_cost_s=SWAP_S / 2, sleep_cost_s=SWAP_S / 2, host_bytes=0)  # fmt: skip

    def tick(self) -> None:
        self.now_s += TICK_S
        for name in self.names:
            if self.rng.random() < self.rates_per_s[name] * TICK_S:
                self.queues.setdefault(name, []).append(self.now_s)
        if self.coming is not None and self.now_s >= self.ready_s:
            self.on, self.coming, self.since_s = self.coming, None, self.now_s
            self.waits_s += [self.now_s - s for s in [self.frozen_since_s.pop(self.on, self.now_s)]]
        if self.on is not None:
            self.waits_s += [self.now_s - since_s for since_s in self.queues[self.on]]
            self.left_s[self.on] += [self.rng.expovariate(1 / self.service_s) for _ in self.queues[self.on]]
            self.queues[self.on] = []
            self.left_s[self.on] = [rest - TICK_S for rest in self.left_s[self.on] if rest > TICK_S]
        engines = {name: self.engine(name) for name in self.names}
        claimed = frozenset("0") if self.coming else frozenset[str]()
        gpu = Gpu("0", TOTAL, swapping=self.spent.share(self.now_s))
        seen = Snapshot(self.now_s, {"0": gpu}, engines, 10**6, claimed=claimed, policy=self.policy)
        for swap in plan(seen).swaps:
            self.begin(swap)

    def begin(self, swap: Swap) -> None:
        if self.on is not None and swap.evict:
            if self.left_s[self.on]:
                self.stays_s.append(self.now_s - self.since_s)
                self.frozen_since_s[self.on] = self.now_s
                self.contended_s += SWAP_S
                self.spent.spent(SWAP_S, self.now_s)
            self.on = None
        if swap.admit is not None:
            self.swaps += 1
            self.coming, self.ready_s = swap.admit.engine, self.now_s + SWAP_S

    def longest_wait_s(self) -> float:
        """Of those who were served and those who still wait."""
        still = [self.now_s - s for line in self.queues.values() for s in line]
        return max([*self.waits_s, *still, *(self.now_s - s for s in self.frozen_since_s.values())], default=0.0)


def played(policy: Policy, rates_per_s: dict[str, float], seconds: float, seed: int = 1) -> Stage:
    stage = Stage(list(rates_per_s), rates_per_s, random.Random(seed), policy)
    while stage.now_s < seconds:
        stage.tick()
    return stage


SHIPPED = replace(
    PoliciesConfig().core(), longest_wait_s=90.0, drain_bound_s=0.0, drain_max_s=0.0
)  # the stage freezes at once


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from((0.02, 0.3, 2.0)), min_size=2, max_size=4), st.integers(0, 2**32))
def test_both_bounds_hold_at_once_under_any_load(rates: list[float], seed: int) -> None:
    """Nobody waits longer than the longest wait and a swap, and no busy engine leaves before its minimum stay."""
    stage = played(SHIPPED, {f"e{i}": rate for i, rate in enumerate(rates)}, 300.0, seed)
    assert stage.longest_wait_s() <= 90.0 + SWAP_S + 3 * TICK_S
    assert min(stage.stays_s, default=inf) >= SHIPPED.min_stay_s


def test_swaps_cost_no_more_than_their_share_when_everybody_is_wanted_all_the_time() -> None:
    stage = played(replace(SHIPPED, longest_wait_s=600.0), {"a": 2.0, "b": 2.0}, 1500.0)
    assert 0.03 < stage.contended_s / 1500.0 <= 0.1 + 30.0 / 1500.0  # the first tenth of a window is free


def test_turns_without_prices_swap_several_times_as_often_under_the_same_load() -> None:
    restless = played(replace(SHIPPED, swap_share=None, longest_wait_s=None), {"a": 2.0, "b": 2.0}, 300.0)
    assert restless.contended_s / 300.0 > 0.3


def test_a_rare_model_is_served_beside_one_that_never_rests() -> None:
    stage = played(SHIPPED, {"never rests": 3.0, "rare": 0.02}, 600.0)
    assert stage.longest_wait_s() <= 90.0 + SWAP_S + 3 * TICK_S
    assert stage.swaps >= 4
