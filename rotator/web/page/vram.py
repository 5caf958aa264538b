"""Each GPU's bytes over time: samples of the ledger, and what was seen since, in rings of bounded length."""

from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

KEPT_S = 3600.0
POINTS_MAX = 150  # a chart's width in points
FOREIGN = "(foreign)"
_EVERY_S = 1.0  # no sample is kept closer to the one before
_SHOWN_MIN_S = 60.0
_GAP_STEPS = 4  # a hole this many steps wide is drawn as one
_GIB = 1 << 30

Held = Mapping[str, int]


@dataclass(slots=True)
class Ring:
    times: deque[float] = field(default_factory=lambda: deque(maxlen=int(KEPT_S / _EVERY_S)))
    held: deque[Held] = field(default_factory=lambda: deque(maxlen=int(KEPT_S / _EVERY_S)))

    def add(self, at_wall_s: float, held: Held) -> None:
        if not self.times or at_wall_s - self.times[-1] >= _EVERY_S:
            self.times.append(at_wall_s)
            self.held.append(held)

    @property
    def last_wall_s(self) -> float | None:
        return self.times[-1] if self.times else None


@dataclass(frozen=True, slots=True)
class Curves:
    """``times_ms`` and, by holder, GiB at each of them (None: nobody looked)."""

    times_ms: list[int]
    by_holder: dict[str, list[float | None]]


class Vram:
    def __init__(self) -> None:
        self._rings: dict[str, Ring] = {}

    def last_wall_s(self, gpu: str) -> float | None:
        return self._rings[gpu].last_wall_s if gpu in self._rings else None

    def see(self, gpu: Mapping[str, Any]) -> None:
        """Take a GPU's view, as it is now."""
        if gpu["read_at_wall_s"] is not None:
            held = {**gpu["by_engine"], FOREIGN: gpu["foreign_bytes"]}
            self._ring(gpu["id"]).add(gpu["read_at_wall_s"], held)

    def fill(self, gpu: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Take rows of the ledger, oldest first; those that lie before what is known make the ring anew."""
        old, self._rings[gpu] = self._rings.get(gpu, Ring()), Ring()
        samples = [(r["at_wall_s"], r["by_holder"]) for r in rows]
        samples += zip(old.times, old.held, strict=True)
        for at_wall_s, held in sorted(samples, key=lambda s: float(s[0])):
            self._rings[gpu].add(at_wall_s, held)

    def curves(self, gpu: str, holders: Iterable[str], window_s: float, now_wall_s: float) -> Curves:
        """The last ``window_s``, or as much of it as is known, thinned to what a chart can show."""
        ring = self._ring(gpu)
        times, held = list(ring.times), list(ring.held)
        if times:
            window_s = min(window_s, max(_SHOWN_MIN_S, now_wall_s - times[0]))
        step = max(_EVERY_S, window_s / POINTS_MAX)
        begin = int((now_wall_s - window_s) / step) * step
        at = [begin + i * step for i in range(1, int(window_s / step) + 1)]
        if times and times[-1] > at[-1]:
            at.append(times[-1])
        picked = [_at(times, held, t, step * _GAP_STEPS) for t in at]
        by_holder = {h: [None if p is None else round(p.get(h, 0) / _GIB, 2) for p in picked] for h in holders}
        return Curves([int(t * 1000) for t in at], by_holder)

    def _ring(self, gpu: str) -> Ring:
        return self._rings.setdefault(gpu, Ring())


def _at(times: list[float], held: list[Held], t: float, gap_s: float) -> Held | None:
    i = bisect_right(times, t) - 1
    return None if i < 0 or t - times[i] > max(gap_s, 5.0) else held[i]
