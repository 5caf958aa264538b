"""What the service's own policy is shown in a replay."""

from hypothesis import given
from hypothesis import strategies as st

from rotator.config_policies import PoliciesConfig
from rotator.core.history import Chains, History, expect
from rotator.core.planner import plan
from rotator.core.values import Snapshot
from rotator.sim.box import Box
from rotator.sim.machine import Machine
from rotator.sim.ours import Ours
from tests.unit.sim.machines import box, machine, spec

POLICIES = PoliciesConfig()


class Shown(Ours):
    """Keeps all that its planner was shown."""

    def __init__(self, made: Machine) -> None:
        super().__init__(made, POLICIES)
        self.seen: list[Snapshot] = []

    def snapshot(self, box: Box) -> Snapshot:
        self.seen.append(super().snapshot(box))
        return self.seen[-1]


def shown(requests: list[tuple[float, int, float]]) -> list[Snapshot]:
    """A replay of two engines that take turns on one GPU, the second awake at first."""
    made = machine(spec("a"), spec("b"))
    policy = Shown(made)
    box(made, requests, policy, awake=[1]).run()
    return policy.seen


def test_all_who_come_at_one_moment_are_seen_when_together_they_end_a_turn():
    seen = shown([(0, 1, 30), (9, 0, 5), (9, 0, 5), (9, 0, 5)])
    at_once = [s.engines["a"].demand.waiting for s in seen if s.now_s == 9]
    assert at_once == [1, 2]  # between two a turn lasts until twice as many wait as are served


def test_the_turn_of_few_ends_for_fewer_once_some_of_them_are_served():
    seen = shown([(0, 1, 2), (0, 1, 90), *[(20 + n / 100, 0, 5) for n in range(4)]])
    looks = [(s.now_s, s.engines["a"].demand.waiting) for s in seen if 20 <= s.now_s < 21]
    assert looks[:2] == [(20.0, 1), (20.01, 2)]


class Sparing(Ours):
    """Plans all the same for everyone whom it does not mind, and finds that it would have begun nothing."""

    def minds(self, box: Box, engine: int) -> bool:
        minded = super().minds(box, engine)
        if not minded:
            assert plan(self.snapshot(box)).swaps == ()
        return minded


REQUESTS = st.lists(st.tuples(st.floats(0, 60), st.integers(0, 3), st.just(30.0)), min_size=20, max_size=60)


@given(REQUESTS, st.floats(1, 4), st.sampled_from([0.02, 0.1, 0.5]))
def test_no_plan_that_is_spared_would_have_begun_anything(
    requests: list[tuple[float, int, float]], margin: float, share: float
):
    made = machine(spec("a"), spec("b"), spec("c", gpus=(1,)), spec("wide", gpus=(0, 1), slots=2))
    policies = POLICIES.model_copy(update={"turn_margin": margin, "swap_share": share, "prewake_chance": None})
    box(made, sorted(requests), Sparing(made, policies), awake=[0, 2]).run()


def test_an_idle_engines_chance_is_what_its_past_says_when_it_is_looked_up():
    seen = shown([(0, 1, 1), (10, 1, 1), (20, 1, 1), (30, 0, 5)])
    chains, past = Chains(), History()
    for at_s in (0, 10, 20):
        past.arrived(at_s, at_s)
        chains.arrived("b", at_s)
    chains.arrived("a", 30)
    here = next(s for s in seen if s.now_s == 30)
    demand = here.engines["b"].demand
    assert demand.likely_wanted == expect(past, chains, "b", 30, POLICIES.wanted_horizon_s, 30).chance > 0
    assert demand.soon == expect(past, chains, "b", 30, POLICIES.prewake_horizon_s, 30).chance


def test_a_chance_that_was_looked_up_a_moment_ago_stands_until_the_next_request():
    made = machine(spec("a"), spec("b"))
    policy = Shown(made)
    one = box(made, [(0, 1, 1), (10, 1, 1), (20, 1, 1), (40, 1, 1)], policy, awake=[1])
    chances = []
    for at_s in (30.0, 30.5, 39.0):
        one.run(at_s)
        chances.append(policy.snapshot(one).engines["b"].demand.likely_wanted)
    assert chances[0] == chances[1] != chances[2]


def test_engines_in_use_are_not_asked_how_likely_they_are_wanted():
    seen = shown([(0, 1, 30), (5, 1, 30), (6, 0, 5)])
    assert {s.engines["b"].demand.likely_wanted for s in seen if s.engines["b"].demand.in_flight} == {0.0}
