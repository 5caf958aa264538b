"""Nobody is overtaken for ever: plans are carried out in a small world of their own, under any load."""

import random
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rotator.core.planner import plan
from rotator.core.values import Demand, Depth, Engine, EngineName, Gpu, Level, Policy, Snapshot, State, Swap
from tests.unit.core.fleets import TOTAL, engine, used

TICK_S = 0.25
POLICY = Policy(min_stay_s=2.0, priority_worth_s=5.0, drain_bound_s=0.5)
SWAP_MAX_S = 2.0
PRIORITIES = (-1, 0, 1)
_SETS = ("a", "b", "c", "d", "ab", "cd", "bc", "abcd")


@dataclass
class World:
    """Engines that swap as planned, each taking its time, and clients whose streams may never end."""

    engines: dict[EngineName, Engine]
    load: float  # chance of a new request for an engine in a tick
    rng: random.Random
    ends: float = 0.0  # chance that an awake engine's streams end in a tick
    policy: Policy = POLICY
    now_s: float = 100.0
    wanted_since_s: dict[EngineName, float] = field(default_factory=dict)
    evicting: list[tuple[float, Swap]] = field(default_factory=list)  # until when, and what
    admitting: list[tuple[float, Swap]] = field(default_factory=list)
    longest_wait_s: float = 0.0
    admitted: int = 0

    def snapshot(self) -> Snapshot:
        engines = {name: self._aged(e) for name, e in self.engines.items()}
        gpus = {id: Gpu(id, TOTAL) for e in engines.values() for id in e.gpus}
        claimed = frozenset(gpu for _, swap in self.evicting + self.admitting for gpu in swap.gpus)
        return Snapshot(self.now_s, gpus, engines, host_budget_bytes=0, claimed=claimed, policy=self.policy)

    def _aged(self, e: Engine) -> Engine:
        since_s = self.wanted_since_s.get(e.name, self.now_s)
        return replace(e, demand=replace(e.demand, oldest_wait_s=self.now_s - since_s))

    def tick(self) -> None:
        self.now_s += TICK_S
        for done in [item for item in self.admitting if item[0] <= self.now_s]:
            self.admitting.remove(done)
            self._admitted(done[1])
        for done in [item for item in self.evicting if item[0] <= self.now_s]:
            self.evicting.remove(done)
            self._evicted(done[1])
        for name in sorted(self.engines):
            self._clients(name)
        for swap in plan(self.snapshot()).swaps:
            self._begin(swap)
        self._check()

    def _clients(self, name: EngineName) -> None:
        e, demand = self.engines[name], self.engines[name].demand
        if e.state is State.AWAKE:
            flying = 0 if self.rng.random() < self.ends else demand.in_flight + (self.rng.random() < self.load)
            self.engines[name] = replace(e, demand=replace(demand, in_flight=flying))
        elif self.rng.random() < self.load:
            self.engines[name] = replace(e, demand=replace(demand, waiting=demand.waiting + 1))
            self.wanted_since_s.setdefault(name, self.now_s)

    def _begin(self, swap: Swap) -> None:
        for step in swap.evict:
            self.engines[step.engine] = replace(self.engines[step.engine], state=State.FALLING_ASLEEP)
        self.evicting.append((self._half_a_swap_later(), swap))

    def _half_a_swap_later(self) -> float:
        return self.now_s + self.rng.uniform(0, SWAP_MAX_S / 2)

    def _evicted(self, swap: Swap) -> None:
        for step in swap.evict:
            e = self.engines[step.engine]
            demand = Demand(e.demand.waiting, frozen=e.demand.in_flight)
            self.engines[e.name] = replace(e, state=State.ASLEEP, depth=Depth.DISCARDED, demand=demand)
            if demand.frozen or demand.waiting:
                self.wanted_since_s.setdefault(e.name, self.now_s)
        assert swap.admit is not None
        self.engines[swap.admit.engine] = replace(self.engines[swap.admit.engine], state=State.WAKING)
        self.admitting.append((self._half_a_swap_later(), swap))

    def _admitted(self, swap: Swap) -> None:
        assert swap.admit is not None
        e = self.engines[swap.admit.engine]
        demand = Demand(in_flight=e.demand.waiting + e.demand.frozen)
        self.engines[e.name] = replace(e, state=State.AWAKE, depth=None, demand=demand, awake_since_s=self.now_s)
        del self.wanted_since_s[e.name]
        self.admitted += 1

    def _check(self) -> None:
        snapshot = self.snapshot()
        assert all(used(snapshot, gpu) <= TOTAL for gpu in snapshot.gpus)
        waits = [self.now_s - since_s for since_s in self.wanted_since_s.values()]
        self.longest_wait_s = max([self.longest_wait_s, *waits])


def bound_s(engines: int) -> float:
    """Every other engine may have its turn first, and a head start by priority; the turn before is to be sat out."""
    head_start_s = POLICY.priority_worth_s * (max(PRIORITIES) - min(PRIORITIES))
    return head_start_s + (engines + 1) * (POLICY.min_stay_s + SWAP_MAX_S + 3 * TICK_S)


@st.composite
def worlds(draw: st.DrawFn) -> World:
    fleet: dict[EngineName, Engine] = {}
    for i in range(draw(st.integers(3, 9))):
        name = f"e{i}"
        fleet[name] = engine(
            name,
            draw(st.sampled_from(_SETS)),
            awake=draw(st.integers(10, 70)),
            residue=draw(st.integers(0, 3)),  # asleep they all fit beside any one that is awake
            levels=(Level.DISCARD,),
            priority=draw(st.sampled_from(PRIORITIES)),
            wake_cost_s=draw(st.floats(0.1, 5)),
        )
    load, ends = draw(st.sampled_from((0.02, 0.2, 1.0))), draw(st.sampled_from((0.0, 0.1)))
    return World(fleet, load, random.Random(draw(st.integers(0, 2**32))), ends)


@settings(max_examples=30, deadline=None)
@given(worlds())
def test_every_engine_that_is_wanted_gets_its_turn_within_a_bound(world: World) -> None:
    for _ in range(400):
        world.tick()
    assert world.longest_wait_s <= bound_s(len(world.engines))
    assert world.admitted > 0 or not world.wanted_since_s


def pairs(gpus: str, awake_bytes: int) -> list[Engine]:
    """Two engines on each of the GPUs that change places without end."""
    return [deep(f"{gpu}{i}", gpu, awake_bytes) for gpu in gpus for i in "01"]


def deep(name: str, gpus: str, awake_bytes: int) -> Engine:
    return engine(name, gpus, awake=awake_bytes, residue=1, levels=(Level.DISCARD,))


def restless(*fleet: Engine) -> World:
    """A world in which everybody is wanted all the time and nobody stays."""
    return World({e.name: e for e in fleet}, 1.0, random.Random(7), policy=replace(POLICY, min_stay_s=0.0))


def test_a_wide_engine_gets_its_turn_among_narrow_ones_that_never_rest() -> None:
    """At hardly any instant are all its GPUs free of a transition: they must be kept for it, one after the other."""
    world = restless(deep("wide", "abcdefgh", 90), *pairs("abcdefgh", 60))
    for _ in range(400):
        world.tick()
        assert world.now_s - world.wanted_since_s.get("wide", world.now_s) <= bound_s(3)
    assert world.admitted > 20


def test_an_engine_gets_its_turn_though_the_one_in_its_way_is_busy_on_other_gpus_all_the_time() -> None:
    """The wide engine must yield on GPU a; on its other GPUs small ones change places beside it without end."""
    wide = replace(deep("wide", "abcdefgh", 70), state=State.AWAKE, depth=None, demand=Demand(in_flight=1))
    world = restless(wide, deep("narrow", "a", 60), *pairs("bcdefgh", 20))
    turns = 0
    for _ in range(400):
        world.tick()
        turns += world.engines["narrow"].state is State.AWAKE
        assert world.now_s - world.wanted_since_s.get("narrow", world.now_s) <= bound_s(3)
    assert turns > 0


@pytest.mark.parametrize("priority", PRIORITIES)
def test_ageing_outgrows_any_priority(priority: int) -> None:
    fleet = [engine(f"e{i}", "a", priority=1, levels=(Level.DISCARD,)) for i in range(4)]
    low = engine("low", "a", priority=priority, levels=(Level.DISCARD,))
    world = World({e.name: e for e in (low, *fleet)}, 1.0, random.Random(1))
    turns = 0
    for _ in range(400):
        world.tick()
        turns += world.engines["low"].state is State.AWAKE
    assert turns > 0
    assert world.longest_wait_s <= bound_s(5)
