"""One thread that does blocking work in order, for callers on an event loop who wait no longer than their deadline.

A disk that hangs takes its thread with it: Python cannot interrupt a thread in a system call. So the caller gives up,
the worker is marked stuck until that very call comes back, and everyone who asks meanwhile is refused at once.
"""

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import Callable
from enum import Enum
from typing import Any, Generic, TypeVar

from rotator.ports import LedgerError

PENDING_MAX = 256

T = TypeVar("T")
_log = logging.getLogger("rotator.ledger")


class Stuck(LedgerError):
    """The thread did not answer within the deadline, or is still inside a call that did not."""


class _Phase(Enum):
    PENDING = 0
    RUNNING = 1
    DONE = 2
    DROPPED = 3  # its caller gave up before it began: it never runs


class _Job(Generic[T]):
    """One call. ``late`` is told the result when the caller left before it was there."""

    def __init__(self, call: Callable[[], T], late: Callable[[T], object] | None) -> None:
        self.call = call
        self.late = late
        self.phase = _Phase.PENDING
        self.abandoned = False
        self.value: T
        self.error: BaseException | None = None
        self.loop = asyncio.get_running_loop()
        self.signal = self.loop.create_future()

    def run(self) -> None:
        try:
            self.value = self.call()
        except BaseException as e:  # handed to the caller; the thread must outlive it
            self.error = e

    def tell_late(self) -> None:
        if self.late is None or self.error is not None:
            return
        try:
            self.late(self.value)
        except Exception:
            _log.warning("a late ledger write could not be undone", exc_info=True)

    def wake_caller(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self.loop.call_soon_threadsafe(_settle, self.signal)

    def result(self) -> T:
        if self.error is not None:
            raise self.error
        return self.value


def _settle(signal: asyncio.Future[None]) -> None:
    if not signal.done():
        signal.set_result(None)


class Worker:
    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs: queue.SimpleQueue[_Job[Any] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # guards every job's phase and _overdue; held for a few instructions only
        self._overdue: object | None = None
        self._is_stopped = False
        self._begin_work()

    @property
    def is_stuck(self) -> bool:
        return self._overdue is not None

    async def run(
        self,
        call: Callable[[], T],
        *,
        deadline_s: float,
        late: Callable[[T], object] | None = None,
        patient: bool = False,
    ) -> T:
        """Run ``call`` on the thread and return what it returns.

        Raises Stuck when ``deadline_s`` passes or the thread is stuck already. A call that had not begun by then never
        runs; one that had is finished, and ``late`` gets its result, on the thread. A ``patient`` caller waits on past
        the deadline until the call is really over (others are refused meanwhile): it must know what came of it.
        """
        if self._is_stopped:
            raise LedgerError(f"the {self._name} is closed")
        if self._overdue is not None or self._jobs.qsize() >= PENDING_MAX:
            raise self._stuck(deadline_s)
        job = _Job(call, late)
        self._jobs.put(job)  # the queue holds jobs of every result type
        try:
            await asyncio.wait({job.signal}, timeout=deadline_s)
            if patient and not job.signal.done():
                self._mark_overdue(job)
                await asyncio.wait({job.signal})
        except asyncio.CancelledError:
            self._leave(job)
            raise
        if not job.signal.done() and self._give_up(job):
            raise self._stuck(deadline_s)
        return job.result()

    def stop(self) -> None:
        """Let the thread end after what is queued. Never blocks."""
        self._is_stopped = True
        self._jobs.put(None)

    def _stuck(self, deadline_s: float) -> Stuck:
        return Stuck(f"the {self._name} has not answered within {deadline_s:g} s: check the disk or database it is on")

    def _mark_overdue(self, job: _Job[T]) -> None:
        with self._lock:
            if job.phase is _Phase.RUNNING:
                self._overdue = job

    def _give_up(self, job: _Job[T]) -> bool:
        """Stop waiting for a job that is late. False when its result came just now."""
        with self._lock:
            if job.phase is _Phase.DONE:
                return False
            job.abandoned = True
            if job.phase is _Phase.PENDING:
                job.phase = _Phase.DROPPED
            else:
                self._overdue = job
            return True

    def _leave(self, job: _Job[T]) -> None:
        """The caller was cancelled. What it asked for still happens, and ``late`` is told."""
        with self._lock:
            job.abandoned = True
            is_done = job.phase is _Phase.DONE
        if is_done and job.late is not None:
            self._jobs.put(_Job(job.tell_late, None))

    def _begin_work(self) -> None:
        # A daemon: a hung disk must not keep the process from ending.
        threading.Thread(target=self._work, name=self._name, daemon=True).start()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            if self._begin(job):
                job.run()
                self._end(job)

    def _end(self, job: _Job[Any]) -> None:
        if self._finish(job):
            job.tell_late()
        with self._lock:
            if self._overdue is job:
                self._overdue = None
        job.wake_caller()

    def _begin(self, job: _Job[object]) -> bool:
        with self._lock:
            if job.phase is _Phase.DROPPED:
                return False
            job.phase = _Phase.RUNNING
            return True

    def _finish(self, job: _Job[object]) -> bool:
        """Whether the caller has left, so that the thread has to say it is late."""
        with self._lock:
            job.phase = _Phase.DONE
            return job.abandoned
