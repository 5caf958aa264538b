"""Small fleets for tests: builders with round numbers, and hypothesis strategies for random ones.

A GPU is 100 bytes here: the core only adds and compares.
"""

from typing import Any

from hypothesis import strategies as st

from rotator.core.placement import charge
from rotator.core.values import (
    Action,
    Command,
    CommandKind,
    Demand,
    Depth,
    Engine,
    Gpu,
    GpuId,
    Health,
    Level,
    Plan,
    Policy,
    Snapshot,
    State,
    Swap,
)

TOTAL = 100
MOVING = (State.STARTING, State.DRAINING, State.FALLING_ASLEEP, State.WAKING, State.STOPPING)


def engine(name: str, gpus: str = "0", state: State = State.ASLEEP, **more: Any) -> Engine:
    """An engine on the GPUs named by single letters, needing 80 bytes awake and 5 asleep on each unless told."""
    ids = tuple(gpus)
    awake, residue = more.pop("awake", 80), more.pop("residue", 5)
    depth = more.pop("depth", Depth.HOST if state is State.ASLEEP else None)
    return Engine(name, ids, state, (awake,) * len(ids), (residue,) * len(ids), depth=depth, **more)


def awake(name: str, gpus: str = "0", **more: Any) -> Engine:
    return engine(name, gpus, State.AWAKE, **more)


def waiting(requests: int = 1, oldest_s: float = 1.0, **more: Any) -> Demand:
    return Demand(requests, oldest_s, **more)


def snapshot(*engines: Engine, **more: Any) -> Snapshot:
    """A snapshot at 1000 s with plenty of host RAM; GPUs are those that engines name, unless given as ``gpus``."""
    gpus = more.pop("gpus", None) or [Gpu(id, TOTAL) for id in sorted({g for e in engines for g in e.gpus})]
    return Snapshot(
        now_s=more.pop("now_s", 1000.0),
        gpus={g.id: g for g in gpus},
        engines={e.name: e for e in engines},
        host_budget_bytes=more.pop("host_budget_bytes", 10**6),
        **more,
    )


def only_swap(plan: Plan) -> Swap:
    """The plan's single swap."""
    assert len(plan.swaps) == 1, plan
    return plan.swaps[0]


def evicted(swap: Swap) -> dict[str, Action]:
    return {step.engine: step.action for step in swap.evict}


def used(snapshot: Snapshot, id: GpuId) -> int:
    """What is spoken for on a GPU: charges, foreign bytes and reserve, counted afresh from the contract."""
    gpu = snapshot.gpus[id]
    charges = sum(charge(e)[e.gpus.index(id)] for e in snapshot.engines.values() if id in e.gpus)
    return charges + gpu.foreign_bytes + gpu.reserve_bytes


# -- random fleets -----------------------------------------------------------------------------------------------------
#
# Most are calm (healthy GPUs, engines that fit and can yield), so that plans have swaps in them; some are wild.

_IDS = "abcd"
_GPU_SETS = ("a", "b", "c", "d", "ab", "cd", "bc", "abcd", "abcd")


def _mostly(usual: Any, *others: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from((*(usual,) * 5, *others))


@st.composite
def demands(draw: st.DrawFn, state: State) -> Demand:
    if state is State.AWAKE:
        busy, streams = draw(st.sampled_from((0, 0, 2))), draw(st.sampled_from((0, 0, 0, 1, 3)))
        return Demand(busy, draw(st.floats(0, 100)), streams, likely_wanted=draw(st.sampled_from((0.0, 0.3, 1.0))))
    frozen = draw(_mostly(0, 2)) if state is State.ASLEEP else 0
    return Demand(draw(st.sampled_from((0, 1, 5))), draw(st.floats(0, 100)), 0, frozen, draw(st.floats(0, 1)))


@st.composite
def engines(draw: st.DrawFn, name: str, wild: bool) -> Engine:
    calm_states = st.sampled_from((State.AWAKE, State.AWAKE, State.ASLEEP, State.ASLEEP, State.ASLEEP, State.STOPPED))
    state = draw(st.sampled_from(State) if wild else calm_states)
    gpus = draw(st.sampled_from(_GPU_SETS))
    size = draw(st.integers(5, 120) if wild else st.integers(20, 90))
    held = draw(st.none() | st.integers(0, size)) if wild else None
    calm_depths = st.sampled_from((Depth.HOST, Depth.DISCARDED))
    return engine(
        name,
        gpus,
        state,
        awake=size,
        residue=draw(st.integers(0, min(10, size))),
        held_bytes=None if held is None else (held,) * len(gpus),
        depth=draw(st.sampled_from(Depth) if wild else calm_depths) if state is State.ASLEEP else None,
        host_bytes=draw(st.sampled_from((0, 50, 100))),
        levels=draw(st.sampled_from(((Level.HOST,), (Level.HOST, Level.DISCARD), (Level.DISCARD,)))),
        can_stop=draw(_mostly(True, False)),
        pinned=draw(_mostly(False, False, True)),
        priority=draw(st.integers(-2, 2)),
        demand=draw(demands(state)),
        can_freeze=draw(_mostly(True, False)),
        awake_since_s=draw(st.sampled_from((990.0, 990.0, 997.5, 999.5))),
        wake_cost_s=draw(st.floats(0.1, 5)),
        sleep_cost_s=draw(st.floats(0.1, 5)),
        retry_at_s=draw(st.sampled_from((0.0, 1005.0))),
        preload=draw(_mostly(False, True)),
    )


@st.composite
def commands(draw: st.DrawFn, names: list[str]) -> Command:
    return Command(
        draw(st.sampled_from(CommandKind)),
        draw(_mostly(names[0], *names, "nobody")),
        draw(_mostly(None, *Level)),
        draw(st.booleans()),
        draw(st.sampled_from((1.0, 2.0))),
    )


@st.composite
def snapshots(draw: st.DrawFn, *, with_commands: bool = True) -> Snapshot:
    wild = draw(_mostly(False, True))
    names = [f"e{i}" for i in range(draw(st.integers(2, 9)))]
    gpus = {id: draw(_gpus(id) if wild else st.just(Gpu(id, TOTAL, 0, 2))) for id in _IDS}
    return Snapshot(
        now_s=1000.0,
        gpus=gpus,
        engines={name: draw(engines(name, wild)) for name in names},
        host_budget_bytes=draw(st.sampled_from((0, 100, 200, 10_000, 10_000))),
        host_used_bytes=draw(st.sampled_from((0, 50, 150))),
        claimed=frozenset(draw(st.sets(st.sampled_from(_IDS), max_size=2))) if wild else frozenset(),
        commands=tuple(draw(st.lists(commands(names), max_size=4))) if with_commands else (),
        policy=Policy(min_stay_s=draw(st.sampled_from((0.0, 2.0)))),
    )


@st.composite
def _gpus(draw: st.DrawFn, id: GpuId) -> Gpu:
    return Gpu(id, TOTAL, draw(st.sampled_from((0, 0, 10, 60))), draw(st.sampled_from((0, 2))), draw(_healths()))


def _healths() -> st.SearchStrategy[Health]:
    return st.sampled_from((Health.OK,) * 6 + (Health.UNKNOWN, Health.CORDONED))
