"""Synthetic traces: sessions of requests by a Zipf law of popularity, with chains, bursts and hours of the day.

Sessions come at random (Poisson), their rate following the hour where asked. A session is one model's: its first
request, then more with short gaps (a burst). With a chain, each request to a planner is followed by one to its coder
once it would have been served without any wait: gaps are fixed when the trace is made, no client reacts to a delay.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import cos, exp, log, pi
from random import Random

from rotator.sim.trace import Trace, TraceError, make

_DAY_S = 86_400.0
_REQUESTS_MAX = 50_000_000


@dataclass(frozen=True, slots=True)
class Shape:
    """What a synthetic trace looks like. ``rate_per_s`` counts requests, sessions are as many fewer as bursts are long.

    ``skew`` is Zipf's exponent: 0 asks for all models alike. ``burst`` is the mean number of requests of a session and
    ``gap_s`` their mean distance. ``service_s`` is the median of a log-normal law and ``spread`` its sigma. ``chain``
    is how likely a request to an even-ranked model is followed by one to the next rank. ``day`` in [0, 1] is how much
    quieter the night is: at 0.9 the rate swings between 0.1 and 1.9 of the mean, least at midnight.
    """

    duration_s: float = 86_400.0
    rate_per_s: float = 0.1
    models: int = 8
    skew: float = 1.0
    burst: float = 1.0
    gap_s: float = 10.0
    service_s: float = 10.0
    spread: float = 0.8
    chain: float = 0.0
    day: float = 0.0
    seed: int = 1

    def check(self) -> None:
        """Raises TraceError for what cannot be."""
        for name, value, least, most in (
            ("duration", self.duration_s, 1.0, 1e9),
            ("rate", self.rate_per_s, 1e-9, 1e6),
            ("models", self.models, 1, 100_000),
            ("skew", self.skew, 0.0, 10.0),
            ("burst", self.burst, 1.0, 1e6),
            ("gap", self.gap_s, 0.0, 1e6),
            ("service", self.service_s, 1e-3, 1e6),
            ("spread", self.spread, 0.0, 4.0),
            ("chain", self.chain, 0.0, 1.0),
            ("day", self.day, 0.0, 1.0),
        ):
            if not least <= value <= most:
                raise TraceError(f"{name} is {value:g}: it must be from {least:g} to {most:g}")
        if self.duration_s * self.rate_per_s > _REQUESTS_MAX:
            raise TraceError(f"that would be over {_REQUESTS_MAX:,} requests: lower the rate or the duration")


def generate(shape: Shape) -> Trace:
    """The trace of that shape: the same seed gives the same trace. Raises TraceError."""
    shape.check()
    rng = Random(shape.seed)  # a simulation's dice
    rows = sorted(_rows(shape, rng))
    if not rows:
        raise TraceError("no request falls into that duration: raise the rate or the duration")
    return make((at, f"m{rank}", service) for at, rank, service in rows)


def _rows(shape: Shape, rng: Random) -> Iterator[tuple[float, int, float]]:
    weights = [1.0 / (rank + 1) ** shape.skew for rank in range(shape.models)]
    ranks = range(shape.models)
    links = 1.0 + shape.chain * sum(w for r, w in enumerate(weights) if _coder(r, shape) is not None) / sum(weights)
    sessions_per_s = shape.rate_per_s / (shape.burst * links)
    peak_per_s = sessions_per_s * (1.0 + shape.day)
    at = 0.0
    while True:
        at += rng.expovariate(peak_per_s)
        if at >= shape.duration_s:
            return
        if shape.day and rng.random() * (1.0 + shape.day) > 1.0 - shape.day * cos(2 * pi * at / _DAY_S):
            continue
        yield from _session(shape, rng, at, rng.choices(ranks, weights)[0])


def _session(shape: Shape, rng: Random, at: float, rank: int) -> Iterator[tuple[float, int, float]]:
    more = 1.0 - 1.0 / shape.burst
    while at < shape.duration_s:
        service = _service(shape, rng)
        yield at, rank, service
        coder = _coder(rank, shape)
        if coder is not None and shape.chain and rng.random() < shape.chain:
            yield at + service + rng.uniform(0.5, 2.0), coder, _service(shape, rng)
        if rng.random() >= more:
            return
        at += rng.expovariate(1.0 / shape.gap_s) if shape.gap_s else 0.0


def _coder(rank: int, shape: Shape) -> int | None:
    """Who follows a planner: the next rank, for even ranks that have one."""
    return rank + 1 if rank % 2 == 0 and rank + 1 < shape.models else None


def _service(shape: Shape, rng: Random) -> float:
    return exp(rng.gauss(log(shape.service_s), shape.spread)) if shape.spread else shape.service_s
