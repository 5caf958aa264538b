"""The state of a replay, and what can be read off it: engines, queues, what is in flight, swaps under way."""

from array import array
from collections import deque
from copy import copy
from math import inf, nan
from typing import Self

from rotator.core.values import Depth, State
from rotator.sim.events import ActiveSwap, Counts, Decider
from rotator.sim.machine import Machine


class Floor:
    """The state of a replay. Requests are numbers: positions in the columns ``at``, ``engine`` and ``service``.

    ``first_s`` is when a request's service began, ``done_s`` when it ended; NaN before.
    """

    def __init__(
        self, machine: Machine, at: "array[float]", engine: "array[int]", service: "array[float]", policy: Decider
    ) -> None:
        self.machine, self.specs, self.policy = machine, machine.specs, policy
        self.at, self.engine, self.service = at, engine, service
        n = len(machine.specs)
        self.now = 0.0
        self.next, self.last = 0, len(at)  # the next arrival, and the end of all
        self.state: list[State] = [State.STOPPED] * n
        self.depth: list[Depth | None] = [None] * n
        self.waiting: list[deque[int]] = [deque() for _ in range(n)]  # at the gate, in order of arrival
        self.waiting_at_s = [0.0] * n  # the sum of their arrivals
        self.inside: list[deque[int]] = [deque() for _ in range(n)]  # admitted, all slots taken
        self.running: list[dict[int, float]] = [{} for _ in range(n)]  # request -> its end
        self.frozen: list[dict[int, float]] = [{} for _ in range(n)]  # request -> service seconds left
        self.freezes: dict[int, int] = {}
        self.stood_s: dict[int, float] = {}  # request -> seconds it stood still, over the freezes that are over
        self.awake_since = [0.0] * n
        self.frozen_since = [0.0] * n
        self.used_at = [0.0] * n
        self.yields_after = [0.0] * n
        self.host_used = 0
        self.swaps: dict[int, ActiveSwap] = {}
        self.counts = Counts()
        self.watch_idle = True  # whether an engine that ran out of work is worth a decision at once,
        self.idle_look_s = inf  # or after so long
        self.notes_arrivals = policy.notes_arrivals
        self.recording = True
        self.first_s = array("d", [nan]) * len(at)
        self.done_s = array("d", [nan]) * len(at)
        self.delay_s = 0.0  # of all requests so far: time not in service, counted when service begins or goes on
        self._heap: list[tuple[float, int, int, int]] = []
        self._swaps_begun = 0
        self._alarm = inf
        self._copying = 0
        self._dirty = False
        self._begin()

    def _begin(self) -> None:
        """A machine that has been running: all engines asleep as far as host RAM goes, the others stopped."""
        for i, spec in enumerate(self.specs):
            if self.host_used + spec.host_bytes <= self.machine.host_bytes:
                self.state[i], self.depth[i] = State.ASLEEP, Depth.HOST
                self.host_used += spec.host_bytes

    def fork(self, policy: Decider) -> Self:
        """A copy to look ahead in, under another policy. It records no single requests, only ``delay_s``."""
        other = copy(self)
        other.policy, other.notes_arrivals = policy, policy.notes_arrivals
        other.state, other.depth = list(self.state), list(self.depth)
        other.waiting_at_s = list(self.waiting_at_s)
        other.waiting, other.inside = [copy(q) for q in self.waiting], [copy(q) for q in self.inside]
        other.running, other.frozen = [dict(r) for r in self.running], [dict(f) for f in self.frozen]
        other.freezes, other.stood_s = dict(self.freezes), dict(self.stood_s)
        other.awake_since, other.frozen_since = list(self.awake_since), list(self.frozen_since)
        other.used_at, other.yields_after = list(self.used_at), list(self.yields_after)
        other.swaps = {id: copy(swap) for id, swap in self.swaps.items()}
        other.counts = Counts()
        other.recording = False
        other.delay_s = 0.0
        other._heap = list(self._heap)
        return other

    # -- what policies ask --------------------------------------------------------------------------------------------

    def in_flight(self, engine: int) -> int:
        return len(self.running[engine]) + len(self.inside[engine]) + len(self.frozen[engine])

    def served_at_once(self, engine: int) -> int:
        """How many requests it serves, or would serve: those in flight and those who wait, as far as it has slots."""
        return min(self.in_flight(engine) + len(self.waiting[engine]), self.specs[engine].slots)

    def oldest_wait_s(self, engine: int) -> float:
        """How long the first in line has waited, or the frozen have stood still."""
        queue = self.waiting[engine]
        wait = self.now - self.at[queue[0]] if queue else 0.0
        if self.frozen[engine] and self.state[engine] is State.ASLEEP:
            wait = max(wait, self.now - self.frozen_since[engine])
        return wait

    def waited_s_sum(self, engine: int) -> float:
        """Seconds waited so far by all who wait at its gate."""
        return len(self.waiting[engine]) * self.now - self.waiting_at_s[engine]

    def is_wanted(self, engine: int) -> bool:
        """Whether somebody waits for it, at its gate or frozen within."""
        if self.waiting[engine]:
            return True
        return self.state[engine] is State.ASLEEP and self.in_flight(engine) > 0

    def claimed(self) -> frozenset[int]:
        """GPUs on which a swap is under way."""
        return frozenset().union(*(swap.gpus for swap in self.swaps.values()))

    def free_bytes(self) -> list[int]:
        """What is free on each GPU, with everyone who moves charged as awake."""
        free = list(self.machine.gpu_bytes)
        for spec, state in zip(self.specs, self.state, strict=True):
            if state is State.STOPPED:
                continue
            sizes = spec.residue_bytes if state is State.ASLEEP else spec.awake_bytes
            for gpu, size in zip(spec.gpus, sizes, strict=True):
                free[gpu] -= size
        return free
