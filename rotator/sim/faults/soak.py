"""Many seeds on all cores, and what came of them."""

import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field

from rotator.sim.faults.generate import make_script
from rotator.sim.faults.run import Outcome, run_script

SEEDS_A_TASK = 10


@dataclass(slots=True)
class Summary:
    """What the runs injected, asked and checked, and the seeds that failed, with the invariant that broke."""

    seeds: int = 0
    virtual_s: float = 0.0
    requests: Counter[str] = field(default_factory=Counter)
    injected: Counter[str] = field(default_factory=Counter)
    checks: Counter[str] = field(default_factory=Counter)
    failures: dict[int, tuple[str, str]] = field(default_factory=dict)

    def add(self, outcome: Outcome) -> None:
        self.seeds += 1
        self.virtual_s += outcome.virtual_s
        self.requests += outcome.requests
        self.injected += outcome.injected
        self.checks += outcome.checks
        if outcome.failure is not None:
            self.failures[outcome.seed] = outcome.failure


def run_some(seeds: range) -> list[Outcome]:
    """Run these one after another. A simulation that itself fails counts as a failure of its seed."""
    outcomes = []
    for seed in seeds:
        try:
            outcomes.append(run_script(make_script(seed)))
        except Exception as e:
            failure = "the simulation runs", repr(e)
            outcomes.append(Outcome(seed, failure, "", 0.0, Counter(), Counter(), Counter()))
    return outcomes


def run_many(seeds: range, jobs: int) -> Iterator[Outcome]:
    """Outcomes as they come, not in order. Processes are started anew: nothing of this one's state is in theirs."""
    if jobs == 1:
        for seed in seeds:
            yield from run_some(range(seed, seed + 1))
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=os.nice, initargs=(10,)) as pool:
        tasks: list[Future[list[Outcome]]] = [
            pool.submit(run_some, seeds[i : i + SEEDS_A_TASK]) for i in range(0, len(seeds), SEEDS_A_TASK)
        ]
        for task in as_completed(tasks):
            yield from task.result()
