"""Tells those who follow a job when to look at it again. Events are hints, lists are the truth: Nomad keeps only its
last 100 events, so after every connection, break and pause each job is looked at anew."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator

from rotator.adapters.nomad_access import NomadAccess
from rotator.adapters.nomad_stream import Told, follow
from rotator.ports import LaunchError

_log = logging.getLogger(__name__)
BACKOFF_FIRST_S = 0.5
BACKOFF_MAX_S = 15.0
SETTLE_S = 0.05  # one deed makes several events: they cost one look

Stream = Callable[[NomadAccess, Iterable[str], int], AsyncGenerator[Told, None]]


class Follower:
    """One who waits for news of a job."""

    def __init__(self) -> None:
        self._news = asyncio.Event()

    def poke(self) -> None:
        self._news.set()

    async def changed(self, *, within_s: float) -> bool:
        """Return when something may have happened to the job; False where ``within_s`` passed first."""
        try:
            async with asyncio.timeout(within_s):
                await self._news.wait()
                await asyncio.sleep(SETTLE_S)
        except TimeoutError:
            return False
        finally:
            self._news.clear()
        return True


class NomadWatch:
    """``broken`` is told why events do not come, None once they do."""

    def __init__(
        self, access: NomadAccess, broken: Callable[[LaunchError | None], None], *, stream: Stream = follow
    ) -> None:
        self._access = access
        self._broken = broken
        self._stream = stream
        self._followers: dict[str, set[Follower]] = {}
        self._task: asyncio.Task[None] | None = None
        self._index = 0
        self._hurry = asyncio.Event()

    def hurry(self) -> None:
        """Nomad answers again: connect now, not after the pause."""
        self._hurry.set()

    @contextlib.contextmanager
    def following(self, job_id: str) -> Iterator[Follower]:
        follower = Follower()
        self._followers.setdefault(job_id, set()).add(follower)
        if len(self._followers[job_id]) == 1:
            self._reconnect()
        try:
            yield follower
        finally:
            self._followers[job_id].discard(follower)
            if not self._followers[job_id]:
                del self._followers[job_id]
                self._reconnect()

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    def _reconnect(self) -> None:
        """The stream is filtered by job: another set of jobs needs another connection."""
        if self._task is not None:
            self._task.cancel()
            self._task = None
        if self._followers and not asyncio.get_running_loop().is_closed():
            self._task = asyncio.create_task(self._run(frozenset(self._followers)))

    async def _run(self, jobs: frozenset[str]) -> None:
        pause_s = BACKOFF_FIRST_S
        while True:
            try:
                async with contextlib.aclosing(self._stream(self._access, jobs, self._index)) as lines:
                    first = True
                    async for told in lines:
                        self._tell(jobs if first else told.jobs)
                        self._index = max(self._index, told.index)
                        if first:
                            self._broken(None)
                        first, pause_s = False, BACKOFF_FIRST_S
            except LaunchError as e:
                self._broken(e)
            except Exception as e:  # without a stream engines' ends are seen late: another is opened, whatever it was
                _log.exception("Nomad's event stream")
                self._broken(LaunchError(f"Nomad's event stream broke: {e!r}"))
            self._tell(jobs)
            self._hurry.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._hurry.wait()
            pause_s = min(2 * pause_s, BACKOFF_MAX_S)

    def _tell(self, jobs: Iterable[str]) -> None:
        for job in jobs:
            for follower in self._followers.get(job, ()):
                follower.poke()
