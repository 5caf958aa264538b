"""Keeps the ledger's rows about engines current, in the background: decisions never wait for it."""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from rotator.core.values import State
from rotator.ports import EngineRecord, Lease, Ledger, LedgerError, Residency
from rotator.service.records import EngineRuntime

_log = logging.getLogger(__name__)
_RETRY_S = 1.0
_COMING = (State.STARTING, State.WAKING)


@dataclass(frozen=True, slots=True)
class _Due:
    record: EngineRecord
    residencies: tuple[Residency, ...]
    leases: tuple[Lease, ...]


class Recorder:
    """The newest record of each engine wins, so what waits is bounded by the number of engines.

    An engine that comes in holds a lease on its bytes until the GPUs show them: an expiry makes it void should the
    service die meanwhile and never come back.
    """

    def __init__(self, ledger: Ledger, wall: Callable[[], float] = time.time) -> None:
        self._ledger = ledger
        self._wall = wall
        self._due: dict[str, _Due] = {}
        self._leased: dict[str, tuple[Lease, ...]] = {}
        self._wakeup = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    def note(self, engine: EngineRuntime) -> None:
        self._due[engine.name] = _Due(engine.record(), engine.residencies(), self._leases(engine))
        self._idle.clear()
        self._wakeup.set()

    def _leases(self, engine: EngineRuntime) -> tuple[Lease, ...]:
        if engine.state not in _COMING:
            return ()
        config = engine.config
        bound_s = config.start_deadline_s if engine.state is State.STARTING else config.wake_deadline_s
        expires = self._wall() + bound_s
        return tuple(Lease(gpu, engine.name, engine.awake_on(gpu), expires) for gpu in engine.gpus)

    async def settled(self) -> None:
        """Return when everything noted so far is written."""
        await self._idle.wait()

    async def run(self) -> None:
        while True:
            await self._wakeup.wait()
            self._wakeup.clear()
            while self._due:
                name, due = next(iter(self._due.items()))
                del self._due[name]
                try:
                    await self._write(name, due)
                except LedgerError as e:
                    _log.warning("ledger: record of %s not written, trying again: %s", name, e)
                    self._due.setdefault(name, due)
                    await asyncio.sleep(_RETRY_S)
            self._idle.set()

    async def _write(self, name: str, due: _Due) -> None:
        await self._ledger.put_engine(due.record)
        await self._ledger.put_residencies(due.residencies)
        for lease in self._leased.pop(name, ()):
            await self._ledger.drop_lease(lease.gpu, lease.holder)
        for lease in due.leases:
            await self._ledger.put_lease(lease)
        self._leased[name] = due.leases
