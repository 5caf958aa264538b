"""Who waits for one engine: in which order they are let in, and how much they count.

Order is by start-time fair queueing over clients: each of a client's requests costs it one over its share, and whoever
has been given least is next. So a client with a thousand requests in line delays another's first one by one request.
Within a client it is first come, first served.
"""

import heapq
from collections import Counter
from collections.abc import Hashable, Iterator
from itertools import count
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)
_SPARE = 64  # entries that left in between and may still lie in the heap, beside as many as wait


class Crowd:
    """Counts a client's requests up to ``each_max``; None counts all. Requests without a client all count."""

    __slots__ = ("_counts", "_total", "each_max")

    def __init__(self, each_max: int | None = None) -> None:
        self.each_max = each_max
        self._counts: Counter[str] = Counter()
        self._total = 0

    def add(self, client: str) -> None:
        self._total += 1
        if client:
            self._counts[client] += 1

    def remove(self, client: str) -> None:
        self._total -= 1
        if client:
            self._counts[client] -= 1
            if not self._counts[client]:
                del self._counts[client]

    @property
    def weight(self) -> float:
        """How many they are, no client counted above its maximum. Costs a look at every client with more than one."""
        most = self.each_max
        if most is None or len(self._counts) == self._total:
            return float(self._total)
        return float(self._total - sum(n - most for n in self._counts.values() if n > most))


class Line(Generic[T]):
    """Entries leave in fair order, or anywhere in between when their clients go."""

    __slots__ = ("_given", "_heap", "_live", "_numbers", "_virtual")

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, T]] = []
        self._live: dict[T, float] = {}  # in order of arrival, with the moment since when each waits
        self._given: dict[str, float] = {}  # what each client has been given, in virtual time
        self._virtual = 0.0
        self._numbers = count()

    def __len__(self) -> int:
        return len(self._live)

    def __contains__(self, entry: T) -> bool:
        return entry in self._live

    def __iter__(self) -> Iterator[T]:
        """In order of arrival."""
        return iter(self._live)

    def add(self, entry: T, client: str, share: float, since_s: float) -> None:
        start = max(self._virtual, self._given.get(client, 0.0))
        self._given[client] = start + 1.0 / share
        heapq.heappush(self._heap, (start, next(self._numbers), entry))
        self._live[entry] = since_s

    def remove(self, entry: T) -> None:
        del self._live[entry]
        if len(self._heap) > 2 * len(self._live) + _SPARE:
            self._heap = [item for item in self._heap if item[2] in self._live]
            heapq.heapify(self._heap)
        if not self._live:
            self._heap.clear()
            self._given.clear()
            self._virtual = 0.0

    def pop(self) -> T | None:
        """The next one; None where nobody waits."""
        while self._heap:
            start, _, entry = heapq.heappop(self._heap)
            if entry in self._live:
                self._virtual = start
                self.remove(entry)
                return entry
        return None

    @property
    def first_since_s(self) -> float | None:
        """Since when the one waits who came first."""
        return next(iter(self._live.values()), None)
