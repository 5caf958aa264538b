"""Small machines and scripted policies for replays. A GPU is 100 bytes; transitions are made to cost whole seconds."""

from array import array
from collections.abc import Callable, Sequence
from typing import Any

from rotator.core.values import State
from rotator.sim.box import Box
from rotator.sim.events import Quiet
from rotator.sim.machine import Costs, Machine, Spec

COSTS = Costs(
    alone_gib_s=1e30, to_gpu_all_gib_s=1e30, to_host_all_gib_s=1e30, sleep_s=1, sleep_rank_s=0, wake_s=2, wake_rank_s=0,
    canary_s=0, canary_rank_s=0, start_s=60, start_rank_s=0, stop_s=5,
)  # fmt: skip


def spec(name: str, gpus: Sequence[int] = (0,), **more: Any) -> Spec:
    n = len(gpus)
    awake, residue = more.pop("awake", 80), more.pop("residue", 5)
    return Spec(name, tuple(gpus), (awake,) * n, (residue,) * n, more.pop("host", 50), more.pop("slots", 4), **more)


def machine(*specs: Spec, host: int = 10_000, costs: Costs = COSTS) -> Machine:
    return Machine((100,) * (1 + max(g for s in specs for g in s.gpus)), host, specs, costs)


class Scripted(Quiet):
    """Decides by a function, and notes what it was told."""

    def __init__(self, decide: Callable[[Box], None] = lambda box: None, notes_arrivals: bool = False) -> None:
        self._decide = decide
        self.notes_arrivals = notes_arrivals
        self.heard: list[tuple[str, int]] = []

    def decide(self, box: Box) -> None:
        self._decide(box)

    def arrived(self, box: Box, engine: int) -> None:
        self.heard.append(("arrived", engine))

    def ended(self, box: Box, engine: int, service_s: float) -> None:
        self.heard.append(("ended", engine))


def box(made: Machine, requests: Sequence[tuple[float, int, float]], policy: Any, awake: Sequence[int] = ()) -> Box:
    """A replay of (arrival, engine, service) rows with these engines awake from the beginning."""
    columns = list(zip(*requests, strict=True)) or [(), (), ()]
    one = Box(made, array("d", columns[0]), array("l", columns[1]), array("d", columns[2]), policy)
    for engine in awake:
        one.state[engine], one.depth[engine] = State.AWAKE, None
        one.host_used -= made.specs[engine].host_bytes
    return one
