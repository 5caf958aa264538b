"""What the planner sees of one engine: its record and its gate as one frozen value."""

from rotator.config_policies import PoliciesConfig
from rotator.core.costs import guess_s, preferred
from rotator.core.values import Demand, Depth, Engine, State
from rotator.service.records import EngineRuntime
from rotator.service.traffic import Traffic

_COST_UNKNOWN_WAKE_S = 5.0
_COST_UNKNOWN_SLEEP_S = 2.0
_COST_UNKNOWN_START_S = 90.0


def engine_seen(
    engine: EngineRuntime,
    traffic: Traffic,
    policies: PoliciesConfig,
    now_s: float,
    *,
    unified: bool,
    nodes: tuple[str, ...] = (),
) -> Engine:
    """``unified``: its GPUs share their memory with the host. ``nodes``: the machine of each of its GPUs, where there
    is more than one."""
    costs, config = engine.costs, engine.config
    seen = engine.held_bytes is not None  # on some of its GPUs, maybe: the others count by its state
    demand, sinks = demand_seen(engine, traffic, policies, now_s), engine.sinks_after_s <= now_s
    return Engine(
        name=engine.name,
        gpus=engine.gpus,
        state=engine.state,
        awake_bytes=tuple(engine.awake_on(g) for g in engine.gpus),
        residue_bytes=tuple(engine.residue_on(g) for g in engine.gpus),
        host_bytes=engine.host_bytes,
        held_bytes=tuple(engine.charge_on(g) for g in engine.gpus) if seen else None,
        depth=engine.depth,
        levels=config.levels,
        can_stop=config.launcher != "attach",
        pinned=engine.pinned,
        priority=config.priority,
        demand=demand,
        can_freeze=engine.yields_after_s <= now_s and demand.stall_left_s > 0.0,
        awake_since_s=engine.awake_since_s,
        wake_cost_s=wake_cost_s(engine),
        sleep_cost_s=costs.sleep_s or _COST_UNKNOWN_SLEEP_S,
        start_cost_s=costs.start_s or _COST_UNKNOWN_START_S,
        retry_at_s=engine.retry_at_s,
        preload=engine.preload,
        slots=config.slots,
        wake_costs=costs.wakes,
        slept_at_s=engine.slept_at_s,
        has_disk=config.disk and sinks,
        unified=unified,
        nodes=nodes,
        elastic=config.elastic,
        kv_bytes=(engine.kv_bytes,) * len(engine.gpus),
        restart_why=engine.restart_why,
        masters_bytes=engine.masters_bytes if sinks or engine.state is not State.AWAKE else 0,
    )


def wake_cost_s(engine: EngineRuntime) -> float:
    """What a wake takes from where the engine is, else from its preferred level: measured, or a guess."""
    usual, costs = preferred(engine.config.levels), engine.costs
    depth = engine.depth if engine.state is State.ASLEEP and engine.depth is not None else usual
    if depth in costs.wakes:
        return costs.wakes[depth]
    usual_s = costs.wake_s or _COST_UNKNOWN_WAKE_S
    if depth is usual:
        return usual_s
    return guess_s(depth, costs.wakes.get(Depth.HOST, usual_s), costs.start_s or _COST_UNKNOWN_START_S)


def demand_seen(engine: EngineRuntime, traffic: Traffic, policies: PoliciesConfig, now_s: float) -> Demand:
    name = engine.name
    frozen = traffic.frozen(name) if engine.state is State.ASLEEP else 0
    stood_s = now_s - engine.frozen_since_s if frozen else 0.0
    near = traffic.expect(name, policies.wanted_horizon_s)
    far = near if policies.prewake_chance is None else traffic.expect(name, policies.prewake_horizon_s)
    return Demand(
        waiting=traffic.waiting(name),
        oldest_wait_s=max(stood_s, traffic.oldest_wait_s(name)),
        in_flight=traffic.in_flight(name),
        frozen=frozen,
        likely_wanted=near.chance,
        likely_why=far.why,
        soon=far.chance,
        weight=traffic.weight(name),
        flying=traffic.flying_weight(name),
        service_s=traffic.history(name).service_s,
        last_used_s=traffic.last_used_s(name),
        stall_left_s=traffic.stall_left_s(name),
    )
