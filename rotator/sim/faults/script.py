"""What happens to the service, as values: who asks, what fails, and when. A seed makes a script, a script makes a run.

A script is a plain list of timed events, so that a failing one can be made smaller by leaving events out, and printed.
"""

from dataclasses import dataclass

from rotator.core.values import EngineName, GpuId
from rotator.sim.faults.shape import EngineShape as EngineShape
from rotator.sim.faults.shape import Shape as Shape


@dataclass(frozen=True, slots=True)
class Ask:
    """A client's request: ``tokens`` pieces of an answer, one each ``token_s``. It hangs up after ``leaves_s`` where
    that is set."""

    at_s: float
    key: str
    engine: EngineName
    tokens: int
    token_s: float
    stream: bool = True
    deadline_s: float = 60.0
    leaves_s: float | None = None


@dataclass(frozen=True, slots=True)
class Order:
    """An operator's command: wake, sleep, stop, start, restart, release, pin, unpin (of an engine), cordon, uncordon
    (of a GPU)."""

    at_s: float
    verb: str
    target: str
    force: bool = False


@dataclass(frozen=True, slots=True)
class Arm:
    """The engine's next ``op`` (sleep, wake, boot, launch, ask, generate) goes wrong in the way ``how``, ``times`` in
    a row. ``rank`` is the GPU (by position) on which it does, where it does on one only."""

    at_s: float
    engine: EngineName
    op: str
    how: str
    seconds: float = 0.0
    rank: int = 0
    times: int = 1


@dataclass(frozen=True, slots=True)
class Die:
    """The engine's process ends by itself. Its bytes linger on the GPU for ``linger_s``."""

    at_s: float
    engine: EngineName
    linger_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Undying:
    """For so long no signal ends the engine's process."""

    at_s: float
    engine: EngineName
    seconds: float


@dataclass(frozen=True, slots=True)
class Wedge:
    """For so long the engine answers /health and nothing else, and its streams stand."""

    at_s: float
    engine: EngineName
    seconds: float


@dataclass(frozen=True, slots=True)
class Cut:
    """For so long no connection to the engine stands: new ones are refused, or (``silent``) never answered."""

    at_s: float
    engine: EngineName
    seconds: float
    silent: bool = False


@dataclass(frozen=True, slots=True)
class Nvml:
    """For so long the GPU's query hangs, fails, or tells no bytes by process (``how``: hang, fail, blind); or the GPU
    is lost, with everything that ran there (lost)."""

    at_s: float
    gpu: GpuId
    how: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Foreign:
    """A process of somebody else takes bytes of a GPU, as far as there are any, and gives them back."""

    at_s: float
    gpu: GpuId
    gib: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Disk:
    """For so long the ledger's disk is full, hangs, or is slow (``how``)."""

    at_s: float
    how: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Kill:
    """The service is killed without a word, ``steps`` turns of the event loop after ``before`` (a sleep, wake, start,
    stop or commit that it is about to make; "" for at once), and started again after ``down_s``."""

    at_s: float
    before: str = ""
    steps: int = 0
    down_s: float = 1.0


@dataclass(frozen=True, slots=True)
class Term:
    """The service is told to end (SIGTERM), and does with its engines what its fleet file says. What is not over after
    ``patience_s`` is killed. It is started again after ``down_s``."""

    at_s: float
    patience_s: float
    down_s: float = 1.0


@dataclass(frozen=True, slots=True)
class Reserve:
    """Somebody reserves the engine, from so many seconds later on, for so long."""

    at_s: float
    engine: EngineName
    in_s: float
    seconds: float
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Edit:
    """Somebody changes the fleet file and has it read again. ``how``: remove, add, command, pin, unpin, priority,
    levels (of the engine), calendar, idle (settings), break (the file cannot be read)."""

    at_s: float
    engine: EngineName
    how: str


@dataclass(frozen=True, slots=True)
class Jump:
    """The wall clock jumps."""

    at_s: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Away:
    """For so long the launcher cannot be reached, hangs, or does what it is told but its answer is lost (``how``:
    refuse, hang, lost)."""

    at_s: float
    how: str
    seconds: float


Event = (
    Ask | Order | Arm | Die | Undying | Wedge | Cut | Nvml | Foreign | Disk | Kill | Term | Edit | Reserve | Jump | Away
)


@dataclass(frozen=True, slots=True)
class Script:
    """``faults_end_s`` is when everything that fails stops failing: then the fleet must come to rest."""

    seed: int
    shape: Shape
    events: tuple[Event, ...]
    faults_end_s: float

    def lines(self) -> list[str]:
        """For people: a small script to read and to put into a test."""
        shape = self.shape
        head = (
            f"seed {self.seed}: {shape.gpus} GPUs of {shape.gpu_gib:g} GiB, {shape.host_budget_gib:g} GiB for masters"
        )
        engines = [f"  {engine}" for engine in shape.engines]
        return [head, *engines, *(f"  {event}" for event in self.events), f"  faults end at {self.faults_end_s:g} s"]
