"""Keeps the ledger's rows about engines current, in the background: decisions never wait for it."""

import asyncio
import logging

from rotator.ports import EngineRecord, Ledger, LedgerError, Residency
from rotator.service.records import EngineRuntime

_log = logging.getLogger(__name__)
_RETRY_S = 1.0


class Recorder:
    """The newest record of each engine wins, so what waits is bounded by the number of engines."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._due: dict[str, tuple[EngineRecord, tuple[Residency, ...]]] = {}
        self._wakeup = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    def note(self, engine: EngineRuntime) -> None:
        self._due[engine.name] = (engine.record(), engine.residencies())
        self._idle.clear()
        self._wakeup.set()

    async def settled(self) -> None:
        """Return when everything noted so far is written."""
        await self._idle.wait()

    async def run(self) -> None:
        while True:
            await self._wakeup.wait()
            self._wakeup.clear()
            while self._due:
                name, (record, rows) = next(iter(self._due.items()))
                del self._due[name]
                try:
                    await self._ledger.put_engine(record)
                    await self._ledger.put_residencies(rows)
                except LedgerError as e:
                    _log.warning("ledger: record of %s not written, trying again: %s", name, e)
                    self._due.setdefault(name, (record, rows))
                    await asyncio.sleep(_RETRY_S)
            self._idle.set()
