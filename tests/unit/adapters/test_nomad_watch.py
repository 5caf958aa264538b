"""When a job is looked at again: events are hints, and nothing is missed where they break. Under a virtual clock."""

import asyncio
from collections.abc import AsyncGenerator, Iterable
from typing import Any

from rotator.adapters.nomad_access import NomadAccess
from rotator.adapters.nomad_notes import Notes
from rotator.adapters.nomad_stream import Told
from rotator.adapters.nomad_watch import BACKOFF_MAX_S, NomadWatch
from rotator.ports import LauncherAway, LauncherNews, LaunchError
from rotator.sim.clock import run


class FakeStream:
    """Connections that a test feeds. ``refuses`` makes each break at once."""

    def __init__(self) -> None:
        self.connections: list[tuple[frozenset[str], int]] = []
        self.refuses = False
        self._lines: asyncio.Queue[Told | Exception] = asyncio.Queue()

    async def follow(self, _: NomadAccess, jobs: Iterable[str], index: int) -> AsyncGenerator[Told, None]:
        self.connections.append((frozenset(jobs), index))
        if self.refuses:
            raise LauncherAway("Nomad's event stream broke: refused")
        yield Told(index, frozenset())
        while True:
            line = await self._lines.get()
            if isinstance(line, Exception):
                raise line
            yield line

    def tell(self, index: int, *jobs: str) -> None:
        self._lines.put_nowait(Told(index, frozenset(jobs)))

    def cut(self) -> None:
        self.fail(LauncherAway("Nomad's event stream ended"))

    def fail(self, error: Exception) -> None:
        self._lines.put_nowait(error)


def make_watch(stream: FakeStream) -> tuple[NomadWatch, list[LaunchError | None]]:
    said: list[LaunchError | None] = []
    return NomadWatch(NomadAccess(), said.append, stream=stream.follow), said


def test_a_new_connection_asks_for_a_look_before_any_event() -> None:
    async def story() -> None:
        stream = FakeStream()
        watch, said = make_watch(stream)
        with watch.following("a") as follower:
            assert await follower.changed(within_s=1)
            assert not await follower.changed(within_s=100), "heartbeats and silence are no news"
            stream.tell(7, "a")
            assert await follower.changed(within_s=1)
        assert said == [None]
        await watch.close()

    run(story())


def test_only_the_job_that_something_happened_to_is_looked_at() -> None:
    async def story() -> None:
        stream = FakeStream()
        watch, _ = make_watch(stream)
        with watch.following("a") as a, watch.following("b") as b:
            assert await a.changed(within_s=1)
            assert await b.changed(within_s=1)
            stream.tell(7, "b")
            assert await b.changed(within_s=1)
            assert not await a.changed(within_s=1)
        await watch.close()

    run(story())


def test_a_break_is_looked_behind_at_once_and_again_when_it_is_mended() -> None:
    async def story() -> None:
        stream = FakeStream()
        watch, said = make_watch(stream)
        with watch.following("a") as follower:
            assert await follower.changed(within_s=1)
            stream.tell(41, "a")
            assert await follower.changed(within_s=1)
            stream.cut()
            assert await follower.changed(within_s=0.2)
            assert await follower.changed(within_s=2)
            assert stream.connections == [(frozenset("a"), 0), (frozenset("a"), 41)]
        assert [str(e) for e in said] == ["None", "Nomad's event stream ended", "None"]
        await watch.close()

    run(story())


def test_a_nomad_that_refuses_is_asked_ever_more_rarely_within_a_bound() -> None:
    async def story() -> None:
        stream = FakeStream()
        stream.refuses = True
        watch, _ = make_watch(stream)
        with watch.following("a"):
            await asyncio.sleep(60)
            early = len(stream.connections)
            await asyncio.sleep(10 * BACKOFF_MAX_S)
            assert 6 <= early <= 10
            assert len(stream.connections) - early == 10
        await watch.close()

    run(story())


def test_once_nomad_answers_the_pause_is_over() -> None:
    async def story() -> None:
        stream = FakeStream()
        stream.refuses = True
        watch, said = make_watch(stream)
        with watch.following("a"):
            await asyncio.sleep(60)
            stream.refuses = False
            watch.hurry()
            await asyncio.sleep(0.1)
            assert said[-1] is None
        await watch.close()

    run(story())


def test_nobody_following_means_no_connection() -> None:
    async def story() -> None:
        stream = FakeStream()
        watch, _ = make_watch(stream)
        with watch.following("a"):
            await asyncio.sleep(1)
        await asyncio.sleep(100)
        assert len(stream.connections) == 1
        await watch.close()

    run(story())


# -- notes -----------------------------------------------------------------------------------------------------------


def test_whatever_breaks_a_stream_another_is_opened() -> None:
    async def story() -> None:
        stream = FakeStream()
        watch, said = make_watch(stream)
        with watch.following("a") as follower:
            assert await follower.changed(within_s=1)
            stream.fail(RuntimeError("as nobody expected"))
            assert await follower.changed(within_s=1)
            await asyncio.sleep(BACKOFF_MAX_S)
            assert len(stream.connections) == 2
            assert "as nobody expected" in str(said[1])
        await watch.close()

    run(story())


def told(*words: Any) -> tuple[Notes, list[LauncherNews]]:
    news: list[LauncherNews] = []
    return Notes(news.append), news


def test_an_outage_is_told_once_and_taken_back_once() -> None:
    notes, news = told()
    for _ in range(5):
        notes.heard(LauncherAway("nobody listens there"))
    for _ in range(5):
        notes.heard(None)
    assert [(n.kind, n.over) for n in news] == [("nomad.unreachable", False), ("nomad.unreachable_over", True)]
    assert "Engines that serve go on; none can be started or stopped" in news[0].text


def test_another_kind_of_outage_is_news() -> None:
    notes, news = told()
    notes.heard(LauncherAway("nobody listens there"))
    notes.heard(LauncherAway("no leader", "leader"))
    assert [n.kind for n in news] == ["nomad.unreachable", "nomad.leader"]


def test_what_was_said_of_an_engine_is_over_with_its_allocation() -> None:
    notes, news = told()
    with notes.about("a"):
        notes.tell("a", "node", "nomad.allocation", "its node is drained")
        notes.tell("b", "node", "nomad.allocation", "its node is drained")
    assert [(n.engine, n.over) for n in news] == [("a", False), ("b", False), ("a", True)]
