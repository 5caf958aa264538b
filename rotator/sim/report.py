"""What a replay came to: waits, stalls, swaps, bytes, fairness."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

from rotator.sim.box import Box

DEADLINE_S = 60.0
_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Result:
    """One policy over one trace. Times in seconds.

    ``wait`` is from arrival until service begins; ``gate_max_s`` is the longest part of one that was waited for the
    engine to open, which is what policies bound: the rest is for a slot in it. ``stall`` is what a request then stands
    still, frozen; ``delay`` is both: all the time in which it was not served. ``fairness`` is Jain's index over the
    models' mean delays, 1 where all models are delayed alike and 1/n where one bears it all. ``unserved`` were refused,
    gave up, or never came to an end. ``lost`` is the share of GPU time (GPUs times the span of the replay) that went
    into transitions. ``delays_s`` are the delay's percentiles from 0 to 100.
    """

    policy: str
    requests: int
    unserved: int
    wait_mean_s: float
    wait_p50_s: float
    wait_p95_s: float
    wait_p99_s: float
    wait_max_s: float
    gate_max_s: float
    stall_mean_s: float
    stall_max_s: float
    delay_mean_s: float
    delay_p50_s: float
    delay_p95_s: float
    delay_p99_s: float
    delay_max_s: float
    within_deadline: float
    deadline_s: float
    swaps_per_h: float
    moved_gib_per_h: float
    lost: float
    fairness: float
    freezes: int
    span_s: float
    decisions: int
    delays_s: tuple[float, ...] = ()
    wall_s: float = 0.0

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "requests_per_wall_s": round(self.requests / self.wall_s) if self.wall_s else None}


def result(name: str, box: Box, *, deadline_s: float = DEADLINE_S, wall_s: float = 0.0) -> Result:
    """Sum up a replay that has run to its end."""
    waits: list[float] = []
    delays: list[float] = []
    stall_sum = stall_max = 0.0
    by_model: dict[int, list[float]] = {}
    for at, first, done, service, engine in zip(box.at, box.first_s, box.done_s, box.service, box.engine, strict=True):
        if done != done:
            continue
        wait, stall = first - at, max(0.0, done - first - service)
        waits.append(wait)
        delays.append(wait + stall)
        stall_sum += stall
        stall_max = max(stall_max, stall)
        sums = by_model.setdefault(engine, [0.0, 0.0])
        sums[0] += wait + stall
        sums[1] += 1
    waits.sort()
    delays.sort()
    n = max(1, len(waits))
    span_s = max(max(box.at, default=0.0), max((d for d in box.done_s if d == d), default=0.0), 1e-9)
    hours = span_s / 3600
    return Result(
        policy=name,
        requests=len(box.at),
        unserved=len(box.at) - len(waits),
        wait_mean_s=sum(waits) / n,
        wait_p50_s=percentile(waits, 0.5),
        wait_p95_s=percentile(waits, 0.95),
        wait_p99_s=percentile(waits, 0.99),
        wait_max_s=waits[-1] if waits else 0.0,
        gate_max_s=box.counts.gate_s_max,
        stall_mean_s=stall_sum / n,
        stall_max_s=stall_max,
        delay_mean_s=sum(delays) / n,
        delay_p50_s=percentile(delays, 0.5),
        delay_p95_s=percentile(delays, 0.95),
        delay_p99_s=percentile(delays, 0.99),
        delay_max_s=delays[-1] if delays else 0.0,
        within_deadline=bisect_right(delays, deadline_s) / max(1, len(box.at)),
        deadline_s=deadline_s,
        swaps_per_h=box.counts.swaps / hours,
        moved_gib_per_h=box.counts.moved_bytes / _GIB / hours,
        lost=box.counts.lost_gpu_s / (span_s * len(box.machine.gpu_bytes)),
        fairness=jain([total / number for total, number in by_model.values()]),
        freezes=box.counts.freezes,
        span_s=span_s,
        decisions=box.counts.decisions,
        delays_s=tuple(round(percentile(delays, share / 100), 3) for share in range(101)),
        wall_s=wall_s,
    )


def percentile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that at least that share of all do not exceed (nearest rank); 0 of nothing."""
    return ordered[max(0, ceil(share * len(ordered)) - 1)] if ordered else 0.0


def jain(values: Sequence[float]) -> float:
    """Jain's fairness index, (sum x)^2 / (n sum x^2), in [1/n, 1]; 1 for nothing and for all zero."""
    squares = sum(v * v for v in values)
    return 1.0 if squares == 0.0 else sum(values) ** 2 / (len(values) * squares)
