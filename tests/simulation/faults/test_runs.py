"""Brief lives with faults of every kind. ``rotator soak`` runs longer ones, and more."""

import pytest

from rotator.sim.faults.generate import make_script
from rotator.sim.faults.run import run_script
from rotator.sim.faults.soak import Summary

SEEDS_A_TEST = 20


@pytest.mark.parametrize("first", range(1, 101, SEEDS_A_TEST))
def test_every_invariant_holds_whatever_fails(first: int) -> None:
    summary = Summary()
    for seed in range(first, first + SEEDS_A_TEST):
        outcome = run_script(make_script(seed, brief=True))
        assert outcome.failure is None, "\n".join((f"seed {seed}: {outcome.failure}", *outcome.trace))
        summary.add(outcome)
    # It proves something: requests were answered, faults happened, and each kind of thing was looked at.
    assert summary.requests["whole"] > 4 * SEEDS_A_TEST
    assert sum(summary.injected.values()) > 2 * SEEDS_A_TEST
    assert len(summary.checks) >= 15
