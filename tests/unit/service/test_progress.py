"""Events that tell how far a wake or a start is."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rotator.core.values import State
from rotator.service.events import EventBus
from rotator.service.progress import Progress
from rotator.service.records import Costs

GIB = 1 << 30


@dataclass
class Engine:
    """What Progress reads of an engine's record."""

    state: State = State.WAKING
    name: str = "glm"
    gpus: tuple[str, ...] = ("a", "b")
    costs: Costs = field(default_factory=Costs)

    def awake_on(self, gpu: str) -> int:
        return 80 * GIB

    def residue_on(self, gpu: str) -> int:
        return 2 * GIB


class Told:
    def __init__(self, engine: Engine) -> None:
        self.bus, self.engine = EventBus(lambda: 0.0), engine
        self.progress = Progress(self.bus)

    def moved(self, state: State, now_s: float) -> None:
        self.engine.state = state
        self.progress.moved(self.engine, now_s)  # type: ignore[arg-type] # it reads no more than Engine has

    def read(self, now_s: float, **used_gib: int) -> None:
        for gpu, used in used_gib.items():
            self.progress.read(self.engine, gpu, used * GIB, now_s)  # type: ignore[arg-type] # as above

    @property
    def events(self) -> list[Mapping[str, Any]]:
        return [e.data for e in self.bus.since(0)]


def test_bytes_are_told_once_every_gpu_was_read_and_count_from_the_least_that_was_seen():
    told = Told(Engine())
    told.moved(State.WAKING, 100.0)
    told.read(100.2, a=50)  # whoever leaves for it is still leaving
    assert told.events == []
    told.read(100.4, a=2, b=2)
    told.read(102.0, a=41, b=41)
    assert [e["done_bytes"] // GIB for e in told.events] == [0, 78]
    told.read(104.0, a=80, b=80)
    assert told.events[-1]["done_bytes"] == 156 * GIB
    assert told.events[-1]["total_bytes"] == 156 * GIB


def test_the_end_is_foretold_from_what_it_took_before_and_else_from_bytes():
    known, new = Told(Engine(costs=Costs(wake_s=10.0))), Told(Engine())
    for told in (known, new):
        told.moved(State.WAKING, 0.0)
        told.read(0.0, a=2, b=2)
        told.read(4.0, a=41, b=41)
    assert known.events[-1]["eta_s"] == 6.0
    assert new.events[-1]["eta_s"] == 4.0


def test_a_long_start_is_told_ever_more_rarely_and_an_end_ends_it():
    told = Told(Engine())
    told.moved(State.STARTING, 0.0)
    for second in range(1800):
        told.read(float(second), a=10, b=10)
    assert 60 < len(told.events) < 160
    assert told.events[0]["action"] == "start"
    told.moved(State.AWAKE, 1800.0)
    before = len(told.events)
    told.read(4000.0, a=80, b=80)
    assert len(told.events) == before
