"""Reasons for people: the core names GPUs by UUID, people know them by index."""

from collections.abc import Mapping
from dataclasses import replace

from rotator.core.values import GpuId, Plan, Step, Swap


class Wording:
    """Replaces each UUID by ``GPU <index>``. Values keep their ids: only words change."""

    def __init__(self, labels: Mapping[GpuId, str]) -> None:
        self._labels = labels

    def text(self, text: str) -> str:
        for id, label in self._labels.items():
            text = text.replace(id, label)
        return text

    def plan(self, plan: Plan) -> Plan:
        return replace(
            plan,
            swaps=tuple(self._swap(swap) for swap in plan.swaps),
            blocked=tuple(replace(b, reason=self.text(b.reason)) for b in plan.blocked),
        )

    def _swap(self, swap: Swap) -> Swap:
        return replace(
            swap,
            evict=tuple(self._step(step) for step in swap.evict),
            admit=self._step(swap.admit) if swap.admit else None,
            reason=self.text(swap.reason),
        )

    def _step(self, step: Step) -> Step:
        return replace(step, reason=self.text(step.reason))
