"""A plan's reasons in plain words. Built only for what enters the plan."""

from collections.abc import Iterable, Mapping

from rotator.core.eviction import Option
from rotator.core.hostram import HostBytes, left_for, total
from rotator.core.placement import gib
from rotator.core.values import Action, Command, Depth, Engine, GpuId, Level, State


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def names(engines: Iterable[str]) -> str:
    """At most three names, then how many more."""
    listed = list(engines)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")


def wanted(engine: Engine, command: Command | None) -> str:
    """Who wants the engine."""
    demand = engine.demand
    if command is not None:
        return f"an operator asked to {command.kind.value} {engine.name}" + (" by force" if command.force else "")
    if not demand.waiting and not demand.frozen:
        return _of_itself(engine)
    parts = []
    if demand.waiting:
        verb = "waits" if demand.waiting == 1 else "wait"
        parts.append(f"{count(demand.waiting, 'request')} {verb} for {engine.name}")
    if demand.frozen:
        verb = "stands" if demand.frozen == 1 else "stand"
        parts.append(f"{count(demand.frozen, 'stream')} of {engine.name} {verb} still")
    return f"{' and '.join(parts)}, the oldest {demand.oldest_wait_s:.1f} s"


def _of_itself(engine: Engine) -> str:
    """Why one comes in that nobody asks for."""
    if engine.state is State.FAILED:
        return f"{engine.name} failed, its backoff is over, and it is to run"
    return f"{engine.name} is to be loaded at the service's start, or again after a planned restart"


def needs(engine: Engine, need: tuple[int, ...], free: Mapping[GpuId, int]) -> str:
    """What it needs on its tightest GPU, beside what is free there."""
    tightest = max(range(len(need)), key=lambda i: need[i] - free[engine.gpus[i]])
    gpu, others = engine.gpus[tightest], len(need) - 1
    text = f"needs {gib(need[tightest])} on {gpu} where {gib(max(0, free[gpu]))} are free"
    return f"{text} (and on {others} more)" if others else text


def yields(option: Option, why: str, drain_s: float, host_free_bytes: HostBytes, force: bool) -> str:
    """Why this engine makes room, how, how much, and what becomes of its streams."""
    parts = [_how(option, host_free_bytes)]
    if option.frees:
        largest = max(option.frees, key=lambda gpu: option.frees[gpu])
        parts.append(f"frees {gib(option.frees[largest])} on {largest}")
    if (host_bytes := total(option.host_bytes)) < 0:
        parts.append(f"gives {gib(-host_bytes)} of host RAM back")
    return f"{why}: {', '.join(parts)}; {_fate(option, drain_s, force)}"


def _how(option: Option, host_free_bytes: HostBytes) -> str:
    engine = option.engine
    if option.action is Action.SINK:
        return _sinks(option)
    if option.level is Level.PAUSE:
        return "sleeps with its weights in place, KV cache first"
    if option.depth is Depth.DISK:
        return "sleeps with its masters on disk"
    preferred = next((level for level in engine.levels if level is not Level.PAUSE), None)
    left = max(0, left_for(engine, host_free_bytes))
    short = preferred is Level.HOST and engine.host_bytes > left and engine.state is State.AWAKE
    why = f" (host RAM has {gib(left)} left, its weights need {gib(engine.host_bytes)})" if short else ""
    if option.level is not None:
        return f"sleeps at level {option.level.value}{'' if option.level is preferred else why}"
    return f"stops{why}"


def _sinks(option: Option) -> str:
    if option.depth is Depth.DISK:
        return "its masters go from host RAM to disk"
    return "sleeps deeper" if option.frees else "drops the masters that it keeps in host RAM while it is awake"


def _fate(option: Option, drain_s: float, force: bool) -> str:
    """What becomes of the engine's streams."""
    engine, demand = option.engine, option.engine.demand
    flying = max(demand.in_flight, demand.frozen)
    if option.action is Action.SINK and flying:
        return f"{count(flying, 'stream')} of {engine.name} {'go on' if demand.in_flight else 'stand still meanwhile'}"
    if flying and force:
        return f"force aborts {count(flying, 'stream')} of {engine.name}"
    if demand.in_flight:
        freezes = option.action is Action.SLEEP and engine.can_freeze
        if freezes and drain_s <= 0.0:
            return (
                f"{count(demand.in_flight, 'stream')} in flight freeze at once: they would hold up more than they lose"
            )
        end = "freeze" if freezes else "it keeps its turn"
        return f"{count(demand.in_flight, 'stream')} in flight may finish for {drain_s:.1f} s, then {end}"
    if demand.waiting:
        return f"{count(demand.waiting, 'request')} will wait for its next turn"
    return "it is idle"
