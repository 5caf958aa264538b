"""The ladder down: awake, asleep with masters in host RAM, masters on disk, stopped. Who goes a rung deeper, and why.

Nobody sinks for nothing: memory that nobody else wants costs nothing to hold. An engine sinks because it was idle for
as long as the configuration bears, because another one is likelier wanted on its GPUs, or because host RAM runs short:
then those masters go first whose loss is least regretted a byte, of sleeping and of awake engines alike.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import inf

from rotator.core.costs import wake_s
from rotator.core.eviction import Option, sleep_options, stop_option, wanted_back
from rotator.core.hostram import HostBytes, NodeBytes, clipped, fits, helps, most, spread, total
from rotator.core.placement import Room, gib, need
from rotator.core.values import Action, Depth, Engine, GpuId, Policy, Snapshot, State

_MARGIN = 2.0  # a guess must promise so many times what it costs: it may be wrong
_LOOK_AGAIN_S = 10.0  # chances change with the silence: they are compared anew after this,
_LOOK_AGAIN_SHARE = 0.5  # or after it has become longer by this part


@dataclass(frozen=True, slots=True)
class Descent:
    """One engine's step down, and why."""

    option: Option
    why: str


@dataclass(frozen=True, slots=True)
class Descents:
    """What is due now, and when to look again."""

    due: tuple[Descent, ...] = ()
    look_again_at_s: float | None = None


def descents(snapshot: Snapshot, room: Room, host_free_bytes: HostBytes) -> Descents:
    """Who sinks now. At most one step an engine; nobody pinned, wanted, busy or with frozen streams."""
    policy = snapshot.policy
    timed = policy.idle_sleep_s is not None or policy.idle_sink_s is not None or policy.idle_stop_s is not None
    if not timed and not policy.ladder:
        return Descents()
    due: dict[str, Descent] = {}
    again_s = _by_time(snapshot, room, due) if timed else inf
    if policy.ladder:
        again_s = min(again_s, _for_others(snapshot, room, due))
        short = _host_short(snapshot, host_free_bytes)
        if not fits(short, 0):
            left = total(clipped(host_free_bytes))
            why = f"host RAM for masters has {gib(left)} left and whoever sleeps next needs more"
            taken = [e for e in snapshot.engines.values() if e.name not in due]
            for option in relief(taken, room.charged, short, policy, stops=False) or ():
                due[option.engine.name] = Descent(option, why)
    return Descents(tuple(due.values()), None if again_s == inf else again_s)


def is_idle(engine: Engine) -> bool:
    """Whether nobody uses or wants it and it may be moved."""
    demand = engine.demand
    return not (engine.pinned or demand.waiting or demand.in_flight or demand.frozen)


# -- by time ---------------------------------------------------------------------------------------------------------


def _by_time(snapshot: Snapshot, room: Room, due: dict[str, Descent]) -> float:
    """Steps that the clock alone brings. Returns when the next one is due."""
    now_s, again_s = snapshot.now_s, inf
    for engine in snapshot.engines.values():
        if engine.state not in (State.AWAKE, State.ASLEEP) or not is_idle(engine):
            continue
        if engine.name in snapshot.calendar.defaults:
            continue  # it would come back at once
        for at_s, descent in _rungs(engine, room.charged[engine.name], snapshot.policy):
            if at_s > now_s:
                again_s = min(again_s, at_s)
            elif _soon(engine, snapshot.policy):
                again_s = min(again_s, now_s + _LOOK_AGAIN_S)
            else:
                due.setdefault(engine.name, descent)
    return again_s


def _rungs(engine: Engine, charged: tuple[int, ...], policy: Policy) -> Iterator[tuple[float, Descent]]:
    """The engine's next steps by time, the deepest first: each with when it is due."""
    used_s = engine.demand.last_used_s
    if engine.state is State.AWAKE:
        if policy.idle_sleep_s is not None and (options := sleep_options(engine, charged, policy)):
            why = f"nobody has used {engine.name} for {policy.idle_sleep_s:g} s"
            yield max(used_s, engine.awake_since_s) + policy.idle_sleep_s, Descent(options[0], why)
        return
    since_s = max(used_s, engine.slept_at_s)
    if policy.idle_stop_s is not None and engine.can_stop:
        why = f"{engine.name} has slept for {policy.idle_stop_s:g} s and nobody has asked for it"
        yield since_s + policy.idle_stop_s, Descent(stop_option(engine, charged, policy), why)
    if policy.idle_sink_s is not None and (option := to_disk(engine)):
        why = f"{engine.name} has slept for {policy.idle_sink_s:g} s and nobody has asked for it"
        yield since_s + policy.idle_sink_s, Descent(option, why)


def _soon(engine: Engine, policy: Policy) -> bool:
    """Whether it would be woken again at once, because it is likely wanted."""
    return policy.prewake_chance is not None and engine.demand.soon >= policy.prewake_chance


# -- for another that is likelier wanted -----------------------------------------------------------------------------


def _for_others(snapshot: Snapshot, room: Room, due: dict[str, Descent]) -> float:
    """Idle engines sleep ahead for one that is likely wanted and does not fit beside them. Returns when to look
    again."""
    policy, again_s = snapshot.policy, inf
    least = inf if policy.prewake_chance is None else policy.prewake_chance
    for coming in [e for e in snapshot.engines.values() if e.demand.soon >= least]:
        if coming.state is not State.ASLEEP or not is_idle(coming):
            continue
        lacking = _lacking(coming, room)
        if not lacking:
            continue
        used_s = [e.demand.last_used_s for gpu in lacking for e in room.awake[gpu]]
        silence_s = snapshot.now_s - max([coming.demand.last_used_s, *used_s])
        again_s = min(again_s, snapshot.now_s + max(_LOOK_AGAIN_S, _LOOK_AGAIN_SHARE * silence_s))
        leaving = _leaving(coming, lacking, room, snapshot)
        for option in leaving or ():
            chance = f"{coming.demand.soon:.0%}, {coming.demand.likely_why or 'by its history'}"
            why = f"{coming.name} is likelier wanted ({chance}) than {option.engine.name}, which is idle"
            due.setdefault(option.engine.name, Descent(option, why))
    return again_s


def _lacking(engine: Engine, room: Room) -> dict[GpuId, int]:
    free, wanted = room.free, need(engine, room.charged[engine.name])
    return {gpu: size - free[gpu] for gpu, size in zip(engine.gpus, wanted, strict=True) if size > free[gpu]}


def _leaving(coming: Engine, lacking: dict[GpuId, int], room: Room, snapshot: Snapshot) -> list[Option] | None:
    """The idle engines that would have to sleep, if that is worth it; None if it is not."""
    here = {e.name: e for gpu in lacking for e in room.awake[gpu]}
    idle = [e for e in here.values() if _may_leave(e, coming, snapshot)]
    if not idle or not _would_do(idle, lacking, room):
        return None
    rest, chosen, cost_s = dict(lacking), list[Option](), 0.0
    for engine in sorted(idle, key=lambda e: (e.demand.likely_wanted, e.name)):
        if max(rest.values()) <= 0:
            break
        options = sleep_options(engine, room.charged[engine.name], snapshot.policy, preferred_only=True)
        if not options:
            continue
        chosen.append(options[0])
        again_s = coming.sleep_cost_s + engine.wake_cost_s
        cost_s += max(engine.demand.soon, engine.demand.likely_wanted) * again_s
        rest = {gpu: size - options[0].frees.get(gpu, 0) for gpu, size in rest.items()}
    gain_s = coming.demand.soon * (coming.wake_cost_s + sum(o.engine.sleep_cost_s for o in chosen))
    return chosen if max(rest.values()) <= 0 and gain_s > _MARGIN * cost_s else None


def _may_leave(engine: Engine, coming: Engine, snapshot: Snapshot) -> bool:
    """Whether nobody uses it, it has settled, and the other is likelier wanted. A default engine stays: it would come
    back at once."""
    demand = engine.demand
    if engine.state is not State.AWAKE or not is_idle(engine) or demand.soon >= coming.demand.soon:
        return False
    if engine.name in snapshot.calendar.defaults:
        return False
    return snapshot.now_s - max(engine.awake_since_s, demand.last_used_s) >= snapshot.policy.min_stay_s


def _would_do(leaving: Iterable[Engine], lacking: Mapping[GpuId, int], room: Room) -> bool:
    """Whether they hold enough, to be asked before their options are weighed."""
    rest = dict(lacking)
    for engine in leaving:
        for gpu, size in zip(engine.gpus, room.charged[engine.name], strict=True):
            if gpu in rest:
                rest[gpu] -= size
    return max(rest.values()) <= 0


# -- host RAM --------------------------------------------------------------------------------------------------------


def relief(
    engines: Iterable[Engine],
    charged: Mapping[str, tuple[int, ...]],
    short_bytes: HostBytes,
    policy: Policy,
    *,
    stops: bool,
) -> list[Option] | None:
    """Whose masters to drop so that host RAM gains so many bytes: the cheapest regret a byte first, and nobody whom the
    others make superfluous. None if all together are too few. ``stops``: sleepers without a disk may be stopped."""
    everyone = list(engines)
    offers = [o for e in everyone if (o := drop_option(e, charged[e.name], everyone, policy, stops=stops)) is not None]
    offers.sort(key=lambda o: (o.cost_s / -total(o.host_bytes), o.engine.name))
    chosen = list[Option]()
    gained: HostBytes = 0
    for option in offers:
        if fits(short_bytes, gained):
            break
        if helps(-option.host_bytes, short_bytes - gained):
            chosen.append(option)
            gained -= option.host_bytes
    if not fits(short_bytes, gained):
        return None
    for option in sorted(chosen, key=lambda o: -o.cost_s):
        if fits(short_bytes, gained + option.host_bytes):
            chosen.remove(option)
            gained += option.host_bytes
    return chosen


def drop_option(
    engine: Engine, charged: tuple[int, ...], everyone: Iterable[Engine], policy: Policy, *, stops: bool
) -> Option | None:
    """How the engine's masters leave host RAM, and what that is expected to cost; None where they cannot or are none.

    ``host_bytes`` of the option is negative: what host RAM gains.
    """
    if not is_idle(engine) and engine.state is not State.AWAKE:
        return None
    if engine.state is State.AWAKE:
        if engine.masters_bytes <= 0:
            return None
        rivals = (o.demand.likely_wanted for o in everyone if o.state is not State.AWAKE and _meet(o, engine))
        cost_s = max(rivals, default=0.0) * engine.sleep_cost_s  # its next sleep copies them out again
        return Option(engine, Action.SINK, None, {}, cost_s, -spread(engine, engine.masters_bytes))
    if engine.state is not State.ASLEEP or engine.depth is not Depth.HOST or engine.host_bytes <= 0:
        return None
    if (sinking := to_disk(engine)) is not None:
        return sinking
    if not (stops and engine.can_stop):
        return None
    stop = stop_option(engine, charged, policy)
    cost_s = max(0.0, stop.cost_s - wanted_back(engine.demand) * wake_s(engine, Depth.HOST))
    return Option(engine, Action.STOP, None, stop.frees, cost_s, -spread(engine, engine.host_bytes))


def to_disk(engine: Engine) -> Option | None:
    """A sleeper's masters go from host RAM to disk; None where its allocator offers no disk, or they are not there."""
    if not engine.has_disk or engine.state is not State.ASLEEP or engine.depth is not Depth.HOST:
        return None
    cost_s = wanted_back(engine.demand) * max(0.0, wake_s(engine, Depth.DISK) - wake_s(engine, Depth.HOST))
    return Option(engine, Action.SINK, None, {}, cost_s, -spread(engine, engine.host_bytes), Depth.DISK)


def _host_short(snapshot: Snapshot, host_free_bytes: HostBytes) -> HostBytes:
    """Bytes of host RAM that are wanted beyond what is free: its share that is kept open, and room for the masters of
    whoever of those awake needs most when it sleeps."""
    if not any(e.has_disk or e.masters_bytes for e in snapshot.engines.values()):
        return 0  # nobody could give any back without being stopped
    spare = 1.0 - snapshot.policy.host_high
    kept: HostBytes = int(spare * snapshot.host_budget_bytes)
    if snapshot.node_budgets:
        budgets = {"": snapshot.host_budget_bytes, **snapshot.node_budgets}
        kept = NodeBytes({node: int(spare * size) for node, size in budgets.items()})
    able = (e for e in snapshot.engines.values() if e.state is State.AWAKE and not e.pinned)
    largest = most(spread(e, max(0, e.host_bytes - e.masters_bytes)) for e in able)
    return most((kept, largest)) - host_free_bytes


def _meet(one: Engine, other: Engine) -> bool:
    return not frozenset(one.gpus).isdisjoint(other.gpus)
