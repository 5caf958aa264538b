"""The data plane's own state: who waits for which engine, who is in flight, and whose bytes may flow.

One event loop thread, no locks. The loop opens and closes gates; gateway coroutines enter and leave through them.

A request that was admitted counts as in flight from that instant on, before its coroutine even runs again: a gate that
is closed right after it was opened still drains what it let in.
"""

import asyncio
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from math import inf

from rotator.core.history import Chains, Expectation, History, expect
from rotator.core.values import EngineName
from rotator.ports import RotatorError
from rotator.service.gates import (
    ClientQueueFull,
    Cut,
    EngineUnavailable,
    Gate,
    Limits,
    QueueFull,
    Ticket,
    Waiter,
    WaitExpired,
)
from rotator.service.operations import QueueEntry

__all__ = ["ClientQueueFull", "Cut", "EngineUnavailable", "Limits", "QueueFull", "Ticket", "Traffic", "WaitExpired"]
RETRY_UNKNOWN_S = 10.0  # what a full queue tells its clients when nobody can say how long a wake takes


class Traffic:
    """Admission for all engines.

    ``on_demand(engine)`` is called whenever the wish for an engine changes (a request begins to wait, or one that
    waited or stood frozen goes away). ``on_request_end(model, waited_s, outcome)`` is called once a request: with the
    outcome that its ticket left with, or refused, expired or client_left for one that was never admitted.
    ``eta(engine)`` is the loop's estimate in seconds, None where it has none. None of them may raise or block.
    """

    def __init__(
        self,
        *,
        queue_total_max: int,
        on_demand: Callable[[EngineName], None],
        on_request_end: Callable[[str, float, str], None],
        eta: Callable[[EngineName], float | None],
    ) -> None:
        self.queue_total_max = queue_total_max
        self._on_demand = on_demand
        self._on_request_end = on_request_end
        self._eta = eta
        self._gates: dict[EngineName, Gate] = {}
        self._waiting_total = 0
        self._shut = False
        self._clock: Callable[[], float] | None = None
        self._chains = Chains()
        self.shares: Mapping[str, float] = {}  # of clients, 1 where none is named
        self.waiting_max: Mapping[str, int] = {}  # of clients, in all lines together; no bound where none is named
        self._waiting_by: Counter[str] = Counter()
        self.local_offset_s: float | None = None  # from the loop's clock to local wall time; None: no hours are learned
        self._id_prefix = f"r{secrets.token_hex(4)}"  # tells this life's requests from those of the last
        self._id_last = 0

    def configure(self, limits: Mapping[EngineName, Limits]) -> None:
        """Add, change and remove engines. Waiters of kept engines stay in line; those of removed ones fail now."""
        for engine, limit in limits.items():
            if (gate := self._gates.get(engine)) is None:
                self._gates[engine] = Gate(engine, limit)
            else:
                gate.change(limit)
                gate.removed = gate.retired = False
        for engine in [e for e in self._gates if e not in limits]:
            self.retire((engine,))
            self._gates[engine].removed = True
            self._forget_if_gone(self._gates[engine])

    def retire(self, engines: Iterable[EngineName]) -> None:
        """Engines that are about to be removed: nobody new, and nobody who waits. What is in flight goes on.
        ``configure`` ends it, or takes it back."""
        for gate in (self._gates[engine] for engine in engines if engine in self._gates):
            gate.is_open, gate.retired = False, True
            self._refuse_waiters(gate, f"'{gate.engine}' was removed from the configuration", None)

    # -- gateway side ------------------------------------------------------------------------------------------------

    def try_enter(self, engine: EngineName, model: str, client: str = "") -> Ticket | None:
        """The ticket, if the engine's gate is open; None means: use ``enter``."""
        gate = self._gates.get(engine)
        if gate is None or self._shut or not gate.admits:
            return None
        now = self.now_s()
        self._note(gate, now)
        return self._admit(gate, self.new_id(), model, now, 0.0, client)

    async def enter(
        self,
        engine: EngineName,
        model: str,
        *,
        deadline_s: float | None,
        request_id: str | None = None,
        client: str = "",
    ) -> Ticket:
        """Wait for the gate. ``deadline_s`` is clamped to the engine's own bound, which holds where it is None.
        ``client`` is whose request it is, where keys tell: clients in one line are served in their shares.

        Raises QueueFull, EngineUnavailable, WaitExpired. Cancelling forgets the waiter at once.
        """
        now = self.now_s()
        gate = self._gates.get(engine)
        try:
            if gate is None:
                raise EngineUnavailable(f"'{engine}' is not configured")
            self._note(gate, now)
            self._check_queue(gate, client)
        except RotatorError:
            self._on_request_end(model, 0.0, "refused")
            raise
        ident = request_id or self.new_id()
        if gate.admits:
            return self._admit(gate, ident, model, now, 0.0, client)
        bound_s = gate.limits.wait_deadline_s if deadline_s is None else min(deadline_s, gate.limits.wait_deadline_s)
        return await self._wait(gate, ident, model, now, bound_s, client)

    def visit(self, engine: EngineName) -> Ticket:
        """Talk to an engine's API server as it is, awake or not: uncounted, no reason to stay awake, and yet held back
        and cut with the rest. Raises EngineUnavailable."""
        gate = self._gates.get(engine)
        if gate is None or self._shut:
            raise EngineUnavailable("shutting down" if self._shut else f"'{engine}' is not configured")
        ticket = Ticket(self, gate, self.new_id(), engine, 0.0)
        gate.visitors[ticket] = None
        return ticket

    def new_id(self) -> str:
        """A request id, unique over the lives of the service."""
        self._id_last += 1
        return f"{self._id_prefix}-{self._id_last}"

    # -- loop side ---------------------------------------------------------------------------------------------------

    def open(self, engine: EngineName) -> None:
        """Admit: all waiters now, in order, as far as it serves so many at once, and everyone who comes. A failure is
        over."""
        gate = self._gates[engine]
        gate.failure = None
        gate.is_open = not gate.retired
        self._let_in(gate)

    def close(self, engine: EngineName) -> None:
        """Stop admitting. What is in flight goes on."""
        if gate := self._gates.get(engine):
            gate.is_open = False

    def hold(self, engine: EngineName) -> None:
        """The engine's streams stand still: each in-flight ticket counts one freeze, and its bytes are held back until
        ``release_hold``, so that nothing a woken engine says reaches a client before its canary has passed."""
        gate = self._gates[engine]
        if gate.held:
            return
        gate.held = True
        gate.held_since_s = self.now_s()
        gate.flow.clear()
        gate.freezes += len(gate.tickets)
        for ticket in gate.tickets:
            ticket.freezes += 1

    def release_hold(self, engine: EngineName) -> None:
        if gate := self._gates.get(engine):
            if gate.held:
                self._count_stall(gate)
            gate.held = False
            gate.flow.set()

    def fail(self, engine: EngineName, reason: str, retry_after_s: float | None = None) -> None:
        """Refuse all waiters now and everyone who comes, until ``clear_failure`` or ``open``."""
        gate = self._gates[engine]
        gate.is_open = False
        gate.failure = (reason, retry_after_s)
        self._refuse_waiters(gate, reason, retry_after_s)

    def clear_failure(self, engine: EngineName) -> None:
        if gate := self._gates.get(engine):
            gate.failure = None

    def abort(self, engine: EngineName, reason: str) -> None:
        """Cut every in-flight request: their clients see a broken connection, never a whole answer."""
        if gate := self._gates.get(engine):
            for ticket in [*gate.tickets, *gate.visitors]:
                ticket._do_cut(reason)
            gate.wake_held()

    def cut_stalled(self, engine: EngineName, reason: str) -> None:
        """Cut the requests that have stood still for as long as they may, over all their freezes."""
        gate = self._gates.get(engine)
        if gate is None or not gate.held:
            return
        for ticket in [t for t in gate.tickets if t.stalled_s >= gate.limits.stall_max_s]:
            ticket._do_cut(reason)
        gate.wake_held()

    async def drained(self, engine: EngineName) -> None:
        """Return when nothing is in flight."""
        gate = self._gates.get(engine)
        while gate is not None and gate.tickets:
            await gate.idle.wait()

    def engines(self) -> tuple[EngineName, ...]:
        return tuple(self._gates)

    def waiting(self, engine: EngineName) -> int:
        gate = self._gates.get(engine)
        return len(gate.waiters) if gate else 0

    def oldest_wait_s(self, engine: EngineName) -> float:
        """How long the first in line has waited; 0 where nobody waits."""
        gate = self._gates.get(engine)
        since_s = gate.waiters.first_since_s if gate else None
        return 0.0 if since_s is None else self.now_s() - since_s

    def wait_bound_s(self, engine: EngineName) -> float:
        """How long a request may wait for it at most; 0 for an engine that is not configured."""
        gate = self._gates.get(engine)
        return gate.limits.wait_deadline_s if gate else 0.0

    def weight(self, engine: EngineName) -> float:
        """How many wait, no client counted above its maximum; streams that stand still count as waiting."""
        gate = self._gates.get(engine)
        if gate is None:
            return 0.0
        return gate.crowd.weight + (gate.flying.weight if gate.held else 0.0)

    def flying_weight(self, engine: EngineName) -> float:
        """How many are in flight, no client counted above its maximum."""
        gate = self._gates.get(engine)
        return gate.flying.weight if gate else 0.0

    def in_flight(self, engine: EngineName) -> int:
        gate = self._gates.get(engine)
        return len(gate.tickets) if gate else 0

    def frozen(self, engine: EngineName) -> int:
        gate = self._gates.get(engine)
        return len(gate.tickets) if gate and gate.held else 0

    def freezes(self, engine: EngineName) -> int:
        """How many streams of it were frozen since it was configured."""
        gate = self._gates.get(engine)
        return gate.freezes if gate else 0

    def max_freezes_left(self, engine: EngineName) -> int:
        """How often the engine may still be frozen before one of its requests has used up its freezes."""
        gate = self._gates[engine]
        return gate.limits.freezes_max - max((t.freezes for t in gate.tickets), default=0)

    def stall_left_s(self, engine: EngineName) -> float:
        """How much longer its worst-off request in flight may stand still."""
        gate = self._gates.get(engine)
        if gate is None:
            return inf
        if gate.limits.stall_max_s == inf or not gate.freezes:
            return gate.limits.stall_max_s
        return gate.limits.stall_max_s - max((t.stalled_s for t in gate.tickets), default=0.0)

    def stalled_s(self, engine: EngineName) -> float:
        """How long its requests stood still, all freezes that are over together."""
        gate = self._gates.get(engine)
        return gate.stalled_s if gate else 0.0

    def last_used_s(self, engine: EngineName) -> float:
        """When a request last entered or left, on the loop's clock; 0 if none ever did."""
        gate = self._gates.get(engine)
        return gate.used_at_s if gate else 0.0

    def history(self, engine: EngineName) -> History:
        """What its clients' requests have taught."""
        gate = self._gates.get(engine)
        return gate.history if gate else History()

    def remember(self, engine: EngineName, history: History) -> None:
        """Go on from what an earlier life of the service learned."""
        self._gates[engine].history = history

    def expect(self, engine: EngineName, horizon_s: float) -> Expectation:
        """How likely a client asks for it within the horizon, and what says so."""
        gate, now = self._gates.get(engine), self.now_s()
        if gate is None:
            return Expectation(0.0)
        local_s = None if self.local_offset_s is None else now + self.local_offset_s
        return expect(gate.history, self._chains, engine, now, horizon_s, local_s)

    def eta_s(self, engine: EngineName) -> float | None:
        return self._eta(engine)

    def entries(self) -> tuple[QueueEntry, ...]:
        """Everyone who waits, in order of arrival."""
        now = self.now_s()
        rows = []
        for gate in self._gates.values():
            eta_s = self._eta(gate.engine) if gate.waiters else None  # one estimate serves its whole line
            rows += [
                (w.since_s, QueueEntry(w.id, w.model, gate.engine, now - w.since_s, w.deadline_at_s - now, eta_s))
                for w in gate.waiters
            ]
        return tuple(entry for _, entry in sorted(rows, key=lambda row: row[0]))

    def shut(self) -> None:
        """The service goes down: whoever waits or comes is refused; what is in flight goes on."""
        self._shut = True
        for gate in self._gates.values():
            self._refuse_waiters(gate, "shutting down", None)

    # -- within ------------------------------------------------------------------------------------------------------

    def _check_queue(self, gate: Gate, client: str) -> None:
        if self._shut:
            raise EngineUnavailable("shutting down")
        if gate.removed or gate.retired:
            raise EngineUnavailable(f"'{gate.engine}' was removed from the configuration")
        if gate.failure is not None:
            raise EngineUnavailable(*gate.failure)
        if gate.admits:
            return
        where, kind = None, QueueFull
        if self._waiting_by[client] >= self.waiting_max.get(client, inf):
            where, kind = f"of key '{client}' ({self._waiting_by[client]})", ClientQueueFull
        elif len(gate.waiters) >= gate.limits.queue_max:
            where = f"for '{gate.engine}' ({len(gate.waiters)})"
        elif self._waiting_total >= self.queue_total_max:
            where = f"in all ({self._waiting_total})"
        if where is not None:
            eta_s = self._eta(gate.engine)
            retry_after_s = RETRY_UNKNOWN_S if eta_s is None else eta_s
            raise kind(f"too many requests wait {where}: try again later", retry_after_s)

    def _note(self, gate: Gate, now_s: float) -> None:
        """A client's request came: only these count as use, never a probe, a scrape, a canary or a look at a list."""
        gate.history.arrived(now_s, None if self.local_offset_s is None else now_s + self.local_offset_s)
        self._chains.arrived(gate.engine, now_s)

    def _let_in(self, gate: Gate) -> None:
        """Admit from the line, in fair order, as many as there are places."""
        now, most = self.now_s(), gate.limits.in_flight_max
        while gate.is_open and (most is None or len(gate.tickets) < most):
            waiter = gate.waiters.pop()
            if waiter is None:
                return
            self._waiting_total -= 1
            gate.crowd.remove(waiter.client)
            if not waiter.admitted.done():
                waited_s = max(0.0, now - waiter.since_s)
                waiter.admitted.set_result(self._admit(gate, waiter.id, waiter.model, now, waited_s, waiter.client))

    def _count_stall(self, gate: Gate) -> None:
        stood_s = max(0.0, self.now_s() - gate.held_since_s)
        gate.stalled_s += stood_s * len(gate.tickets)
        for ticket in gate.tickets:
            ticket._stood_s += stood_s

    def _admit(self, gate: Gate, ident: str, model: str, now_s: float, waited_s: float, client: str) -> Ticket:
        ticket = Ticket(self, gate, ident, model, waited_s, client)
        ticket.entered_s = now_s
        gate.tickets[ticket] = None
        gate.flying.add(client)
        gate.used_at_s = now_s
        gate.idle.clear()
        return ticket

    async def _wait(self, gate: Gate, ident: str, model: str, now_s: float, bound_s: float, client: str) -> Ticket:
        loop = asyncio.get_running_loop()
        admitted: asyncio.Future[Ticket] = loop.create_future()
        waiter = Waiter(ident, model, now_s, now_s + bound_s, admitted, client)
        gate.waiters.add(waiter, client, self.shares.get(client, 1.0), now_s)
        gate.crowd.add(client)
        self._waiting_total += 1
        self._waiting_by[client] += 1
        timer = loop.call_later(bound_s, self._expire, gate, waiter)
        try:
            self._on_demand(gate.engine)
            return await admitted
        except RotatorError as e:
            outcome = "expired" if isinstance(e, WaitExpired) else "refused"
            self._on_request_end(model, loop.time() - now_s, outcome)
            raise
        except BaseException:
            if admitted.done() and not admitted.cancelled() and admitted.exception() is None:
                admitted.result().leave("client_left")  # let in and cancelled in the same turn of the event loop
            else:
                self._on_request_end(model, loop.time() - now_s, "client_left")
            raise
        finally:
            timer.cancel()
            self._waiting_by[client] -= 1
            if not self._waiting_by[client]:
                del self._waiting_by[client]
            if waiter in gate.waiters:
                self._drop_waiter(gate, waiter)
                self._on_demand(gate.engine)

    def _expire(self, gate: Gate, waiter: Waiter) -> None:
        if not waiter.admitted.done():
            self._drop_waiter(gate, waiter)
            waited_s = waiter.deadline_at_s - waiter.since_s
            waiter.admitted.set_exception(
                WaitExpired(f"'{gate.engine}' did not become ready within {waited_s:.0f} s", self._eta(gate.engine))
            )
            self._on_demand(gate.engine)

    def _drop_waiter(self, gate: Gate, waiter: Waiter) -> None:
        gate.waiters.remove(waiter)
        gate.crowd.remove(waiter.client)
        self._waiting_total -= 1

    def _refuse_waiters(self, gate: Gate, reason: str, retry_after_s: float | None) -> None:
        for waiter in list(gate.waiters):
            self._drop_waiter(gate, waiter)
            if not waiter.admitted.done():
                waiter.admitted.set_exception(EngineUnavailable(reason, retry_after_s))

    def ticket_left(self, ticket: Ticket, gate: Gate, outcome: str) -> None:
        if ticket in gate.visitors:
            del gate.visitors[ticket]
            return
        if gate.held:
            gate.stalled_s += max(0.0, self.now_s() - gate.held_since_s)
        del gate.tickets[ticket]
        gate.flying.remove(ticket.client)
        gate.used_at_s = now = self.now_s()
        if outcome == "ok":
            gate.history.served(max(0.0, now - ticket.entered_s - ticket.stalled_s))
        if gate.waiters and gate.is_open:
            self._let_in(gate)
        if not gate.tickets:
            gate.idle.set()
            self._forget_if_gone(gate)
        self._on_request_end(ticket.model, ticket.waited_s, outcome)
        if gate.held:
            self._on_demand(gate.engine)

    def _forget_if_gone(self, gate: Gate) -> None:
        if gate.removed and not gate.tickets:
            del self._gates[gate.engine]

    def now_s(self) -> float:
        if self._clock is None:  # made outside the event loop, used inside one
            self._clock = asyncio.get_running_loop().time
        return self._clock()
