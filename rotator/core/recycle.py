"""Planned restarts: an engine that only a new launch can mend is stopped while nobody would notice, and comes back."""

from math import inf

from rotator.core.eviction import stop_option
from rotator.core.ladder import Descent, Descents, is_idle
from rotator.core.placement import Room
from rotator.core.values import Engine, Snapshot, State


def recycling(snapshot: Snapshot, room: Room) -> Descents:
    """Who is stopped now for a restart. A moment is quiet when nobody has used any engine on its GPUs for so long, and
    none of them is likely wanted soon: the start that follows takes them all."""
    due, again_s = list[Descent](), inf
    for engine in snapshot.engines.values():
        if not engine.restart_why or engine.state not in (State.AWAKE, State.ASLEEP) or not engine.can_stop:
            continue
        quiet_at_s = _quiet_at_s(engine, snapshot)
        if quiet_at_s > snapshot.now_s:
            again_s = min(again_s, quiet_at_s)
            continue
        why = f"planned restart: {engine.restart_why}"
        due.append(Descent(stop_option(engine, room.charged[engine.name], snapshot.policy), why))
    return Descents(tuple(due), None if again_s == inf else again_s)


def _quiet_at_s(engine: Engine, snapshot: Snapshot) -> float:
    """When it may be stopped, as things stand; infinity while somebody is busy, wanted, or held by the calendar."""
    quiet_s, chance = snapshot.policy.restart_quiet_s, snapshot.policy.prewake_chance
    mine, at_s = frozenset(engine.gpus), snapshot.now_s
    for other in snapshot.engines.values():
        if mine.isdisjoint(other.gpus):
            continue
        demand = other.demand
        busy = demand.waiting or demand.in_flight or demand.frozen or other.held_by
        if busy or (other is engine and not is_idle(engine)) or (chance is not None and demand.soon >= chance):
            return inf
        at_s = max(at_s, demand.last_used_s + quiet_s)
    return at_s
