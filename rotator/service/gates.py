"""One engine's door: its line, its tickets in flight, and the errors of those who are not let through.

RotatorError
├── QueueFull            too many wait already
│   └── ClientQueueFull      too many of this client
├── WaitExpired          the request's own deadline passed
├── EngineUnavailable    the engine is failing, was removed, or the service goes down
└── Cut                  an admitted request was aborted
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Protocol

from rotator.core.history import History
from rotator.core.values import EngineName
from rotator.ports import RotatorError
from rotator.service.line import Crowd, Line


class QueueFull(RotatorError):
    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ClientQueueFull(QueueFull):
    pass


class WaitExpired(RotatorError):
    def __init__(self, message: str, eta_s: float | None) -> None:
        super().__init__(message)
        self.eta_s = eta_s


class EngineUnavailable(RotatorError):
    def __init__(self, reason: str, retry_after_s: float | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.retry_after_s = retry_after_s


class Cut(RotatorError):
    """An operator's force, or the engine's death, ended an admitted request."""


@dataclass(frozen=True, slots=True)
class Limits:
    queue_max: int
    wait_deadline_s: float
    freezes_max: int
    in_flight_max: int | None = None  # more wait in line though the gate is open
    stall_max_s: float = inf  # over all freezes of one request
    client_waiters_max: int | None = None  # what of one client counts at most for the engine's turn


class Owner(Protocol):
    """What a ticket needs of the traffic that it was admitted by."""

    def now_s(self) -> float: ...

    def ticket_left(self, ticket: "Ticket", gate: "Gate", outcome: str) -> None: ...


class Ticket:
    """One admitted request: in flight until it leaves."""

    __slots__ = ("_gate", "_left", "_on_cut", "_owner", "_stood_s", "client", "cut", "engine", "entered_s",
                 "freezes", "id", "model", "waited_s")  # fmt: skip

    def __init__(self, owner: Owner, gate: "Gate", ident: str, model: str, waited_s: float, client: str = "") -> None:
        self.id = ident
        self.engine = gate.engine
        self.model = model
        self.client = client
        self.waited_s = waited_s
        self.entered_s = 0.0
        self._stood_s = 0.0
        self.freezes: int = 0
        self.cut: str | None = None  # why it was aborted, once it was
        self._gate = gate
        self._owner = owner
        self._left = False
        self._on_cut: Callable[[str], None] | None = None

    def leave(self, outcome: str) -> None:
        """No longer in flight. ``outcome`` is ok, failed, client_left or aborted; later calls change nothing."""
        if not self._left:
            self._left = True
            self._on_cut = None
            self._owner.ticket_left(self, self._gate, outcome)

    def on_cut(self, callback: Callable[[str], None]) -> None:
        """Have ``callback(reason)`` called when the ticket is cut: at once if it already was."""
        if self.cut is not None:
            callback(self.cut)
        else:
            self._on_cut = callback

    @property
    def stalled_s(self) -> float:
        """How long it stood still in all, over every freeze."""
        if self.freezes and self._gate.held:
            return self._stood_s + max(0.0, self._owner.now_s() - self._gate.held_since_s)
        return self._stood_s

    @property
    def flowing(self) -> bool:
        """Whether bytes may go down to the client now."""
        return not self._gate.held

    async def wait_flow(self) -> None:
        """Return when bytes may go down again. Raises Cut if the request is aborted meanwhile."""
        while self._gate.held and self.cut is None:
            await self._gate.flow.wait()
        if self.cut is not None:
            raise Cut(self.cut)

    def _do_cut(self, reason: str) -> None:
        if self.cut is None and not self._left:
            self.cut = reason
            if self._on_cut is not None:
                self._on_cut(reason)


@dataclass(frozen=True, slots=True, eq=False)
class Waiter:
    id: str
    model: str
    since_s: float
    deadline_at_s: float
    admitted: asyncio.Future[Ticket]
    client: str = ""


class Gate:
    """One engine's door, the line before it, and its past."""

    __slots__ = ("crowd", "engine", "failure", "flow", "flying", "freezes", "held", "held_since_s", "history", "idle",
                 "is_open", "limits", "removed", "retired", "stalled_s", "tickets", "used_at_s", "visitors",
                 "waiters")  # fmt: skip

    def __init__(self, engine: EngineName, limits: Limits) -> None:
        self.engine = engine
        self.limits = limits
        self.is_open = False
        self.held = False
        self.held_since_s = 0.0
        self.removed = False
        self.retired = False  # about to be removed: its engine is being stopped
        self.failure: tuple[str, float | None] | None = None
        self.tickets: dict[Ticket, None] = {}
        self.visitors: dict[Ticket, None] = {}
        self.waiters: Line[Waiter] = Line()
        self.crowd = Crowd(limits.client_waiters_max)  # of those who wait
        self.flying = Crowd(limits.client_waiters_max)
        self.history = History()
        self.freezes = 0
        self.stalled_s = 0.0  # of all requests that have stood still
        self.used_at_s = 0.0
        self.flow = asyncio.Event()
        self.idle = asyncio.Event()
        self.flow.set()
        self.idle.set()

    def wake_held(self) -> None:
        """Let those that stand still look around once, to learn that they were cut."""
        if self.held:
            self.flow.set()
            self.flow.clear()

    def change(self, limits: Limits) -> None:
        self.limits = limits
        self.crowd.each_max = self.flying.each_max = limits.client_waiters_max

    @property
    def admits(self) -> bool:
        """Whether one more may enter at once: nobody overtakes those who wait for a place."""
        most = self.limits.in_flight_max
        return self.is_open and (most is None or (len(self.tickets) < most and not self.waiters))
