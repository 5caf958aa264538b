"""The ledger: what survives the service. SQLAlchemy on threads of its own, an asyncio face that never blocks the loop.

One thread writes, another reads. Nothing a decision waits for takes longer than the deadline, whatever the disk does,
and the data plane only counts in memory: a background task writes its samples and totals in batches.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self, TypeVar

from sqlalchemy import Connection

from rotator.adapters import ledger_keep as keep
from rotator.adapters import ledger_lives as lives
from rotator.adapters import ledger_rows as sql
from rotator.adapters.ledger_buffers import BATCH_MAX, Batch, Buffers
from rotator.adapters.ledger_database import STORE_ERRORS, Database, parse
from rotator.adapters.ledger_query import answer, question
from rotator.adapters.ledger_worker import Stuck, Worker
from rotator.core.values import GpuId
from rotator.ports import (
    EngineRecord,
    GpuInfo,
    Incident,
    Intent,
    Lease,
    LedgerError,
    NodeRecord,
    Outcome,
    Page,
    Recovered,
    Reservation,
    Residency,
)

FLUSH_EVERY_S = 1.0
RETENTION_EVERY_S = 60.0
RETENTION_BATCH_MAX = 500
BACKUP_DEADLINE_S = 600.0
_OPEN_DEADLINES = 12  # opening may migrate a large ledger: it gets this many deadlines

T = TypeVar("T")
_log = logging.getLogger("rotator.ledger")


class SqlLedger:
    """Implements ``rotator.ports.Ledger``. Made by ``open``; every coroutine raises only LedgerError."""

    def __init__(
        self,
        database: Database,
        *,
        deadline_s: float,
        sample_retention_h: float,
        wall: Callable[[], float],
        worker: Callable[[str], Worker] = Worker,
        retention_days: float = 30.0,
    ) -> None:
        self._database = database
        self._deadline_s = deadline_s
        self._retention_s = sample_retention_h * 3600
        self._journal_retention_s = retention_days * 86400
        self._wall = wall
        self._writer = worker("ledger's writer")
        # Another database, or one in memory, has no readers beside its writer worth a second thread.
        self._reader = worker("ledger's reader") if database.is_file else self._writer
        self._buffers = Buffers()
        self._batch_is_due = asyncio.Event()
        self._life = 0
        self._is_written = True
        self._is_lost = False  # another service took over: nothing is written any more
        self._is_closing = False
        self._drain: asyncio.Task[LedgerError | None] | None = None
        self._flusher: asyncio.Task[None] | None = None
        self._retain_at_s = self._beat_at_s = asyncio.get_running_loop().time()

    @classmethod
    async def open(
        cls,
        url: str,
        *,
        deadline_s: float,
        sample_retention_h: float,
        wall: Callable[[], float] = time.time,
        worker: Callable[[str], Worker] = Worker,
        retention_days: float = 30.0,
    ) -> Self:
        """Open (or begin) the ledger at a SQLAlchemy URL, migrate it and take hold of it.

        ``deadline_s`` bounds every later call, ``sample_retention_h`` is how long VRAM samples are kept,
        ``retention_days`` how long journal, decisions, request totals and reservations are kept once they are over,
        ``worker`` makes what carries out calls (a simulation's has no threads). Raises LedgerError that says what to
        do: held by another service, written by a newer one, disk full, no such driver.
        """
        # SQLite waits for another program's lock by itself; it must give up first, to say so.
        database = Database(parse(url), busy_s=deadline_s * 0.8)
        ledger = cls(
            database,
            deadline_s=deadline_s,
            sample_retention_h=sample_retention_h,
            wall=wall,
            worker=worker,
            retention_days=retention_days,
        )
        try:
            await ledger._begin()
        except BaseException:
            await ledger._let_go()
            raise
        return ledger

    # -- the journal and what is true now ----------------------------------------------------------------------------

    async def recover(self) -> Recovered:
        now_wall_s = self._wall()
        return await self._write(lambda c: sql.recover(c, now_wall_s))

    async def open_transition(self, intent: Intent) -> int:
        """An intent whose caller no longer waited when it was written is closed as abandoned: it never started."""
        now_wall_s = self._wall()

        def late(transition: int) -> None:
            outcome = Outcome("abandoned", intent.from_state, "the ledger answered too late: it was never begun")
            with self._database.write() as connection:
                sql.close_transition(connection, transition, outcome, now_wall_s)

        def work(connection: Connection) -> int:
            if not self._database.is_file:
                lives.beat(connection, self._life)  # no transition of a service that was taken over
            return sql.open_transition(connection, self._life, intent, now_wall_s)

        return await self._write(work, late=late)

    async def close_transition(self, transition: int, outcome: Outcome) -> None:
        now_wall_s = self._wall()
        await self._write(lambda c: sql.close_transition(c, transition, outcome, now_wall_s))

    async def put_engine(self, record: EngineRecord) -> None:
        now_wall_s = self._wall()
        await self._write(lambda c: sql.put_engine(c, record, now_wall_s))

    async def put_residencies(self, rows: Sequence[Residency]) -> None:
        now_wall_s = self._wall()
        await self._write(lambda c: sql.put_residencies(c, rows, now_wall_s))

    async def put_lease(self, lease: Lease) -> None:
        now_wall_s = self._wall()
        await self._write(lambda c: sql.put_lease(c, lease, now_wall_s))

    async def drop_lease(self, gpu: GpuId, holder: str) -> None:
        await self._write(lambda c: sql.drop_lease(c, gpu, holder))

    async def put_gpus(self, gpus: Sequence[GpuInfo]) -> None:
        now_wall_s = self._wall()
        await self._write(lambda c: sql.put_gpus(c, gpus, now_wall_s))

    async def put_node(self, node: NodeRecord) -> None:
        now_wall_s = self._wall()
        await self._write(lambda c: sql.put_node(c, node, now_wall_s))

    async def put_cordon(self, gpu: GpuId, cordoned: bool, reason: str) -> None:
        now_wall_s = self._wall()
        await self._write(lambda c: sql.put_cordon(c, gpu, cordoned, reason, now_wall_s))

    async def put_incident(self, incident: Incident) -> None:
        await self._write(lambda c: sql.put_incident(c, incident))

    async def add_reservation(self, made: Reservation) -> int:
        now_wall_s = self._wall()

        def late(id: int) -> None:  # nobody knows its number: it must not come into force after a restart
            with self._database.write() as connection:
                keep.drop_reservation(connection, id)

        return await self._write(lambda c: keep.add_reservation(c, made, now_wall_s), late=late)

    async def drop_reservation(self, id: int) -> bool:
        return await self._write(lambda c: keep.drop_reservation(c, id))

    # -- what the data plane counts ----------------------------------------------------------------------------------

    def count_request(self, model: str, *, waited_s: float, outcome: str) -> None:
        """``outcome`` is "ok", "client_left" (the client left) or anything else, which counts as failed."""
        self._buffers.add_request(self._wall(), model, waited_s, outcome)
        self._notice_batch()

    def sample_vram(self, at_wall_s: float, gpu: GpuId, used_bytes: int, by_holder: Mapping[str, int]) -> None:
        self._buffers.add_sample(at_wall_s, gpu, used_bytes, by_holder)
        self._notice_batch()

    @property
    def dropped(self) -> int:
        """Samples and requests lost because the ledger could not be written for too long."""
        return self._buffers.dropped

    async def flush(self) -> None:
        """Write what was counted so far. Raises LedgerError; what was not written is kept."""
        if self._drain is None or self._drain.done():
            self._drain = asyncio.create_task(self._write_batches(), name="ledger-drain")
        await asyncio.wait({self._drain}, timeout=self._deadline_s)
        if not self._drain.done():
            raise LedgerError(f"ledger: a batch was not written within {self._deadline_s:g} s")
        if (error := self._drain.result()) is not None:
            raise error

    # -- questions ---------------------------------------------------------------------------------------------------

    async def query(
        self, table: str, *, filters: Mapping[str, str], limit: int = 100, cursor: str | None = None
    ) -> Page:
        """Rows newest first. ``filters`` are columns (equal) and ``since``/``until`` (Unix seconds or ISO 8601, the
        latter exclusive); ``limit`` is kept within 1..1000. Raises ValueError that names what exists."""
        asked = question(table, filters, limit, cursor)
        return await self._read(lambda c: answer(c, asked))

    async def totals(self) -> Mapping[str, Mapping[str, float]]:
        """Per model, over all that is kept: requests, failed, client_left, waited_s_sum, waited_s_max. What is in
        memory is included where it can be written."""
        with contextlib.suppress(LedgerError):
            await self.flush()
        return await self._read(sql.totals)

    async def backup(self, path: Path | str, *, deadline_s: float = BACKUP_DEADLINE_S) -> None:
        """Copy a SQLite ledger to ``path`` while it is in use. Raises LedgerError; never leaves half a copy there."""
        await self._aside(lambda: self._database.backup(Path(path)), deadline_s)

    async def integrity_check(self, *, deadline_s: float = BACKUP_DEADLINE_S) -> tuple[str, ...]:
        """What is wrong with a SQLite ledger's file, in words; empty when nothing is."""
        return await self._aside(self._database.integrity, deadline_s)

    # -- health ------------------------------------------------------------------------------------------------------

    @property
    def healthy(self) -> bool:
        return self._is_written and not (self._writer.is_stuck or self._is_lost or self._is_closing)

    async def probe(self) -> bool:
        """Try a write larger than an intent. Never raises."""
        with contextlib.suppress(LedgerError):
            await self._write(lambda c: lives.probe(c, self._life))
        return self.healthy

    async def close(self) -> None:
        """Write what is buffered, end this life, let go. Takes at most a few deadlines, raises nothing."""
        if self._is_closing:
            return
        self._is_closing = True
        if self._flusher is not None:
            self._flusher.cancel()  # it never holds a batch itself: the drain does, and that one is not cancelled
            await asyncio.wait({self._flusher})
        now_wall_s = self._wall()
        with contextlib.suppress(LedgerError):
            await self.flush()
        with contextlib.suppress(LedgerError):
            await self._write(lambda c: lives.end(c, self._life, now_wall_s))
        await self._let_go()

    # -- inside ------------------------------------------------------------------------------------------------------

    async def _begin(self) -> None:
        deadline_s = self._deadline_s * _OPEN_DEADLINES
        open_ = self._explained(self._database.open)
        await self._writer.run(open_, deadline_s=deadline_s, late=lambda _: self._database.close())
        seen = await self._write(lives.holder)
        if seen is not None and not self._database.is_file and not seen.is_surely_dead:
            await self._watch(seen)
        now_wall_s = self._wall()
        self._life = await self._write(lambda c: lives.begin(c, now_wall_s, seen=seen))
        self._flusher = asyncio.create_task(self._flush_forever(), name="ledger-flusher")

    async def _watch(self, seen: lives.Holder) -> None:
        """Refuse if the holder beats. Only for databases without a lock of their own."""
        await asyncio.sleep(lives.WATCH_S)
        if await self._write(lives.holder) != seen:
            raise lives.held_by(seen)

    async def _let_go(self) -> None:
        """Close the database and its threads. A stuck one keeps its lock: only the process's end may free that."""
        with contextlib.suppress(*STORE_ERRORS, LedgerError):
            await self._writer.run(self._database.close, deadline_s=self._deadline_s)
        self._writer.stop()
        self._reader.stop()

    async def _write(
        self, work: Callable[[Connection], T], *, late: Callable[[T], object] | None = None, patient: bool = False
    ) -> T:
        def call() -> T:
            with self._database.write() as connection:
                return work(connection)

        if self._is_lost:
            raise lives.Lost
        try:
            result = await self._writer.run(call, deadline_s=self._deadline_s, late=late, patient=patient)
        except lives.Lost:
            self._is_lost = True
            raise
        except Stuck:
            self._is_written = False
            raise
        except STORE_ERRORS as e:
            self._is_written = self._is_written and sql.is_refused_by_content(e)
            raise self._database.explain(e) from e
        self._is_written = True
        return result

    async def _read(self, work: Callable[[Connection], T]) -> T:
        def call() -> T:
            with self._database.read() as connection:
                return work(connection)

        return await self._reader.run(self._explained(call), deadline_s=self._deadline_s)

    async def _aside(self, call: Callable[[], T], deadline_s: float) -> T:
        """Long work gets a thread of its own: it must not keep questions waiting."""
        worker = Worker("ledger's file")
        try:
            return await worker.run(self._explained(call), deadline_s=deadline_s)
        finally:
            worker.stop()

    def _explained(self, call: Callable[[], T]) -> Callable[[], T]:
        def explained() -> T:
            try:
                return call()
            except STORE_ERRORS as e:
                raise self._database.explain(e) from e

        return explained

    # -- the background ----------------------------------------------------------------------------------------------

    def _notice_batch(self) -> None:
        # While writes fail the timer alone tries again, not every sample that comes.
        if self._is_written and len(self._buffers) >= BATCH_MAX:
            self._batch_is_due.set()

    async def _flush_forever(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FLUSH_EVERY_S):
                    await self._batch_is_due.wait()
            self._batch_is_due.clear()
            was_healthy = self.healthy
            try:
                await self._round(asyncio.get_running_loop().time())
            except LedgerError as e:
                if was_healthy:
                    _log.error("%s", e)

    async def _round(self, now_s: float) -> None:
        if not self.healthy:
            await self.probe()
        await self.flush()
        if not self._database.is_file and now_s >= self._beat_at_s:
            await self._write(lambda c: lives.beat(c, self._life))
            self._beat_at_s = now_s + lives.BEAT_EVERY_S
        if now_s >= self._retain_at_s and await self._retain() < RETENTION_BATCH_MAX:
            self._retain_at_s = now_s + RETENTION_EVERY_S

    async def _retain(self) -> int:
        """Drop what is old: one small batch of each table a round, so that an intent never waits behind a long
        deletion. Returns the most rows that went from any."""
        now_wall_s = self._wall()
        samples, journal = now_wall_s - self._retention_s, now_wall_s - self._journal_retention_s
        dropped = await self._write(lambda c: keep.drop_old_samples(c, samples, RETENTION_BATCH_MAX))
        return max(dropped, await self._write(lambda c: keep.drop_old_journal(c, journal, RETENTION_BATCH_MAX)))

    async def _write_batches(self) -> LedgerError | None:
        """Empty the buffers. Returns what stopped it."""
        while batch := self._buffers.take():
            try:
                await self._write_batch(batch)
            except LedgerError as e:
                return e
        return None

    async def _write_batch(self, batch: Batch) -> None:
        """One transaction. Patient: were it given up and yet written, it would be counted twice."""

        def work(connection: Connection) -> None:
            if batch.samples:
                sql.add_samples(connection, batch.samples)
            sql.add_requests(connection, batch.requests)

        try:
            await self._write(work, patient=True)
        except LedgerError as e:
            if sql.is_refused_by_content(e.__cause__):
                _log.warning("a batch of samples was refused and dropped: %s", e)
                return
            self._buffers.put_back(batch)
            raise
