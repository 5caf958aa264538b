"""A planner that sees the future in a window, as the bound to measure distance from.

At every decision it copies the box, tries each next step (leave all as it is, or bring one of the wanted engines in),
lets a good online rule play on with the true arrivals and service times of the window until those are served, and takes
the step after which all requests together were delayed least. This is a rollout (D. Bertsekas, "Rollout Algorithms for
Combinatorial Optimization", 1997): never worse than its rule if the window held all the future. It is no proof of the
least possible delay, only of what a planner with foresight gets here.
"""

from bisect import bisect_right
from dataclasses import dataclass
from math import inf

from rotator.core.values import Level, State
from rotator.sim.baselines import yielding
from rotator.sim.box import Box
from rotator.sim.events import Attentive, Victim
from rotator.sim.machine import Machine

FOLLOWED = 5  # windows after the first for which requests of the window are followed, without new ones
MARGIN_S = 1.0  # a step other than the rule's must save so much delay in all


@dataclass(frozen=True, slots=True)
class Rule:
    """When a wanted engine may push others out: it serves ``times`` as many requests as they do, the seconds of its
    oldest wait counting as ``age_per_s`` requests each, and they have had ``stay_s``."""

    times: float = 2.0
    age_per_s: float = 0.02
    stay_s: float = 10.0


class MostServed(Attentive):
    """The rule that the rollouts play on with: whoever serves the most requests at once has the GPUs.

    Light engines that would share the place of a heavy one count together. Everyone in flight freezes at once.
    """

    def __init__(self, machine: Machine, rule: Rule | None = None) -> None:
        self._rule = rule or Rule()
        self._specs = machine.specs
        self._masks = [sum(1 << gpu for gpu in spec.gpus) for spec in machine.specs]
        self._rivals = _rivals(machine)
        self._plenty = sum(spec.host_bytes for spec in machine.specs) <= machine.host_bytes

    def wishes(self, box: Box) -> list[tuple[float, int, list[int]]]:
        """What may be brought in now: (how strongly it is wanted, engine, who yields), the strongest first."""
        state, waiting, frozen = box.state, box.waiting, box.frozen
        asleep = (State.ASLEEP, State.STOPPED)
        wanted = [e for e, s in enumerate(state) if (waiting[e] or frozen[e]) and s in asleep]
        if not wanted:
            return []
        taken = 0
        for swap in box.swaps.values():
            for gpu in swap.gpus:
                taken |= 1 << gpu
        found = []
        for e in wanted:
            yields = [v for v in self._rivals[e] if state[v] is State.AWAKE]
            mask = self._masks[e]
            for v in yields:
                mask |= self._masks[v]
            if not mask & taken:
                found.append((self._worth(box, e, yields, wanted), e, yields))
        found.sort(key=lambda item: -item[0])
        return found

    def served(self, box: Box, e: int) -> int:
        n = len(box.waiting[e]) + len(box.running[e]) + len(box.inside[e]) + len(box.frozen[e])
        return min(self._specs[e].slots, n)

    def _worth(self, box: Box, e: int, yields: list[int], wanted: list[int]) -> float:
        """Requests that it would serve, and those of others that would come in beside it where a wide one goes."""
        worth = self.served(box, e) + self._rule.age_per_s * box.oldest_wait_s(e)
        mask = self._masks[e]
        freed = 0
        for v in yields:
            freed |= self._masks[v]
        if freed & ~mask:
            beside: dict[int, int] = {}
            for o in wanted:
                other = self._masks[o]
                if not other & mask and not other & ~freed:
                    beside[other] = max(beside.get(other, 0), self.served(box, o))
            worth += sum(beside.values())
        return worth

    def decide(self, box: Box) -> None:
        rule, taken = self._rule, 0
        for worth, e, yields in self.wishes(box):
            mask = self._masks[e]
            for v in yields:
                mask |= self._masks[v]
            if mask & taken:
                continue
            busy = [v for v in yields if box.running[v]]
            if busy and worth <= rule.times * sum(self.served(box, v) for v in busy):
                continue
            until_s = max((box.awake_since[v] + rule.stay_s for v in busy), default=0.0)
            if until_s > box.now:
                box.ask_at(until_s)
                continue
            taken |= mask
            self.bring_in(box, e, yields)

    def bring_in(self, box: Box, engine: int, yields: list[int]) -> None:
        if self._plenty:
            box.swap(engine, tuple(Victim(v, Level.HOST, 0.0) for v in yields))
        else:
            box.swap(engine, yielding(box, yields, 0.0))


def _rivals(machine: Machine) -> list[list[int]]:
    """For each engine those that cannot be awake beside it: taken by pairs, by bytes on a GPU that both need."""
    specs = machine.specs
    residue = [0] * len(machine.gpu_bytes)
    for spec in specs:
        for gpu, size in zip(spec.gpus, spec.residue_bytes, strict=True):
            residue[gpu] += size

    def clash(a: int, b: int) -> bool:
        for i, gpu in enumerate(specs[a].gpus):
            if gpu in specs[b].gpus:
                j = specs[b].gpus.index(gpu)
                extra = specs[a].awake_bytes[i] - specs[a].residue_bytes[i]
                extra += specs[b].awake_bytes[j] - specs[b].residue_bytes[j]
                if residue[gpu] + extra > machine.gpu_bytes[gpu]:
                    return True
        return False

    n = len(specs)
    return [[b for b in range(n) if b != a and clash(a, b)] for a in range(n)]


class _Held(MostServed):
    """The rule, but what is awake at first stays for a while."""

    def __init__(self, machine: Machine, rule: Rule, until_s: float) -> None:
        super().__init__(machine, rule)
        self._until_s = until_s

    def decide(self, box: Box) -> None:
        if box.now < self._until_s:
            box.ask_at(self._until_s)
            return
        super().decide(box)


class Clairvoyant(Attentive):
    """The rollout planner. ``window_s`` is how far it sees, ``every_s`` the least time between two of its decisions
    for the same engines, ``tries`` how many of the strongest wishes it looks at."""

    def __init__(
        self,
        machine: Machine,
        *,
        window_s: float = 300.0,
        every_s: float = 10.0,
        tries: int = 3,
        rule: Rule | None = None,
    ) -> None:
        self._machine = machine
        self._window_s, self._every_s, self._tries = window_s, every_s, tries
        self._chosen_rule = rule or Rule()
        self._rule = MostServed(machine, self._chosen_rule)
        self._decided_s = -inf
        self._held_until_s = -inf

    def decide(self, box: Box) -> None:
        if box.now < self._held_until_s:
            box.ask_at(self._held_until_s)
            return
        if box.now < self._decided_s + self._every_s:  # in between the rule decides alone
            box.ask_at(self._decided_s + self._every_s)
            self._rule.decide(box)
            return
        wishes = self._rule.wishes(box)[: self._tries]
        if wishes:
            self._decided_s = box.now
            self._best(box, wishes)

    def _best(self, box: Box, wishes: list[tuple[float, int, list[int]]]) -> None:
        """Try what the rule would do, to wait where the rule would not, and each other wish; do the best."""
        end_s, held_s = box.now + self._window_s, box.now + 2 * self._every_s
        by_rule = box.fork(self._rule)
        self._rule.decide(by_rule)
        begun = {swap.admit for id, swap in by_rule.swaps.items() if id not in box.swaps}
        best_s, best = self._play(by_rule, end_s) - MARGIN_S, -2
        if begun:
            held = box.fork(_Held(self._machine, self._chosen_rule, held_s))
            held.ask_at(held_s)
            delay_s = self._play(held, end_s)
            if delay_s < best_s:
                best_s, best = delay_s, -1
        for i, (_, engine, yields) in enumerate(wishes):
            if engine in begun:
                continue
            trial = box.fork(self._rule)
            self._rule.bring_in(trial, engine, yields)
            self._rule.decide(trial)
            delay_s = self._play(trial, end_s)
            if delay_s < best_s:
                best_s, best = delay_s, i
        if best == -2:
            self._rule.decide(box)
        elif best == -1:
            self._held_until_s = box.now + self._every_s
            box.ask_at(self._held_until_s)
        else:
            self._rule.bring_in(box, wishes[best][1], wishes[best][2])
            self._rule.decide(box)

    def _play(self, box: Box, end_s: float) -> float:
        """Delay of all requests that come within the window, followed until they are served (or long enough)."""
        box.last = bisect_right(box.at, end_s, box.next)
        box.run(end_s + FOLLOWED * self._window_s)
        return box.delay_s + box.standing_delay_s()
