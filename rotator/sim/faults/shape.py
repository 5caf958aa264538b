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


@dataclass(frozen=True, slots=True)
class Shape:
    """The machine and its fleet."""

    gpus: int
    gpu_gib: float
    host_budget_gib: float
    idle_sleep_s: float | None
    engines: tuple[EngineShape, ...]
