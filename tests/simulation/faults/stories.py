"""Small scripts by hand: a machine, engines that cannot be awake together, and what happens to them."""

from dataclasses import replace

from rotator.sim.faults.run import Outcome, run_script
from rotator.sim.faults.script import Ask, EngineShape, Event, Script, Shape

_A = EngineShape(
    name="a",
    gpus=(0,),
    awake_gib=80.0,
    residue_gib=1.0,
    planned_gib=82.0,
    planned_residue_gib=1.0,
    host_gib=60.0,
    version="0.26.0",
    levels=(1,),
    boot_s=3.0,
    sleep_s=0.5,
    wake_s=0.5,
)


def engine(name: str, **changes: object) -> EngineShape:
    return replace(_A, name=name, **changes)  # type: ignore[arg-type]


def ask(at_s: float, name: str, tokens: int = 3, token_s: float = 0.05, **more: object) -> Ask:
    return Ask(at_s, f"{name}@{at_s:g}", name, tokens, token_s, **more)  # type: ignore[arg-type]


def story(
    *events: Event,
    engines: tuple[EngineShape, ...] = (_A, engine("b")),
    gpus: int = 1,
    host_gib: float = 400.0,
    faults_end_s: float = 40.0,
    **machine: object,
) -> Script:
    shape = Shape(gpus, 96.0, host_gib, None, engines, **machine)  # type: ignore[arg-type]
    return Script(1, shape, tuple(sorted(events, key=lambda e: e.at_s)), faults_end_s)


def played(*events: Event, **more: object) -> Outcome:
    """Play a story in which every invariant holds."""
    outcome = run_script(story(*events, **more))  # type: ignore[arg-type]
    assert outcome.failure is None, "\n".join((str(outcome.failure), *outcome.trace))
    return outcome
