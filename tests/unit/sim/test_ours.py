"""What the service's own policy is shown in a replay."""

from rotator.config_policies import PoliciesConfig
from rotator.core.history import Chains, History, expect
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


def test_all_who_come_at_one_moment_are_seen():
    seen = shown([(0, 1, 30), (1, 0, 5), (1, 0, 5), (1, 0, 5)])
    at_once = [s.engines["a"].demand.waiting for s in seen if s.now_s == 1]
    assert at_once == [1, 2, 3]


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
