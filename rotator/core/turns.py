"""Contended turns: whose is next, how long one lasts, and whether work in flight may end before the engine yields.

What counts is how many requests are served at once. A busy engine keeps its turn

  * for ``min_stay_s`` in any case, so that nothing thrashes;
  * then while swaps that interrupted somebody have lately cost more than ``swap_share`` of the GPUs' time;
  * then until ``turn_margin`` times as many (``pair_margin`` between two whose GPUs nobody else wants) would be served
    by swapping as are served now; whoever waits counts for more the longer the oldest of them has waited.

It ends at once when nobody uses the engine any more. And no wish waits longer than ``longest_wait_s``, as far as
minimum stays and swaps allow: one that is due goes before all others, oldest first, and as long as any is due no turn
is longer than its quota. A wish is due early enough for each rival on its GPUs to have a quota first.
"""

from math import inf, log

from rotator.core.costs import load_s
from rotator.core.history import SWAP_WINDOW_S
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


def quota_s(engine: Engine, policy: Policy, rivals: int) -> float:
    """Seconds that each of so many rivals may take, swap included, while the engine is due: half of an equal part of
    the longest wait, or the least that a turn takes. inf where there is no longest wait."""
    if policy.longest_wait_s is None:
        return inf
    least_s = policy.min_stay_s + policy.drain_bound_s + engine.sleep_cost_s + load_s(engine)
    return max(least_s, policy.longest_wait_s / (2.0 * (rivals + 1)))


def due_in_s(engine: Engine, policy: Policy, rivals: int = 1) -> float:
    """Seconds until the engine must be next; 0 if it must be now, inf if it never will have to.

    ``rivals`` are the engines that may have their turn before it. A stream's longest stall makes it due as well, early
    enough for each of them to have the least that a turn takes.
    """
    demand, longest_s = engine.demand, policy.longest_wait_s
    lead_s = load_s(engine)
    least_s = policy.min_stay_s + policy.drain_bound_s + engine.sleep_cost_s + lead_s
    by_stall_s = demand.stall_left_s - lead_s - rivals * least_s if demand.frozen else inf
    if longest_s is None or not (demand.waiting or demand.frozen):
        return max(0.0, by_stall_s)
    ahead_s = rivals * max(least_s, longest_s / (2.0 * (rivals + 1)))  # quota_s, written out
    lead_s = min(lead_s, _LEAD_SHARE_MAX * longest_s)
    return max(0.0, min(longest_s - ahead_s - lead_s - demand.oldest_wait_s, by_stall_s))


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
    rivals: int = 1,
    swapping: float = 0.0,
    margin: float | None = None,
) -> float:
    """When a busy engine's turn ends for the wish; may lie in the past.

    ``interrupted`` is how many are served now by all that are in the wish's way (None: by this engine alone),
    ``beside`` how many more would be served by others that come in with the wish, ``rivals`` how many engines want
    these GPUs or have them, ``swapping`` what share of the GPUs' time contended swaps have lately cost, and ``margin``
    how many times as many the swap must serve (None: ``turn_margin``).
    """
    least_s = engine.awake_since_s + policy.min_stay_s
    if policy.swap_share is None:
        return least_s
    interrupted = served(engine) if interrupted is None else interrupted
    affordable_s = affordable_in_s(policy.swap_share, swapping)
    must_serve = (policy.turn_margin if margin is None else margin) * interrupted
    ends_s = now_s + max(affordable_s, _outweighs_in_s(engine, wish, policy, must_serve - beside))
    quota_ends_s = engine.awake_since_s + quota_s(wish, policy, rivals) - engine.sleep_cost_s - load_s(wish)
    due_s = max(now_s + due_in_s(wish, policy, rivals), quota_ends_s)
    return max(least_s, min(ends_s, due_s))


def affordable_in_s(share: float, swapping: float) -> float:
    """Seconds until swaps, if none comes meanwhile, have cost no more than their share."""
    return SWAP_WINDOW_S * log(swapping / share) if swapping > share else 0.0


def margin(policy: Policy, rivals: int) -> float:
    """How many times as many a swap must serve as it interrupts, with so many others who want these GPUs or have them.
    Where that is only who has its turn, nobody else waits for the swap."""
    return policy.turn_margin if policy.pair_margin is None or rivals > 1 else policy.pair_margin


def _outweighs_in_s(engine: Engine, wish: Engine, policy: Policy, must_serve: float) -> float:
    """Seconds until those who wait are as many as the swap must serve, by waiting alone. What swaps and requests take
    sets the pace: where both are short, nobody waits long for either."""
    waited_s = wish.demand.oldest_wait_s + (wish.priority - engine.priority) * policy.priority_worth_s
    lacking = must_serve - served(wish)
    return max(0.0, lacking * pace_s(engine, wish, policy) - waited_s)


def pace_s(engine: Engine, wish: Engine, policy: Policy) -> float:
    """Seconds of waiting that weigh like one more request: by so much a turn ends sooner for one more who waits."""
    return min(policy.ageing_s, _PACE * (round_s(engine, wish) + (engine.demand.service_s or 0.0)))


def drain_s(engine: Engine, wish: Engine | None, policy: Policy) -> float:
    """How long work in flight may go on before it is frozen: ``drain_bound_s`` where no clients wait (None), or where
    nothing is known of its service.

    While n streams are in flight, one ends every ``service_s / n`` seconds, and each that ends is spared a stall of the
    swap there and back and the other's turn, and of computing again what it had. Meanwhile everybody waits who waits
    for the wish. So the drain goes on as long as the streams that end spare more than the waiting costs; a spared stall
    is a guess and the waiting is certain, so it must be worth twice as much. No priced drain is longer than
    ``drain_max_s``, nor than ``drain_bound_s`` where it would make the wish due.
    """
    demand = engine.demand
    if wish is None or not policy.preempt or demand.service_s is None or not demand.in_flight:
        return policy.drain_bound_s
    worth_it = _CERTAIN * max(1.0, weight(wish)) * demand.service_s / stall_s(engine, wish, policy)
    if demand.in_flight <= worth_it:
        return 0.0  # with so few streams, waiting costs more than it spares
    until_s = demand.service_s * log(demand.in_flight / max(worth_it, 0.5))
    return min(until_s, max(policy.drain_bound_s, min(policy.drain_max_s, due_in_s(wish, policy))))


def stall_s(engine: Engine, wish: Engine, policy: Policy) -> float:
    """How long a stream of the engine is expected to lose by being frozen for the wish."""
    again_s = policy.recompute_share * (engine.demand.service_s or 0.0)
    return round_s(engine, wish) + max(policy.min_stay_s, batch_s(wish, weight(wish))) + again_s
