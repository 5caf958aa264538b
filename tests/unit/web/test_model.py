"""One model for all viewers: looked at when something happens, and no more often than anybody can see."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from rotator.web.page import model as models
from rotator.web.page.model import Model
from rotator.web.page.source import Unanswered


class FakeSource:
    """A service of no engines; ``happen`` is the stream of events."""

    def __init__(self) -> None:
        self.looks = 0
        self.down = False
        self.happen: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    async def look(self) -> dict[str, Any]:
        if self.down:
            raise Unanswered("no")
        self.looks += 1
        return {"wall_s": 1.0, "gpus": [], "engines": [], "number": self.looks}

    async def rows(self, table: str, **filters: str) -> tuple[list[dict[str, Any]], str | None]:
        return [], None

    async def events(self, after: int) -> AsyncIterator[dict[str, Any]]:
        while True:
            yield await self.happen.get()


def event(number: int, kind: str, **data: Any) -> dict[str, Any]:
    return {"id": number, "kind": kind, "engine": "a", "at_wall_s": 1.0, "data": data}


class Watching:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(models, "EVERY_S", 30.0)
        monkeypatch.setattr(models, "COALESCE_S", 0.05)
        self.source = FakeSource()
        self.model = Model(self.source)  # type: ignore[arg-type] # a source by hand
        self.told: asyncio.Queue[int] = asyncio.Queue()
        self._task = asyncio.create_task(self.model.run())

    def listener(self) -> None:
        self.told.put_nowait(self.source.looks)

    async def next(self) -> int:
        async with asyncio.timeout(5):
            return await self.told.get()

    async def end(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


async def test_a_burst_of_events_is_one_look_and_nobody_watching_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    watching = Watching(monkeypatch)
    for number in range(200):
        watching.source.happen.put_nowait(event(number, "engine.awake"))
    await asyncio.sleep(0)
    assert watching.source.looks == 0
    watching.model.listen(watching.listener)
    assert await watching.next() == 1
    for number in range(200, 400):
        watching.source.happen.put_nowait(event(number, "engine.awake"))
    assert await watching.next() <= 3
    assert watching.source.looks <= 3
    await watching.end()


async def test_a_viewer_whose_page_breaks_is_let_go_and_the_others_see_on(monkeypatch: pytest.MonkeyPatch) -> None:
    watching = Watching(monkeypatch)
    calls = []

    def broken() -> None:
        calls.append(1)
        raise RuntimeError("drawn wrong")

    watching.model.listen(broken)
    watching.model.listen(watching.listener)
    await watching.next()
    watching.source.happen.put_nowait(event(1, "engine.awake"))
    await watching.next()
    assert calls == [1]
    await watching.end()


async def test_while_the_service_does_not_answer_the_page_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    watching = Watching(monkeypatch)
    watching.source.down = True
    watching.model.listen(watching.listener)
    await watching.next()
    assert not watching.model.reachable
    watching.source.down = False
    watching.model.hurry()
    await watching.next()
    assert watching.model.reachable
    await watching.end()


async def test_progress_is_kept_until_the_engine_moves_on(monkeypatch: pytest.MonkeyPatch) -> None:
    watching = Watching(monkeypatch)
    watching.model.listen(watching.listener)
    watching.source.happen.put_nowait(event(1, "engine.progress", done_bytes=5, total_bytes=9))
    await watching.next()
    assert watching.model.progress["a"]["done_bytes"] == 5
    watching.source.happen.put_nowait(event(2, "engine.awake"))
    await watching.next()
    assert "a" not in watching.model.progress
    await watching.end()
