"""A failing script made smaller: events are left out as long as the same invariant still breaks (delta debugging)."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from rotator.sim.faults.run import run_script
from rotator.sim.faults.script import Event, Script

RUNS_MAX = 400

Fails = Callable[[Script], bool]


def breaks(invariant: str) -> Fails:
    """Whether a script still breaks that invariant, however it says so."""

    def fails(script: Script) -> bool:
        failure = run_script(script).failure
        return failure is not None and failure[0] == invariant

    return fails


def shrink(script: Script, fails: Fails, runs_max: int = RUNS_MAX) -> Script:
    """The smallest script that was found within so many runs. ``script`` itself fails; what is returned does too."""
    budget = _Budget(runs_max, fails)
    script = _fewer_events(script, budget)
    sooner = replace(script, faults_end_s=max((e.at_s for e in script.events), default=0.0) + 1.0)
    script = sooner if sooner.faults_end_s < script.faults_end_s and budget.fails(sooner) else script
    for engine in script.shape.engines:
        if not any(engine.name in _names(event) for event in script.events):
            kept = tuple(e for e in script.shape.engines if e is not engine)
            fewer = replace(script, shape=replace(script.shape, engines=kept))
            script = fewer if kept and budget.fails(fewer) else script
    return script


class _Budget:
    def __init__(self, runs_max: int, fails: Fails) -> None:
        self.left = runs_max
        self._fails = fails

    def fails(self, script: Script) -> bool:
        """False once no runs are left."""
        self.left -= 1
        return self.left >= 0 and self._fails(script)


def _fewer_events(script: Script, budget: _Budget) -> Script:
    parts = 2
    while len(script.events) > 1 and budget.left > 0:
        for chunk in _chunks(script.events, parts):
            smaller = replace(script, events=tuple(e for e in script.events if e not in chunk))
            if budget.fails(smaller):
                script, parts = smaller, max(2, parts - 1)
                break
        else:
            if parts >= len(script.events):
                break
            parts = min(len(script.events), 2 * parts)
    return script


def _chunks(events: Sequence[Event], parts: int) -> list[Sequence[Event]]:
    size = -(-len(events) // parts)
    return [events[i : i + size] for i in range(0, len(events), size)]


def _names(event: Event) -> tuple[str, ...]:
    return getattr(event, "engine", ""), getattr(event, "target", "")
