"""What went wrong, as a register: opened, repeated, closed, told as events, and kept in the ledger behind its back."""

import asyncio
import logging
import re
from collections.abc import Callable, Collection
from dataclasses import asdict, replace
from datetime import UTC, datetime

from rotator.core.values import EngineName, GpuId
from rotator.ports import Incident, Ledger, LedgerError, RotatorError
from rotator.service.events import EventBus

_log = logging.getLogger(__name__)
KEPT_MAX = 500  # in memory, closed ones; the ledger keeps more
_RETRY_S = 1.0
_NAME_CHARS_MAX = 80


class UnknownIncident(RotatorError):
    """No incident of that id, or none that is still remembered."""


class Incidents:
    """Only the loop's task opens and closes. What waits to be written is the newest word of each: bounded by KEPT_MAX
    and the open ones, of which there is one a kind and engine (or GPU)."""

    def __init__(self, ledger: Ledger, bus: EventBus, wall: Callable[[], float]) -> None:
        self._ledger = ledger
        self._bus = bus
        self._wall = wall
        self._known: dict[str, Incident] = {}
        self._unwritten: dict[str, Incident] = {}
        self._wakeup = asyncio.Event()

    def restore(self, recovered: Collection[Incident]) -> None:
        """Open ones stay open: what becomes of their engine closes them."""
        self._known = {i.id: i for i in sorted(recovered, key=lambda i: i.opened_wall_s)}

    # -- looking -----------------------------------------------------------------------------------------------------

    def all(self) -> tuple[Incident, ...]:
        """Newest first."""
        return tuple(sorted(self._known.values(), key=lambda i: i.opened_wall_s, reverse=True))

    def get(self, id: str) -> Incident:
        """Raises UnknownIncident."""
        if id not in self._known:
            raise UnknownIncident(f"there is no incident '{id}': see `rotator incidents`")
        return self._known[id]

    def open_ones(self, *, engine: EngineName | None = None, gpu: GpuId | None = None) -> tuple[Incident, ...]:
        return tuple(
            i
            for i in self._known.values()
            if i.closed_wall_s is None and engine in (None, i.engine) and gpu in (None, i.gpu)
        )

    # -- writing -----------------------------------------------------------------------------------------------------

    def open(
        self,
        kind: str,
        reason: str,
        *,
        engine: EngineName | None = None,
        gpu: GpuId | None = None,
        serious: bool = True,
        action: str = "",
        advice: str = "",
    ) -> Incident:
        """One of a kind is open for an engine or GPU at a time: what comes again is counted there."""
        for known in self._known.values():
            if known.closed_wall_s is None and (known.kind, known.engine, known.gpu) == (kind, engine, gpu):
                again = replace(known, count=known.count + 1, reason=reason, action=action, advice=advice)
                return self._note(again)
        severity = "serious" if serious else "warning"
        made = Incident(self._id(engine or gpu), self._wall(), kind, severity, reason, engine, gpu, action, advice)
        self._note(made)
        self._publish("incident.opened", made)
        return made

    def close(self, id: str, outcome: str) -> None:
        """Harmless for one that is closed or gone."""
        known = self._known.get(id)
        if known is not None and known.closed_wall_s is None:
            closed = self._note(replace(known, closed_wall_s=self._wall(), outcome=outcome))
            self._publish("incident.closed", closed)

    def close_of(self, engine: EngineName, outcome: str, *, but: Collection[str] = ()) -> None:
        """All open ones of an engine, except of these kinds."""
        for known in self.open_ones(engine=engine):
            if known.kind not in but:
                self.close(known.id, outcome)

    def collected(self, id: str, bundle_bytes: int) -> None:
        if id in self._known and bundle_bytes:
            self._note(replace(self._known[id], bundle_bytes=bundle_bytes))

    def _note(self, incident: Incident) -> Incident:
        self._known[incident.id] = self._unwritten[incident.id] = incident
        self._wakeup.set()
        closed = [i.id for i in self._known.values() if i.closed_wall_s is not None]
        for old in closed[: max(0, len(closed) - KEPT_MAX)]:
            del self._known[old]
        return incident

    def _publish(self, kind: str, incident: Incident) -> None:
        fields = asdict(incident)
        del fields["engine"]
        fields["of"] = fields.pop("kind")  # an event has a kind of its own
        self._bus.publish(kind, incident.engine, **fields)

    def _id(self, about: str | None) -> str:
        when = datetime.fromtimestamp(self._wall(), UTC).strftime("%Y%m%dT%H%M%SZ")
        name = re.sub(r"[^A-Za-z0-9_-]+", "-", about or "service").strip("-")[:_NAME_CHARS_MAX] or "service"
        id, number = f"{when}-{name}", 1
        while id in self._known:
            number += 1
            id = f"{when}-{name}-{number}"
        return id

    async def run(self) -> None:
        """Write what is noted, for ever; a ledger that cannot is tried again."""
        while True:
            await self._wakeup.wait()
            self._wakeup.clear()
            while self._unwritten:
                id, incident = next(iter(self._unwritten.items()))
                del self._unwritten[id]
                try:
                    await self._ledger.put_incident(incident)
                except LedgerError as e:
                    _log.warning("ledger: incident %s not written, trying again: %s", id, e)
                    self._unwritten.setdefault(id, incident)
                    await asyncio.sleep(_RETRY_S)
