"""What must hold of the calendar: whoever it keeps awake is not put away for others."""

from rotator.core.calendar import resolve
from rotator.service.events import Event
from rotator.sim.faults.judge import Judge
from rotator.sim.faults.life import ServiceLife

KEPT = "what the calendar keeps awake is not put away for others"
_ENDS = ("sleep", "stop")


def judge_swap(judge: Judge, life: ServiceLife, event: Event) -> None:
    """At the moment of the plan: an operator's word and a restart that is due go before the calendar's."""
    plan = event.data["plan"]
    if plan["command"] is not None or life.loop.draining:
        return
    held = resolve(life.loop.snapshot()).held
    for step in plan["evict"]:
        engine = life.loop.runtime(step["engine"])
        if engine.name in held and step["action"] in _ENDS and not engine.restart_why:
            judge.expect(False, KEPT, f"{step['reason']}, but {held[engine.name].by} keeps it awake")
    if held:
        judge.checks[KEPT] += 1
