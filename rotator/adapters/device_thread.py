"""One daemon thread that makes one device's driver calls: a call that hangs holds up nobody but later calls to it."""

import asyncio
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from rotator.ports import DeviceTimeout

T = TypeVar("T")
WAITING_MAX = 16


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    work: Callable[[], Any]
    future: "Future[Any]"


class DeviceThread:
    """Calls are made one after another. After one outlasted its deadline, further calls are refused at once (not
    queued behind it) until it returns. The thread is a daemon: not even the service's exit waits for it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._jobs: queue.Queue[_Job] = queue.Queue(WAITING_MAX)
        self._running: _Job | None = None  # written by the thread only
        self._hung: _Job | None = None  # the job that outlasted its caller; hangs for as long as it is the running one
        self._hung_since_s = 0.0
        self._thread: threading.Thread | None = None

    async def call(self, work: Callable[[], T], *, deadline_s: float) -> T:
        """Run ``work`` in the thread and return what it returns or raises. Raises DeviceTimeout at the deadline, and
        at once while an earlier call hangs."""
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        if self._hung is not None and self._hung is self._running:
            raise DeviceTimeout(f"{self.name}: a driver call still hangs, since {began_s - self._hung_since_s:.1f} s")
        job = _Job(work, Future())
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            raise DeviceTimeout(f"{self.name}: {WAITING_MAX} driver calls already wait for it") from None
        self._ensure_thread()
        try:
            async with asyncio.timeout(deadline_s):
                result: T = await asyncio.wrap_future(job.future)
                return result
        except TimeoutError:
            if (running := self._running) is not None and running is not self._hung:
                self._hung, self._hung_since_s = running, began_s
            raise DeviceTimeout(f"{self.name}: the driver did not answer within {deadline_s:g} s") from None

    def _ensure_thread(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=f"device {self.name}", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while True:
            job = self._jobs.get()
            # A job whose caller has given up waiting is dropped, so a backlog does not outlive a hang.
            if not job.future.set_running_or_notify_cancel():
                continue
            self._running = job
            try:
                result = job.work()
            except Exception as e:
                self._running = None
                job.future.set_exception(e)
            else:
                self._running = None
                job.future.set_result(result)
            del job
