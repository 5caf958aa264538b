"""How long a plan stands that began nothing because turns last, although more requests come and go.

A turn ends when those who wait outweigh those who are served (``rotator/core/turns.py``), so one request more or less
shifts its end by a pace. The service plans anew for each who waits; a replay only where that can have ended a turn.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rotator.core.policy import due_from_s, rivals_on
from rotator.core.turns import affordable_in_s, margin, pace_s, served
from rotator.core.values import BlockKind, Engine, EngineName, Plan, Snapshot, State


@dataclass(frozen=True, slots=True)
class Stay:
    """A wish that waits for turns until ``until_s``, by so many ``served`` at once. ``weights`` says which engine's
    requests defer that, and (below zero) which bring it nearer, each by so many times ``pace_s``; none of them to
    before ``least_s``, from when on a swap is affordable and somebody has had the minimum stay."""

    until_s: float
    least_s: float
    pace_s: float
    weights: Mapping[EngineName, float]
    served: Mapping[EngineName, float]

    def ends_s(self, served: Mapping[EngineName, float]) -> float:
        """When to look again, as things stand now: no later than at first."""
        shift = sum([weight * (served[name] - self.served[name]) for name, weight in self.weights.items()])
        return max(self.least_s, self.until_s + self.pace_s * min(0.0, shift))


def standing(snapshot: Snapshot, plan: Plan) -> tuple[Stay, ...]:
    """What the plan waits for; nothing where that is not only turns that last, or where a wish may soon be due: then
    another request changes more than a turn's end."""
    blocked, engines = plan.blocked, snapshot.engines
    if plan.swaps or any(b.kind is not BlockKind.STAY or b.until_s is None for b in blocked):
        return ()
    wishes = [engines[b.engine] for b in blocked]
    if max([wish.demand.oldest_wait_s for wish in wishes], default=0.0) >= due_from_s(snapshot.policy):
        return ()
    counts = {name: served(engine) for name, engine in engines.items()}
    busy = [e for e in engines.values() if e.state is State.AWAKE and e.demand.in_flight]
    rivals, stays = rivals_on(snapshot), []
    for wish, until_s in zip(wishes, [b.until_s or 0.0 for b in blocked], strict=True):
        ahead = [e for e in busy if not set(e.gpus).isdisjoint(wish.gpus)]
        least_s = min([_least_s(e, snapshot) for e in ahead], default=0.0)
        pace = max([pace_s(e, wish, snapshot.policy) for e in ahead], default=0.0)
        times = margin(snapshot.policy, max([rivals[gpu] for gpu in wish.gpus]) - 1)
        stays.append(Stay(until_s, least_s, pace, _weights(wish, wishes, ahead, times), counts))
    return tuple(stays)


def _weights(wish: Engine, wishes: Sequence[Engine], ahead: Sequence[Engine], margin: float) -> dict[EngineName, float]:
    """Whose requests count, by how much: who is ahead, and the wish with those who might come in beside it."""
    freed = frozenset([gpu for engine in ahead for gpu in engine.gpus])
    weights = {other.name: -1.0 for other in wishes if freed.issuperset(other.gpus)}
    weights[wish.name] = -1.0
    weights.update([(engine.name, margin) for engine in ahead])
    return weights


def _least_s(engine: Engine, snapshot: Snapshot) -> float:
    """When its turn may end at the earliest, whoever waits."""
    policy, stays_s = snapshot.policy, engine.awake_since_s + snapshot.policy.min_stay_s
    if policy.swap_share is None:
        return stays_s
    swapping = max([snapshot.gpus[gpu].swapping for gpu in engine.gpus])
    return max(stays_s, snapshot.now_s + affordable_in_s(policy.swap_share, swapping))
