"""What must hold when the service has ended by itself: its engines are as its fleet file wants them then."""

from rotator.sim.faults.engine import SimEngine
from rotator.sim.faults.judge import Judge
from rotator.sim.faults.life import ServiceLife

AWAY = "a service that ends leaves its engines as it was told to"


def judge_end(judge: Judge, life: ServiceLife, on_shutdown: str) -> None:
    """What could not be put away has its cause: something failed around it of late, or its masters have no room."""
    for runtime in life.loop.all_runtimes():
        engine = judge.engines[runtime.name]
        text = f"{runtime.name} is {runtime.state.value} ({runtime.reason}): {_said(engine)}"
        if on_shutdown != "leave":
            judge.expect(_is_away(engine, on_shutdown) or judge.excused(engine), AWAY, text)


def _is_away(engine: SimEngine, on_shutdown: str) -> bool:
    if on_shutdown == "stop":
        return not engine.processes
    return all(p.sleeping or not engine.has_room_for_masters for p in engine.processes)


def _said(engine: SimEngine) -> str:
    processes = [f"pid {p.pid} {'sleeps' if p.sleeping else 'is awake'} {p.operation}" for p in engine.processes]
    return ", ".join(processes) or "no process"
