"""Contended turns: whose is next, how long one lasts, and whether work in flight may end before the engine yields.

Everything is a price in seconds of people's waiting. A busy engine keeps its turn

  * for ``min_stay_s`` in any case, so that nothing thrashes;
  * then until swaps cost at most ``swap_share`` of the time: the engines that contend share ``1 / swap_share`` times
    the cost of a swap there and back, by how much work each has;
  * then until those who wait have waited as long, all together, as its own clients would lose by a swap: whoever buys
    only once renting has cost as much is never worse than twice the best (ski rental).

It ends at once when nobody uses the engine any more, and for a wish that is overdue.
"""

from math import inf, log

from rotator.core.costs import load_s
from rotator.core.values import Engine, Policy, State

_LEAD_SHARE_MAX = 0.5  # of the longest wait: a swap that takes longer cannot be begun early enough anyway


def weight(engine: Engine) -> float:
    """How many wait for it, each client counted up to its share."""
    demand = engine.demand
    return float(demand.waiting + demand.frozen) if demand.weight is None else demand.weight


def waited_s(engine: Engine) -> float:
    """Seconds waited so far by all who wait, together."""
    demand = engine.demand
    if demand.waited_s_sum is not None:
        return demand.waited_s_sum
    many = weight(engine)
    return demand.oldest_wait_s * (many + 1.0) / 2.0


def batch_s(engine: Engine, many: float) -> float:
    """Seconds until the last of so many requests served side by side has ended: times of service fall off
    exponentially, so the longest of n takes about 1 + ln n of them. 0 where none was ever seen."""
    service_s = engine.demand.service_s
    return 0.0 if service_s is None else service_s * (1.0 + log(max(1.0, many)))


def round_s(leaving: Engine, coming: Engine) -> float:
    """A swap there and back."""
    return leaving.sleep_cost_s + load_s(coming) + coming.sleep_cost_s + leaving.wake_cost_s


def overdue(engine: Engine, policy: Policy) -> bool:
    """Whether it must be next: its oldest wish reaches the bound, or a stream its longest stall, by the time that a
    swap begun now has brought it in."""
    lead_s = load_s(engine)
    if engine.demand.frozen and engine.demand.stall_left_s <= lead_s:
        return True
    bound_s = policy.longest_wait_s
    return bound_s is not None and engine.demand.oldest_wait_s >= bound_s - min(lead_s, _LEAD_SHARE_MAX * bound_s)


def overdue_in_s(engine: Engine, policy: Policy) -> float:
    """Seconds until ``overdue`` is true; 0 if it is, inf if it never will be."""
    lead_s, bound_s = load_s(engine), policy.longest_wait_s
    by_wait_s = inf
    if bound_s is not None and (engine.demand.waiting or engine.demand.frozen):
        by_wait_s = bound_s - min(lead_s, _LEAD_SHARE_MAX * bound_s) - engine.demand.oldest_wait_s
    by_stall_s = engine.demand.stall_left_s - lead_s if engine.demand.frozen else inf
    return max(0.0, min(by_wait_s, by_stall_s))


def urgency(engine: Engine, policy: Policy) -> float:
    """Seconds waited by all who wait, with their head start by priority, a second that its swap and its turn take.
    The larger goes first."""
    demand = engine.demand  # written out, not by the functions above: it is asked for every engine in every plan
    many = demand.weight
    if many is None:
        many = demand.waiting + demand.frozen
    total_s = demand.waited_s_sum
    if total_s is None:
        total_s = demand.oldest_wait_s * (many + 1.0) / 2.0
    if engine.priority:
        total_s += engine.priority * policy.priority_worth_s * (many if many > 1.0 else 1.0)
    takes_s = engine.sleep_cost_s + (engine.wake_cost_s if engine.state is State.ASLEEP else engine.start_cost_s)
    if demand.service_s is not None:
        takes_s += demand.service_s * (1.0 + log(many) if many > 1.0 else 1.0)
    return total_s / takes_s if total_s > 0.0 else total_s * takes_s


def stays_until_s(engine: Engine, wish: Engine, now_s: float, policy: Policy) -> float:
    """When a busy engine's turn ends for the wish; may lie in the past."""
    least_s = engine.awake_since_s + policy.min_stay_s
    if policy.swap_share is None or overdue(wish, policy):
        return least_s
    many = max(1.0, weight(wish))
    lost_s = _lost_s(engine, wish, many)
    gap_s = lost_s - waited_s(wish)
    ends_s = max(engine.awake_since_s + turn_s(engine, wish, policy), now_s + gap_s / many if gap_s > 0 else now_s)
    return max(least_s, min(ends_s, now_s + overdue_in_s(wish, policy)))


def turn_s(engine: Engine, wish: Engine, policy: Policy) -> float:
    """How long the engine's turn lasts against the wish so that swaps cost at most their share of the time."""
    if policy.swap_share is None:
        return 0.0
    both_s = round_s(engine, wish) * (1.0 / policy.swap_share - 1.0)
    mine, other = _load(engine), _load(wish)
    return both_s * mine / max(mine + other, 1e-9)


def drain_s(engine: Engine, wish: Engine | None, policy: Policy) -> float:
    """How long work in flight may go on before it is frozen.

    While n streams are in flight, one ends every ``service_s / n`` seconds, and each that ends is spared a stall of the
    swap there and back and the other's turn, and of computing again what it had. Meanwhile everybody waits who waits
    for the wish. So the drain goes on as long as the streams that end spare more than the waiting costs.
    """
    demand = engine.demand
    if wish is None or not policy.preempt or demand.service_s is None or not demand.in_flight:
        return policy.drain_bound_s
    if overdue(wish, policy):
        return min(policy.drain_bound_s, policy.drain_max_s)
    many = max(1.0, weight(wish))
    spared_s = stall_s(engine, wish, policy)
    worth_it = many * demand.service_s / spared_s  # with fewer streams than this, waiting costs more than it spares
    if demand.in_flight <= worth_it:
        return 0.0
    until_s = demand.service_s * log(demand.in_flight / max(worth_it, 0.5))
    return min(policy.drain_max_s, until_s, max(policy.drain_bound_s, overdue_in_s(wish, policy)))


def stall_s(engine: Engine, wish: Engine, policy: Policy) -> float:
    """How long a stream of the engine is expected to lose by being frozen for the wish."""
    again_s = policy.recompute_share * (engine.demand.service_s or 0.0)
    return round_s(engine, wish) + max(policy.min_stay_s, batch_s(wish, weight(wish))) + again_s


def _lost_s(engine: Engine, wish: Engine, many: float) -> float:
    """What the engine's clients lose by a swap now: those in flight stand still, and those who come meanwhile wait."""
    away_s = round_s(engine, wish) + batch_s(wish, many)
    return away_s * (engine.demand.in_flight + weight(engine) + engine.demand.rate_per_s * away_s / 2.0)


def _load(engine: Engine) -> float:
    flying = engine.demand.in_flight if engine.state is State.AWAKE else 0
    return (flying + weight(engine)) * (engine.demand.service_s or 1.0)
