"""Contended turns: whose is next, how long one lasts, and whether work in flight may end before the engine yields.

What counts is how many requests are served at once. A busy engine keeps its turn

  * for ``min_stay_s`` in any case, so that nothing thrashes;
  * then until swaps cost at most ``swap_share`` of the time: the engines that contend share ``1 / swap_share`` times
    the cost of a swap there and back, by how much work each has;
  * then until ``turn_margin`` times as many would be served by swapping as are served now; whoever waits counts for
    more the longer the oldest of them has waited.

It ends at once when nobody uses the engine any more, and early for a wish that is overdue: then each of the engines
that contend has its part of the longest wait, so that neither bound breaks the other.
"""

from math import inf, log

from rotator.core.costs import load_s
from rotator.core.values import Engine, Policy, State

_CERTAIN = 2.0  # a spared stall is a guess, waiting is certain: it must be worth so many times as much
_PACE = 1.5  # so many swaps there and back, with a request between, weigh like one more request
_LEAD_SHARE_MAX = 0.5  # of the longest wait: a swap that takes longer cannot be begun early enough anyway


def weight(engine: Engine) -> float:
    """How many wait for it, each client counted up to its share."""
    demand = engine.demand
    return float(demand.waiting + demand.frozen) if demand.weight is None else demand.weight


def flying(engine: Engine) -> float:
    """How many are in flight, each client counted up to its share."""
    demand = engine.demand
    return float(demand.in_flight) if demand.flying is None else demand.flying


def served(engine: Engine) -> float:
    """How many requests it would serve at once: those who wait and those in flight, as far as it has slots."""
    demand, many = engine.demand, engine.demand.weight
    if many is None:
        many = float(demand.waiting + demand.frozen)
    if engine.state is State.AWAKE:
        many += flying(engine)
    return many if many < engine.slots else float(engine.slots)


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
    """How many it would serve at once, and what they have waited in requests. The larger goes first."""
    demand = engine.demand  # written out, not by the functions above: it is asked for every engine in every plan
    many = demand.weight
    if many is None:
        many = demand.waiting + demand.frozen
    if many > engine.slots:
        many = engine.slots
    return many + (demand.oldest_wait_s + engine.priority * policy.priority_worth_s) / policy.ageing_s


def stays_until_s(
    engine: Engine,
    wish: Engine,
    now_s: float,
    policy: Policy,
    *,
    interrupted: float | None = None,
    beside: float = 0.0,
    contenders: int = 2,
) -> float:
    """When a busy engine's turn ends for the wish; may lie in the past.

    ``interrupted`` is how many are served now by all that are in the wish's way (None: by this engine alone),
    ``beside`` how many more would be served by others that come in with the wish, and ``contenders`` how many engines
    want these GPUs, this one included.
    """
    if interrupted is None:
        interrupted = served(engine)
    least_s = engine.awake_since_s + policy.min_stay_s
    if policy.swap_share is None:
        return least_s
    turn_end_s = engine.awake_since_s + turn_s(engine, wish, policy)
    late_s = now_s + overdue_in_s(wish, policy)
    late_s = max(late_s, min(turn_end_s, engine.awake_since_s + part_s(engine, wish, policy, contenders)))
    ends_s = max(turn_end_s, now_s + _outweighs_in_s(engine, wish, policy, interrupted, beside))
    return max(least_s, min(ends_s, late_s))


def part_s(engine: Engine, wish: Engine, policy: Policy, contenders: int) -> float:
    """How long each turn may last when as many engines contend and none shall wait longer than the longest wait."""
    if policy.longest_wait_s is None:
        return 0.0
    return max(0.0, policy.longest_wait_s / max(2, contenders) - round_s(engine, wish) / 2.0)


def _outweighs_in_s(engine: Engine, wish: Engine, policy: Policy, interrupted: float, beside: float) -> float:
    """Seconds until those who wait outweigh those who are served, by waiting alone. What swaps and requests take sets
    the pace: where both are short, nobody waits long for either."""
    pace_s = min(policy.ageing_s, _PACE * (round_s(engine, wish) + (engine.demand.service_s or 0.0)))
    waited_s = wish.demand.oldest_wait_s + (wish.priority - engine.priority) * policy.priority_worth_s
    lacking = policy.turn_margin * interrupted - served(wish) - beside
    return max(0.0, lacking * pace_s - waited_s)


def turn_s(engine: Engine, wish: Engine, policy: Policy) -> float:
    """How long the engine's turn lasts against the wish so that swaps cost at most their share of the time."""
    if policy.swap_share is None or not (engine.measured and wish.measured):
        return 0.0
    both_s = round_s(engine, wish) * (1.0 / policy.swap_share - 1.0)
    mine, other = _load(engine), _load(wish)
    return both_s * mine / max(mine + other, 1e-9)


def drain_s(engine: Engine, wish: Engine | None, policy: Policy) -> float:
    """How long work in flight may go on before it is frozen: ``drain_bound_s`` where no clients wait (None), or where
    nothing is known of its service.

    While n streams are in flight, one ends every ``service_s / n`` seconds, and each that ends is spared a stall of the
    swap there and back and the other's turn, and of computing again what it had. Meanwhile everybody waits who waits
    for the wish. So the drain goes on as long as the streams that end spare more than the waiting costs; a spared stall
    is a guess and the waiting is certain, so it must be worth twice as much.
    """
    demand = engine.demand
    if wish is None or not policy.preempt or demand.service_s is None or not demand.in_flight:
        return policy.drain_bound_s
    worth_it = _CERTAIN * max(1.0, weight(wish)) * demand.service_s / stall_s(engine, wish, policy)
    if demand.in_flight <= worth_it:
        return 0.0  # with so few streams, waiting costs more than it spares
    return min(policy.drain_bound_s, demand.service_s * log(demand.in_flight / max(worth_it, 0.5)))


def stall_s(engine: Engine, wish: Engine, policy: Policy) -> float:
    """How long a stream of the engine is expected to lose by being frozen for the wish."""
    again_s = policy.recompute_share * (engine.demand.service_s or 0.0)
    return round_s(engine, wish) + max(policy.min_stay_s, batch_s(wish, weight(wish))) + again_s


def _load(engine: Engine) -> float:
    return served(engine) * (engine.demand.service_s or 1.0)
