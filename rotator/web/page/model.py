"""What all viewers see, kept once: looked at again when something happens, and every second while somebody looks."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import Any

from rotator.web.page import swaps
from rotator.web.page.source import Source, Unanswered
from rotator.web.page.vram import KEPT_S, Vram

_log = logging.getLogger(__name__)
EVERY_S = 1.0
COALESCE_S = 0.3  # however much happens, nobody is sent more than this often
ALARMS_MAX = 60
_ENDED_MAX = 200
_JOURNAL_ROWS = "150"
_SAMPLE_PAGES_MAX = 8
_STALE_S = 15.0  # a hole in what was seen that is filled from the ledger
_AGAIN_S = 1.0
# What is told apart from incidents, which the watchdog keeps.
_ALARMS = ("engine.failed", "engine.quarantined", "gpu.unknown", "service.bug", "ledger.", "orphan.left")


class Model:
    def __init__(self, source: Source) -> None:
        self.source = source
        self.look: dict[str, Any] | None = None
        self.reachable = True
        self.swaps: list[swaps.SwapLine] = []
        self.alarms: deque[dict[str, Any]] = deque(maxlen=ALARMS_MAX)
        self.progress: dict[str, dict[str, Any]] = {}  # of engines that wake or start
        self.vram = Vram()
        self._ended: dict[str, dict[str, Any]] = {}
        self._listeners: set[Callable[[], None]] = set()
        self._seen_event = 0
        self._news = asyncio.Event()
        self._watched = asyncio.Event()
        self._journal_due = True

    # -- viewers -----------------------------------------------------------------------------------------------------

    def listen(self, listener: Callable[[], None]) -> None:
        """``listener`` is called after each look until ``forget``; what it raises is its own trouble."""
        self._listeners.add(listener)
        self._watched.set()
        self._news.set()

    def forget(self, listener: Callable[[], None]) -> None:
        self._listeners.discard(listener)
        if not self._listeners:
            self._watched.clear()

    def hurry(self) -> None:
        self._news.set()

    async def first_look(self) -> None:
        """So that a page is never drawn of nothing. Raises Unanswered."""
        if self.look is None:
            await self._look()

    # -- the tasks ---------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        await asyncio.gather(self._follow(), self._watch())

    async def _follow(self) -> None:
        while True:
            try:
                async for event in self.source.events(self._seen_event):
                    self._hear(event)
            except Unanswered as e:
                _log.warning("%s", e)
            await asyncio.sleep(_AGAIN_S)

    def _hear(self, event: dict[str, Any]) -> None:
        self._seen_event = event["id"]
        kind = event["kind"]
        if kind == "swap.ended":
            self._ended[event["data"]["id"]] = event["data"]
            while len(self._ended) > _ENDED_MAX:
                del self._ended[next(iter(self._ended))]
        if kind.startswith(_ALARMS):
            self.alarms.appendleft(event)
        if kind == "engine.progress":
            self.progress[event["engine"]] = event["data"]
        elif kind.startswith(("swap.", "engine.")):
            self.progress.pop(event["engine"], None)
            self._journal_due = True
        self._news.set()

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._watched.wait()
            begun = loop.time()
            self._news.clear()
            try:
                await self._look()
                await self._read_journal()
                await self._fill_gaps()
                self.reachable = True
            except Unanswered as e:
                _log.warning("%s", e)
                self.reachable = False
            except Exception:
                _log.exception("the page's model")
                self.reachable = False
            self._tell()
            try:
                async with asyncio.timeout(EVERY_S):
                    await self._news.wait()
            except TimeoutError:
                continue
            await asyncio.sleep(max(0.0, COALESCE_S - (loop.time() - begun)))

    async def _look(self) -> None:
        self.look = await self.source.look()

    async def _read_journal(self) -> None:
        under_way = any(s.result == "open" for s in self.swaps)
        if self._journal_due or under_way:
            rows, _ = await self.source.rows("transitions", limit=_JOURNAL_ROWS)
            self._journal_due = False
            self.swaps = swaps.from_rows(rows, self._ended)

    async def _fill_gaps(self) -> None:
        """What nobody looked at is in the ledger's samples."""
        if self.look is None:
            return
        now = self.look["wall_s"]
        for gpu in self.look["gpus"]:
            last = self.vram.last_wall_s(gpu["id"])
            if last is None or now - last > _STALE_S:
                self.vram.fill(gpu["id"], await self._samples(gpu["id"], max(last or 0.0, now - KEPT_S)))
            self.vram.see(gpu)

    async def _samples(self, gpu: str, since_wall_s: float) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        cursor: dict[str, str] = {}
        for _ in range(_SAMPLE_PAGES_MAX):
            rows, following = await self.source.rows(
                "vram_samples", gpu=gpu, since=f"{since_wall_s:.3f}", limit="1000", **cursor
            )
            found += rows
            if following is None:
                break
            cursor = {"cursor": following}
        return found[::-1]

    def _tell(self) -> None:
        for listener in tuple(self._listeners):
            try:
                listener()
            except Exception:
                _log.exception("a viewer's page")
                self.forget(listener)
