"""What the runners of slow work may ask of the loop: the loop's task alone changes state, they report to it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from rotator.core.lifecycle import Event
from rotator.core.values import Depth, EngineName, GpuId, Level
from rotator.ports import GpuReading, Handle, RotatorError
from rotator.service.records import ActiveSwap, EngineRuntime


class Lied(RotatorError):
    """The engine's word and its bytes, or its answers, differ: it is quarantined with the evidence in the text."""


class WrongFiles(Lied):
    """Its workers run other files than its overlay bundle has."""


class Unbacked(Lied):
    """It says that it is awake, and its bytes have not come."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What a runner learned on the way to an event. None means: not learned, keep what is known."""

    reason: str
    handle: Handle | None = None
    version: str | None = None
    freezes: bool | None = None
    golden: Mapping[str, Any] | None = None
    canary: str | None = None
    level: Level | None = None
    depth: Depth | None = None
    pids: frozenset[int] | None = None
    unseen: bool | None = None
    awake_bytes: Mapping[GpuId, int] | None = None
    residue_bytes: Mapping[GpuId, int] | None = None
    held_bytes: Mapping[GpuId, int] | None = None
    host_bytes: int | None = None
    masters: bool | None = None  # whether it now keeps masters in host RAM, awake or asleep
    wake_s: float | None = None
    sleep_s: float | None = None
    start_s: float | None = None
    moved_bytes: int = 0
    kind: str = ""  # of the incident that a fault is, where its event does not say
    evidence: Mapping[str, Any] = field(default_factory=dict)


class Owner(Protocol):
    def runtime(self, engine: EngineName) -> EngineRuntime:
        """The loop's record, for reading."""
        ...

    def all_runtimes(self) -> Iterable[EngineRuntime]: ...

    def foreign_bytes(self, gpu: GpuId) -> int:
        """Bytes on the GPU that are none of our engines', as last read."""
        ...

    async def moved(
        self, engine: EngineName, event: Event, facts: Facts, readings: Mapping[GpuId, GpuReading] | None = None
    ) -> bool:
        """Report an event; returns once the loop has applied it. False if the engine's state no longer allows it:
        the runner then stops what it was doing, since somebody else (a crash, an operator) was first.

        ``readings`` are what its GPUs hold with the event: where an engine comes or goes otherwise than by a swap, they
        tell anew what is foreign before anything is planned."""
        ...

    async def learned(self, engine: EngineName, facts: Facts) -> None:
        """Report facts that change no state (a handle just started, process ids)."""
        ...

    async def lacking(self, engine: EngineName) -> str | None:
        """What it lacks to be brought in as the books stand now, in words: whoever made room for it may have kept more
        than was planned, and others may have taken some. None where it fits."""
        ...

    async def wanted(self, active: ActiveSwap) -> bool:
        """Whether anybody still waits for the engine that this swap would bring in."""
        ...
