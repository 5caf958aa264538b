"""What the loop's task is told. Each message is a value; some carry a future that is set once they are applied."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rotator.core.lifecycle import Event
from rotator.core.values import Command, EngineName, GpuId
from rotator.ports import GpuReading, LauncherNews
from rotator.service.operations import CommandResult
from rotator.service.owner import Facts


@dataclass(slots=True)
class Moved:
    engine: EngineName
    event: Event
    facts: Facts
    applied: asyncio.Future[bool]


@dataclass(slots=True)
class Learned:
    engine: EngineName
    facts: Facts
    applied: asyncio.Future[bool]


@dataclass(slots=True)
class SwapEnded:
    id: str


@dataclass(slots=True)
class Exited:
    """A watched engine's processes are gone. ``ref`` tells this launch from a later one."""

    engine: EngineName
    how: str
    ref: object


@dataclass(slots=True)
class GpuRead:
    """``begun_at_s`` is when the query was sent, on the loop's clock: what moved on the GPU since, it may not show.
    Infinity for one that was taken for the very event it comes with."""

    gpu: GpuId
    reading: GpuReading | None
    error: str | None
    begun_at_s: float


@dataclass(slots=True)
class PidsRead:
    engine: EngineName
    ref: object
    pids: frozenset[int]


@dataclass(slots=True)
class Unhealthy:
    """An awake engine did not answer /health in time (``ok`` False), or did again."""

    engine: EngineName
    ok: bool


@dataclass(slots=True)
class LauncherTold:
    news: LauncherNews


@dataclass(slots=True)
class Asked:
    """An operator's commands, given together. ``answers`` has one future a command. ``closing``: the service's own, at
    its end."""

    commands: tuple[Command, ...]
    answers: tuple[asyncio.Future[CommandResult], ...]
    expires_at_s: float
    closing: bool = False


@dataclass(slots=True)
class Do:
    """Run ``action`` in the loop's task: how the few operator actions that are no commands change state."""

    action: Callable[[], Any]
    done: asyncio.Future[Any]


@dataclass(slots=True)
class Tick:
    """Look again: a timer, a policy, or a wish that came or went."""


Message = Moved | Learned | SwapEnded | Exited | GpuRead | PidsRead | Unhealthy | LauncherTold | Asked | Do | Tick
