"""How far wakes and starts are, as events while GPUs are read: bytes that have come, and how long it still takes."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from rotator.core.values import EngineName, GpuId, State
from rotator.service.events import EventBus
from rotator.service.records import EngineRuntime

EVERY_S = 1.0
EVERY_SHARE = 0.05  # of what has passed: a start of half an hour must not fill the ring of events
_COMING = (State.WAKING, State.STARTING)


@dataclass(slots=True)
class _Way:
    """One engine on its way in. ``least_bytes`` is the least that was seen in use on each GPU since it began: who left
    for it may have been leaving still at the first reading."""

    state: State
    begun_at_s: float
    rest_bytes: Mapping[GpuId, int]
    least_bytes: dict[GpuId, int] = field(default_factory=dict)
    used_bytes: dict[GpuId, int] = field(default_factory=dict)
    fresh: set[GpuId] = field(default_factory=set)  # those read since it was last told
    told_at_s: float = float("-inf")


class Progress:
    """Belongs to the loop: called within its task only."""

    def __init__(self, bus: EventBus) -> None:
        self._bus = bus
        self._ways: dict[EngineName, _Way] = {}

    def moved(self, engine: EngineRuntime, now_s: float) -> None:
        """The engine has another state now."""
        if engine.state in _COMING:
            rest = {gpu: engine.residue_on(gpu) if engine.state is State.WAKING else 0 for gpu in engine.gpus}
            self._ways[engine.name] = _Way(engine.state, now_s, rest)
        else:
            self._ways.pop(engine.name, None)

    def read(self, engine: EngineRuntime, gpu: GpuId, used_bytes: int, now_s: float) -> None:
        """A GPU of the engine was read."""
        way = self._ways.get(engine.name)
        if way is None or gpu not in engine.gpus:
            return
        way.least_bytes[gpu] = min(used_bytes, way.least_bytes.get(gpu, used_bytes))
        way.used_bytes[gpu] = used_bytes
        way.fresh.add(gpu)
        elapsed_s = now_s - way.begun_at_s
        if len(way.fresh) < len(engine.gpus) or now_s < way.told_at_s + max(EVERY_S, EVERY_SHARE * elapsed_s):
            return
        way.told_at_s = now_s
        way.fresh.clear()
        total = {g: max(0, engine.awake_on(g) - way.rest_bytes[g]) for g in engine.gpus}
        done = sum(min(total[g], way.used_bytes[g] - way.least_bytes[g]) for g in engine.gpus)
        expected_s = engine.costs.start_s if way.state is State.STARTING else engine.costs.wake_s
        self._bus.publish(
            "engine.progress",
            engine.name,
            action="start" if way.state is State.STARTING else "wake",
            done_bytes=done,
            total_bytes=sum(total.values()),
            elapsed_s=round(elapsed_s, 3),
            expected_s=expected_s,
            eta_s=_eta_s(done, sum(total.values()), elapsed_s, expected_s),
        )


def _eta_s(done: int, total: int, elapsed_s: float, expected_s: float | None) -> float | None:
    """From what it took before, where that is known and not yet over; else from the bytes."""
    if expected_s is not None and expected_s > elapsed_s:
        return round(expected_s - elapsed_s, 3)
    if 0 < done < total:
        return round(elapsed_s * (total - done) / done, 3)
    return None
