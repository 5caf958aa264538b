"""The small judgements around a plan: whose turn is first, what a wait will be, when to try again."""

from collections import defaultdict
from collections.abc import Mapping
from math import inf

from rotator.core.lifecycle import is_moving
from rotator.core.placement import Room, need
from rotator.core.turns import due_in_s, urgency
from rotator.core.values import Engine, EngineName, GpuId, Policy, Snapshot, State

BACKOFF_DOUBLINGS_MAX = 32
_DUE_FROM = 0.25  # of the longest wait: with so many rivals that a wish were due before, the bound cannot be kept


def rank_s(engine: Engine, policy: Policy) -> float:
    """How strongly clients want the engine, in seconds of waiting: the larger goes first, and waiting makes it grow."""
    return engine.priority * policy.priority_worth_s + engine.demand.oldest_wait_s


def is_wanted(engine: Engine) -> bool:
    """Whether clients want it and neither does it serve nor is it on its way anywhere."""
    demand, state = engine.demand, engine.state
    if not demand.waiting and not demand.frozen:
        return False
    return state is State.ASLEEP or (state is not State.AWAKE and not is_moving(state))


def by_turn(snapshot: Snapshot) -> list[Engine]:
    """The engines that clients want, first turn first: the overdue, longest first; then by urgency, or by rank where
    that is switched off; then by name so that equal ones have an order too."""
    policy = snapshot.policy
    rank, due = urgency if policy.urgency else rank_s, due_now(snapshot)
    turns = []
    for engine in snapshot.engines.values():
        demand = engine.demand
        if (demand.waiting or demand.frozen) and (engine.state is State.ASLEEP or is_wanted(engine)):
            if engine.name in due:
                turns.append((0, -demand.oldest_wait_s, engine.name))
            else:
                turns.append((1, -rank(engine, policy), engine.name))
    turns.sort()
    return [snapshot.engines[name] for _, _, name in turns]


def due_now(snapshot: Snapshot) -> frozenset[EngineName]:
    """The wishes that must be next so that none waits longer than the longest wait, nor any stream stands still for
    longer than it may."""
    policy, from_s = snapshot.policy, due_from_s(snapshot.policy)
    may_be = [
        e for e in snapshot.engines.values() if (e.demand.oldest_wait_s >= from_s or e.demand.frozen) and is_wanted(e)
    ]
    if not may_be:
        return frozenset()
    rivals = rivals_on(snapshot)
    return frozenset(e.name for e in may_be if due_in_s(e, policy, max(rivals[g] for g in e.gpus) - 1) <= 0.0)


def due_from_s(policy: Policy) -> float:
    """Seconds of waiting before which no wish can be due, however many its rivals."""
    return inf if policy.longest_wait_s is None else _DUE_FROM * policy.longest_wait_s


def rivals_on(snapshot: Snapshot) -> Mapping[GpuId, int]:
    """How many engines want each GPU or are busy on it."""
    rivals: dict[GpuId, int] = defaultdict(int)
    for engine in snapshot.engines.values():
        demand = engine.demand
        if demand.waiting or demand.frozen or demand.in_flight:
            for gpu in engine.gpus:
                rivals[gpu] += 1
    return rivals


def eta_s(snapshot: Snapshot, name: EngineName) -> float | None:
    """Seconds until the engine could serve a request that arrives now, as an estimate; None where none can be given.

    The sum of: what it is doing now to its end (counted whole: nobody says how far it is), a turn of each earlier wish
    on any of its GPUs (the costs of that swap and the minimum stay), and its own swap (without evictions where it fits
    as it is). An engine whose GPUs are busy with another's transition also waits for that one's end.
    """
    engine, policy = snapshot.engines[name], snapshot.policy
    match engine.state:
        case State.AWAKE:
            return 0.0
        case State.QUARANTINED:
            return None
        case State.STARTING:
            return engine.start_cost_s
        case State.WAKING:
            return engine.wake_cost_s
    mine = frozenset(engine.gpus)
    residents = [e for e in snapshot.engines.values() if e is not engine and not mine.isdisjoint(e.gpus)]
    room = Room({gpu: snapshot.gpus[gpu] for gpu in mine if gpu in snapshot.gpus}, [*residents, engine])
    if any(size > room.capacity.get(gpu, 0) for gpu, size in zip(engine.gpus, engine.awake_bytes, strict=True)):
        return None
    earlier = [e for e in residents if is_wanted(e) and _before(e, engine, policy)]
    wanted = zip(engine.gpus, need(engine, room.charged[engine.name]), strict=True)
    fits = not earlier and all(size <= room.free[gpu] for gpu, size in wanted)
    awake = [e for e in residents if e.state is State.AWAKE]
    swap_s = 0.0 if fits else max((_yield_s(e, policy) for e in awake), default=0.0)
    moving_s = max((_transition_s(e, policy) for e in residents if is_moving(e.state)), default=0.0)
    queue_s = sum(_yield_s(e, policy) + _load_s(e) + policy.min_stay_s for e in earlier)
    backoff_s = max(0.0, engine.retry_at_s - snapshot.now_s) if engine.state is State.FAILED else 0.0
    own_s = _yield_s(engine, policy) if is_moving(engine.state) else 0.0
    return max(moving_s, own_s, backoff_s) + queue_s + swap_s + _load_s(engine)


def _before(other: Engine, engine: Engine, policy: Policy) -> bool:
    return (-rank_s(other, policy), other.name) < (-rank_s(engine, policy), engine.name)


def _load_s(engine: Engine) -> float:
    """Until it serves: a wake where it sleeps (or is about to), else a start."""
    asleep = engine.state in (State.ASLEEP, State.DRAINING, State.FALLING_ASLEEP)
    return engine.wake_cost_s if asleep else engine.start_cost_s


def _yield_s(engine: Engine, policy: Policy) -> float:
    return engine.sleep_cost_s + (policy.drain_bound_s if engine.demand.in_flight else 0.0)


def _transition_s(engine: Engine, policy: Policy) -> float:
    if engine.state is State.STARTING:
        return engine.start_cost_s
    return engine.wake_cost_s if engine.state is State.WAKING else _yield_s(engine, policy)


def backoff_s(failures: int, first_s: float, max_s: float) -> float:
    """How long to wait after the ``failures``-th failure in a row: doubling from ``first_s`` up to ``max_s``."""
    if failures <= 0:
        return 0.0
    return min(max_s, first_s * 2.0 ** min(failures - 1, BACKOFF_DOUBLINGS_MAX))


def smooth(old: float | None, new: float, weight: float = 0.3) -> float:
    """A measured cost, smoothed exponentially: the first measurement is believed whole, later ones by ``weight``."""
    return new if old is None else old + weight * (new - old)


def breaker_opens(failed_at_s: tuple[float, ...], now_s: float, *, failures: int, window_s: float) -> bool:
    """Whether an engine failed too often of late to be started again without a person. Times from after ``now_s`` (a
    clock that was set back) count."""
    return sum(at_s > now_s - window_s for at_s in failed_at_s) >= failures
