"""What waits in memory until the next batch: VRAM samples and request totals. Bounded, pure, never raises."""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

SAMPLES_MAX = 20_000  # over half an hour of eight GPUs at one sample a second
REQUEST_KEYS_MAX = 5_000
BATCH_MAX = 500
_INTEGER_MAX = (1 << 63) - 1
_NAME_MAX = 191

RequestKey = tuple[str, int]  # model, minute as Unix seconds

OK = "ok"
CLIENT_LEFT = "client_left"  # the client left: neither served nor failed


@dataclass(frozen=True, slots=True)
class VramSample:
    at_wall_s: float
    gpu: str
    used_bytes: int
    by_holder: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class RequestTotals:
    """Fields in the order of the table's columns."""

    requests: int = 0
    failed: int = 0
    client_left: int = 0
    waited_s_sum: float = 0.0
    waited_s_max: float = 0.0

    def plus(self, other: "RequestTotals") -> "RequestTotals":
        return RequestTotals(
            self.requests + other.requests,
            self.failed + other.failed,
            self.client_left + other.client_left,
            self.waited_s_sum + other.waited_s_sum,
            max(self.waited_s_max, other.waited_s_max),
        )


@dataclass(frozen=True, slots=True)
class Batch:
    samples: tuple[VramSample, ...] = ()
    requests: Mapping[RequestKey, RequestTotals] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.samples or self.requests)


class Buffers:
    """``dropped`` counts samples and requests that found no room while the ledger could not be written."""

    def __init__(self) -> None:
        self._samples: deque[VramSample] = deque()
        self._requests: dict[RequestKey, RequestTotals] = {}
        self.dropped = 0

    def __len__(self) -> int:
        return len(self._samples) + len(self._requests)

    def add_sample(self, at_wall_s: float, gpu: str, used_bytes: int, by_holder: Mapping[str, int]) -> None:
        """Values are made such that the database takes them: one bad reading must not spoil a batch."""
        held = {_text(holder): _integer(held_bytes) for holder, held_bytes in by_holder.items()}
        self._samples.append(VramSample(_finite(at_wall_s), _text(gpu), _integer(used_bytes), held))
        self._drop_oldest()

    def add_request(self, at_wall_s: float, model: str, waited_s: float, outcome: str) -> None:
        waited_s = max(0.0, _finite(waited_s))
        failed = outcome not in (OK, CLIENT_LEFT)
        one = RequestTotals(1, int(failed), int(outcome == CLIENT_LEFT), waited_s, waited_s)
        self._fold((_text(model), int(_finite(at_wall_s) // 60) * 60), one)

    def take(self) -> Batch:
        """Take the oldest BATCH_MAX samples and up to as many request totals."""
        samples = tuple(self._samples.popleft() for _ in range(min(BATCH_MAX, len(self._samples))))
        keys = list(self._requests)[:BATCH_MAX]
        return Batch(samples, {key: self._requests.pop(key) for key in keys})

    def put_back(self, batch: Batch) -> None:
        """A batch that was not written waits again, as the oldest there is."""
        self._samples.extendleft(reversed(batch.samples))
        self._drop_oldest()
        for key, totals in batch.requests.items():
            self._fold(key, totals)

    def _drop_oldest(self) -> None:
        while len(self._samples) > SAMPLES_MAX:
            self._samples.popleft()
            self.dropped += 1

    def _fold(self, key: RequestKey, more: RequestTotals) -> None:
        if key not in self._requests and len(self._requests) >= REQUEST_KEYS_MAX:
            # A total in the wrong minute is better than a lost one.
            older = next((known for known in self._requests if known[0] == key[0]), None)
            if older is None:
                self.dropped += more.requests
                return
            key = older
        self._requests[key] = self._requests.get(key, RequestTotals()).plus(more)


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0


def _integer(value: int) -> int:
    return max(-_INTEGER_MAX, min(_INTEGER_MAX, value))


def _text(value: str) -> str:
    return value.encode("utf-8", "replace").decode()[:_NAME_MAX].replace("\0", "?")
