"""What bringing an engine back costs, by how deep it sleeps: measured, or guessed from the rungs beside it."""

from rotator.core.values import Depth, Engine, Level, State

LADDER = (Depth.KV, Depth.HOST, Depth.DISK)
_DEPTH_OF_LEVEL = {Level.PAUSE: Depth.KV, Level.HOST: Depth.HOST, Level.DISCARD: Depth.DISCARDED}
_KV_SHARE = 0.2  # unmeasured: remapping the KV cache is a small part of a wake that also copies weights
_DISK_TIMES = 4.0  # unmeasured: NVMe reads at about a quarter of what the links to the GPUs move, or worse


def depth_of(level: Level) -> Depth:
    return _DEPTH_OF_LEVEL[level]


def wake_s(engine: Engine, depth: Depth) -> float:
    """Seconds that a wake from that depth takes. ``wake_cost_s`` stands for the depth at which it was measured: the
    present one of a sleeper, else the preferred level's. Never less than a wake from higher up was measured to take."""
    measured = engine.wake_costs.get(depth)
    if measured is not None:
        return measured
    asleep = engine.state is State.ASLEEP and engine.depth is not None
    known = engine.depth if asleep else preferred(engine.levels)
    if depth is known:
        return engine.wake_cost_s
    return guess_s(depth, engine.wake_costs.get(Depth.HOST, engine.wake_cost_s), engine.start_cost_s)


def guess_s(depth: Depth, host_s: float, start_s: float) -> float:
    """What a wake from a depth may take before it was measured, from what a wake from host RAM and a start take."""
    match depth:
        case Depth.KV:
            return _KV_SHARE * host_s
        case Depth.HOST:
            return min(host_s, start_s)
        case Depth.DISK:
            return max(host_s, min(_DISK_TIMES * host_s, start_s))
        case Depth.DISCARDED:  # a start also reads the weights, and initialises besides
            return max(host_s, start_s / 2)


def load_s(engine: Engine) -> float:
    """Seconds until it serves, from where it is: a wake where it sleeps or is about to, else a start."""
    if engine.state in (State.ASLEEP, State.DRAINING, State.FALLING_ASLEEP, State.WAKING, State.AWAKE):
        return engine.wake_cost_s
    return engine.start_cost_s


def preferred(levels: tuple[Level, ...]) -> Depth:
    """How deep an engine with these levels usually sleeps."""
    return next((_DEPTH_OF_LEVEL[level] for level in levels if level is not Level.PAUSE), Depth.HOST)
