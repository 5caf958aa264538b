"""What an engine's own past says about when it is wanted next, and how long a request keeps it busy.

Accumulators without a clock: time is an argument of every call, and a request costs a handful of additions. Three
clocks tick in a history: the gaps between requests (a histogram over powers of two, given the silence so far), the time
of day (how often a quarter of an hour of the local day had requests), and which model's requests this one's follow.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, expm1, floor, log2
from typing import Any

from rotator.core.values import EngineName

_GAP_FIRST_S = 0.125  # gaps below fall into the first bucket
_GAP_BUCKETS = 26  # up to 2**25 * 0.125 s: 48 days
_GAP_KEEP = 0.98  # what a gap's weight keeps with every later one: about the last 50 count
_SURE_AFTER = 8.0  # gaps seen until the histogram is believed over the plain rate
_DAY_S = 86_400.0
SLOTS = 96  # quarters of an hour in a day
_SLOT_S = _DAY_S / SLOTS
_SLOT_NEW = 0.3  # weight of a new day in what a slot is known for
_SERVICE_NEW = 0.1  # weight of a new request in the mean time in service
_RENORMALIZE_AT = 1e12
SWAP_WINDOW_S = 300.0
CHAIN_WINDOW_S = 60.0  # a request this long after another model's may be the next link of a chain
_CHAIN_KEEP = 0.98
_CHAIN_LINKS_MIN = 4.0  # a link is believed after so many
_CHAIN_MODELS_MAX = 256  # followers told apart after one model


@dataclass(frozen=True, slots=True)
class Expectation:
    """How likely an engine is asked for within a horizon, in [0, 1], and in words what says so."""

    chance: float
    why: str = ""


class History:
    """One engine's requests."""

    __slots__ = ("_gaps", "_last_s", "_slots", "_sum", "_total_s", "_weight", "service_s")

    def __init__(self) -> None:
        self.service_s: float | None = None  # mean seconds of a request in service; None before the first
        self._gaps = [0.0] * _GAP_BUCKETS
        self._sum = 0.0  # of the gaps' weights
        self._total_s = 0.0  # of the gaps themselves, each by its weight
        self._weight = 1.0  # of the next gap: grows instead of all others shrinking
        self._last_s: float | None = None
        self._slots: dict[int, tuple[float, float, int]] = {}  # slot -> requests a day, requests today, today

    # -- what happened -----------------------------------------------------------------------------------------------

    def arrived(self, now_s: float, local_s: float | None = None) -> None:
        """A client's request came. ``local_s`` counts seconds of local wall time; without it no hour is learned."""
        if self._last_s is not None:
            gap_s = max(0.0, now_s - self._last_s)
            self._gaps[_bucket(gap_s)] += self._weight
            self._sum += self._weight
            self._total_s += self._weight * gap_s
            self._weight /= _GAP_KEEP
            if self._weight > _RENORMALIZE_AT:
                self._renormalize()
        self._last_s = now_s
        if local_s is not None:
            self._count_slot(local_s)

    def served(self, service_s: float) -> None:
        """A request ended well after so many seconds in service, standing still not counted."""
        old = self.service_s
        self.service_s = service_s if old is None else old + _SERVICE_NEW * (service_s - old)

    def _renormalize(self) -> None:
        scale = 1.0 / self._weight
        self._gaps = [w * scale for w in self._gaps]
        self._sum *= scale
        self._total_s *= scale
        self._weight = 1.0

    def _count_slot(self, local_s: float) -> None:
        day, slot = _day_and_slot(local_s)
        mean, today, seen = self._slots.get(slot, (0.0, 0.0, day))
        if seen != day:
            mean, today = _settled(mean, today, day - seen), 0.0
        self._slots[slot] = (mean, today + 1.0, day)

    # -- what it says ------------------------------------------------------------------------------------------------

    @property
    def last_s(self) -> float | None:
        """When the last request came, on the caller's clock."""
        return self._last_s

    def rate_per_s(self, now_s: float) -> float:
        """Requests a second, from the recent gaps; a silence longer than they were makes it less."""
        if self._last_s is None or self._sum <= 0.0:
            return 0.0
        return 1.0 / max(self._total_s / self._sum, now_s - self._last_s, 1e-3)

    def chance(self, now_s: float, horizon_s: float) -> float:
        """Chance of a request within ``horizon_s`` given the silence so far, from the gaps alone."""
        if self._last_s is None or self._sum <= 0.0 or horizon_s <= 0.0:
            return 0.0
        idle_s = max(0.0, now_s - self._last_s)
        longer = self._longer(idle_s)
        by_rate = -expm1(-horizon_s * self.rate_per_s(now_s))
        if longer <= 1e-6 * self._sum:
            return by_rate  # a silence such as hardly ever before: only its own length tells
        by_gaps = 1.0 - self._longer(idle_s + horizon_s) / longer
        sure = min(1.0, self._sum / self._weight / _SURE_AFTER)
        return min(1.0, max(0.0, sure * by_gaps + (1.0 - sure) * by_rate))

    def hour_rate_per_s(self, local_s: float) -> float:
        """Requests a second as usual at this quarter of an hour of the day; 0 where nothing was learned of it."""
        day, slot = _day_and_slot(local_s)
        mean, today, seen = self._slots.get(slot, (0.0, 0.0, day))
        if seen != day:
            mean = _settled(mean, today, day - seen)
        return mean / _SLOT_S

    def by_hour(self, local_s: float, horizon_s: float) -> float:
        """Chance of a request within ``horizon_s`` as usual at this time of day, over earlier days alone."""
        expected, at_s, end_s = 0.0, local_s, local_s + min(horizon_s, _DAY_S)
        while at_s < end_s:
            next_s = (floor(at_s / _SLOT_S) + 1) * _SLOT_S
            expected += (min(next_s, end_s) - at_s) * self.hour_rate_per_s(at_s)
            at_s = next_s
        return -expm1(-expected)

    def _longer(self, gap_s: float) -> float:
        """Weight of the gaps longer than that; within a bucket they lie evenly on the logarithm."""
        place = gap_s / _GAP_FIRST_S if gap_s <= _GAP_FIRST_S else log2(gap_s / _GAP_FIRST_S) + 1.0
        index = int(place)
        if index >= _GAP_BUCKETS:
            return 0.0
        return self._gaps[index] * (index + 1 - place) + sum(self._gaps[index + 1 :])

    # -- remembered over restarts ------------------------------------------------------------------------------------

    def as_json(self) -> dict[str, Any]:
        """All but the last request's time, which is on a clock that ends with the service."""
        scale = 1.0 / self._weight
        return {
            "service_s": self.service_s,
            "gaps": [round(w * scale, 6) for w in self._gaps],
            "total_s": round(self._total_s * scale, 6),
            "slots": {str(slot): [round(mean, 4), today, day] for slot, (mean, today, day) in self._slots.items()},
        }

    @classmethod
    def of_json(cls, data: Mapping[str, Any]) -> "History":
        """What ``as_json`` gave; anything else is an empty history."""
        history = cls()
        gaps, slots = data.get("gaps"), data.get("slots")
        if isinstance(gaps, Sequence) and len(gaps) == _GAP_BUCKETS:
            history._gaps = [float(w) for w in gaps]
            history._sum, history._total_s = sum(history._gaps), float(data.get("total_s", 0.0))
        if data.get("service_s") is not None:
            history.service_s = float(data["service_s"])
        if isinstance(slots, Mapping):
            history._slots = {int(s): (float(v[0]), float(v[1]), int(v[2])) for s, v in slots.items()}
        return history


class Chains:
    """Which model's requests follow which: a table of first-order transitions that forgets by use."""

    __slots__ = ("_after", "_last", "_last_s", "_times")

    def __init__(self) -> None:
        self._after: dict[EngineName, dict[EngineName, float]] = {}
        self._times: dict[EngineName, float] = {}  # how often a run of a model's requests ended or went on
        self._last: EngineName | None = None
        self._last_s = 0.0

    def arrived(self, engine: EngineName, now_s: float) -> None:
        """A request came. Requests of one model one after another are one link of a chain."""
        last, since_s = self._last, now_s - self._last_s
        if engine != last or since_s > CHAIN_WINDOW_S:
            if last is not None:
                row = self._after.setdefault(last, {})
                self._times[last] = self._times.get(last, 0.0) * _CHAIN_KEEP + 1.0
                for name in row:
                    row[name] *= _CHAIN_KEEP
                if engine != last and since_s <= CHAIN_WINDOW_S and (engine in row or len(row) < _CHAIN_MODELS_MAX):
                    row[engine] = row.get(engine, 0.0) + 1.0
            self._last = engine
        self._last_s = now_s

    def chance(self, engine: EngineName, now_s: float) -> "Link":
        """Chance that the model is the next link after the last one, and which that was."""
        last = self._last
        if last is None or last == engine or now_s - self._last_s > CHAIN_WINDOW_S:
            return 0.0, None
        links = self._after.get(last, {}).get(engine, 0.0)
        if links < _CHAIN_LINKS_MIN:
            return 0.0, None
        return min(1.0, links / self._times[last]), last


class SwapTime:
    """What share of its recent time a GPU has spent on swaps: seconds that fade out over SWAP_WINDOW_S."""

    __slots__ = ("_at_s", "_share")

    def __init__(self) -> None:
        self._share = 0.0
        self._at_s = 0.0

    def spent(self, seconds: float, now_s: float) -> None:
        """A swap that interrupted somebody took so long."""
        self._share, self._at_s = self.share(now_s) + seconds / SWAP_WINDOW_S, now_s

    def share(self, now_s: float) -> float:
        return self._share * exp((self._at_s - now_s) / SWAP_WINDOW_S)


Link = tuple[float, EngineName | None]
"""A chance by a chain of requests, and whose request it follows."""


def expect(
    history: History, chains: Chains, engine: EngineName, now_s: float, horizon_s: float, local_s: float | None = None
) -> Expectation:
    """The strongest of what gaps, hour and chains say. A few microseconds: for snapshots, not for requests."""
    return strongest(history, chains.chance(engine, now_s), now_s, horizon_s, local_s)


def strongest(
    history: History, link: Link, now_s: float, horizon_s: float, local_s: float | None = None
) -> Expectation:
    """The same, with what the chains said at that time."""
    best, why = history.chance(now_s, horizon_s), "by the gaps between its requests"
    if local_s is not None and (usual := history.by_hour(local_s, horizon_s)) > best:
        best, why = usual, "as usual at this time of day"
    linked, last = link
    if linked > best:
        best, why = linked, f"as it often follows {last}"
    return Expectation(best, why)


def _bucket(gap_s: float) -> int:
    if gap_s <= _GAP_FIRST_S:
        return 0
    return min(_GAP_BUCKETS - 1, int(log2(gap_s / _GAP_FIRST_S)) + 1)


def _middle_s(bucket: int) -> float:
    return _GAP_FIRST_S * (0.5 if bucket == 0 else 0.75 * 2.0**bucket)


def _day_and_slot(local_s: float) -> tuple[int, int]:
    day = floor(local_s / _DAY_S)
    return day, min(SLOTS - 1, int((local_s - day * _DAY_S) / _SLOT_S))


def _settled(mean: float, today: float, days: int) -> float:
    """A slot's requests a day after that day is over, and after those without any that followed."""
    after = mean + _SLOT_NEW * (today - mean) if mean or today else 0.0
    return after * exp(-_SLOT_NEW * max(0, days - 1))
