"""The machine and the fleet that a script plays on, as values."""

from dataclasses import dataclass

from rotator.core.values import EngineName


@dataclass(frozen=True, slots=True)
class EngineShape:
    """An engine as it truly is; ``planned_gib`` and ``planned_residue_gib`` are what its configuration says."""

    name: EngineName
    gpus: tuple[int, ...]
    awake_gib: float
    residue_gib: float
    planned_gib: float
    planned_residue_gib: float
    host_gib: float
    version: str
    levels: tuple[int, ...]
    boot_s: float
    sleep_s: float
    wake_s: float
    pin: bool = False
    preload: bool = False
    priority: int = 0
    served_model: str = ""
    elastic: bool = False
    kv_gib: float = 0.0  # of ``awake_gib``: what an elastic one frees first
    disk: bool = False
    keeps_masters: bool = False
    revision: int = 0  # of its command
    fallback: EngineName = ""


@dataclass(frozen=True, slots=True)
class WindowShape:
    """A window of the calendar: it comes at a minute of the hour in which the script begins."""

    name: str
    engines: tuple[EngineName, ...]
    minute: int
    duration_s: float
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Shape:
    """The machine and its fleet."""

    gpus: int
    gpu_gib: float
    host_budget_gib: float
    idle_sleep_s: float | None
    engines: tuple[EngineShape, ...]
    on_shutdown: str = "leave"
    idle_sink_s: float | None = None
    begins_s: float = 0.0  # seconds after a full hour
    windows: tuple[WindowShape, ...] = ()
    default_engines: tuple[EngineName, ...] = ()
