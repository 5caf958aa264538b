"""What the watchdog sees the world through: counters of engines, reports of GPUs, evidence, and what came of it."""

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from rotator.core.gpu_faults import GpuHealth
from rotator.core.values import EngineName, GpuId
from rotator.ports import RotatorError


class BundleGone(RotatorError):
    """There is no bundle of that incident (any more); the text says why."""


@dataclass(frozen=True, slots=True)
class Case:
    """What evidence is to be collected of. ``texts`` are files that the service itself writes, by name."""

    id: str
    engine: EngineName | None = None
    pids: frozenset[int] = frozenset()
    gpu_indices: tuple[int, ...] = ()
    log_path: str = ""
    texts: Mapping[str, str] = field(default_factory=dict)


class GpuReports(Protocol):
    async def health(self, gpu: GpuId, *, deadline_s: float) -> GpuHealth:
        """What it reports of itself, with the Xids since the last call. Raises DeviceTimeout where its query hangs,
        DeviceError where it fails otherwise than by being lost."""
        ...


class LogWatch(Protocol):
    async def warnings(self, log_path: str) -> int:
        """Lines, so far, in which its workers warn of a broadcast that a rank does not take. Never raises."""
        ...


class Evidence(Protocol):
    async def collect(self, case: Case, *, deadline_s: float) -> int:
        """Make the incident's bundle and return its bytes. Bounded in time and size; never raises: what could not be
        had is told in the bundle's manifest."""
        ...

    async def manifest(self, id: str) -> Mapping[str, Any]:
        """What the bundle holds, and what it lacks and why; empty where there is none."""
        ...

    def bundle(self, id: str) -> AsyncIterator[bytes]:
        """It as tar.gz, in pieces. Raises BundleGone."""
        ...

    async def names(self, pids: frozenset[int]) -> Mapping[int, str]:
        """What runs under these process ids, as far as it can be seen. Never raises."""
        ...


class Blind:
    """Where nobody watches: every port of this file, answering that nothing is known."""

    async def health(self, gpu: GpuId, *, deadline_s: float) -> GpuHealth:
        return GpuHealth(gpu)

    async def warnings(self, log_path: str) -> int:
        return 0

    async def collect(self, case: Case, *, deadline_s: float) -> int:
        return 0

    async def manifest(self, id: str) -> Mapping[str, Any]:
        return {}

    async def bundle(self, id: str) -> AsyncIterator[bytes]:
        nothing: tuple[bytes, ...] = ()
        for chunk in nothing:
            yield chunk
        raise BundleGone(f"there is no bundle of {id}: nobody collects any here")

    async def names(self, pids: frozenset[int]) -> Mapping[int, str]:
        return {}


@dataclass(frozen=True, slots=True)
class Senses:
    """All of it, in one piece."""

    reports: GpuReports
    logs: LogWatch
    evidence: Evidence


BLIND = Senses(Blind(), Blind(), Blind())
