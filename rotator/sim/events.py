"""What a replay is made of beside requests: policies, swaps under way, and what is added up."""

from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Protocol

from rotator.core.values import Level

if TYPE_CHECKING:
    from rotator.sim.box import Box


class Decider(Protocol):
    """A policy. ``notes_arrivals``: whether ``arrived`` and ``ended`` are to be called for every request."""

    notes_arrivals: bool

    def decide(self, box: "Box") -> None:
        """Begin swaps by ``box.swap`` as seems right now, and ask to be asked again by ``box.ask_at``."""

    def arrived(self, box: "Box", engine: int) -> None: ...

    def ended(self, box: "Box", engine: int, service_s: float) -> None: ...

    def minds(self, box: "Box", engine: int) -> bool:
        """Whether the latest of those who wait for the engine may change its mind."""

    def swapped(self, box: "Box", swap: "ActiveSwap", seconds: float) -> None:
        """A swap is over; its drain does not count into ``seconds``."""


class Quiet:
    """A policy that needs no word of single requests and swaps."""

    notes_arrivals = False

    def arrived(self, box: "Box", engine: int) -> None:
        """Never called."""

    def ended(self, box: "Box", engine: int, service_s: float) -> None:
        """Never called."""

    def minds(self, box: "Box", engine: int) -> bool:
        """The first, and each time their number doubles."""
        many = len(box.waiting[engine])
        return many & (many - 1) == 0

    def swapped(self, box: "Box", swap: "ActiveSwap", seconds: float) -> None:
        """Nothing to note."""


class Attentive(Quiet):
    """Such a policy, for which it matters how many wait."""

    def minds(self, box: "Box", engine: int) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class Victim:
    """One engine that makes room: asleep at ``level``, or stopped where it is None. For ``drain_s`` what is in flight
    may end."""

    engine: int
    level: Level | None = Level.HOST
    drain_s: float = inf


@dataclass(slots=True)
class ActiveSwap:
    id: int
    admit: int | None
    victims: tuple[Victim, ...]
    freeze: bool
    gpus: frozenset[int]
    unasked: bool
    interrupts: bool = False  # somebody was being served by who makes room
    draining: bool = True
    drained_s: float = inf


@dataclass(slots=True)
class Counts:
    """What a replay adds up. ``lost_gpu_s`` is GPU time during sleeps, wakes, starts and stops."""

    swaps: int = 0
    wakes: int = 0
    sleeps: int = 0
    starts: int = 0
    stops: int = 0
    freezes: int = 0
    moved_bytes: int = 0
    lost_gpu_s: float = 0.0
    expired: int = 0
    refused: int = 0
    kept_turn: int = 0
    gate_s_max: float = 0.0  # the longest that anybody waited for an engine to open
    decisions: int = 0
