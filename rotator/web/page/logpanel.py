"""The log of one engine, with what is written to it meanwhile: what REST gives, without the secrets in it."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from nicegui import ui

from rotator.web.page import parts
from rotator.web.page.loglines import LINES_MAX, LogLines
from rotator.web.page.model import Model
from rotator.web.page.source import Unanswered
from rotator.web.page.text import esc

_DRAW_EVERY_S = 0.5  # however much an engine writes
_AGAIN_S = 5.0


class LogPanel:
    """A page reads one log at a time, and none while nobody follows it."""

    def __init__(self, model: Model, token: str, allowed: bool) -> None:
        self._source = model.source
        self._token = token
        self._allowed = allowed
        self._names: list[str] = []
        self._lines = LogLines()
        self._news = False
        self._reading: asyncio.Task[None] | None = None
        if not allowed:
            ui.html(parts.EMPTY.format("A key with scope operate sees logs."), sanitize=False)
            return
        with ui.element("div").classes("form"):
            self._engine = ui.select([], label="Engine", on_change=self._open).classes("pick")
            self._engine.props('outlined dense aria-label="Engine whose log is shown"')
            self._follow = ui.checkbox("Follow", value=True, on_change=self._open)
        self._box = ui.html("", sanitize=False, tag="pre").classes("log")
        self._box.props('id=logbox role=log aria-live=off tabindex=0 aria-label="Log lines"')
        ui.timer(_DRAW_EVERY_S, self._draw)
        ui.context.client.on_delete(self.close)

    def offer(self, engines: Sequence[Mapping[str, Any]]) -> None:
        names = [e["name"] for e in engines]
        if self._allowed and names != self._names:
            self._names = names
            awake = next((e["name"] for e in engines if e["state"] == "awake"), names[0])
            self._engine.set_options(names, value=self._engine.value if self._engine.value in names else awake)

    def choose(self, engine: str) -> None:
        self._engine.set_value(engine)
        ui.run_javascript("rotatorGo('log')")

    def close(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def _open(self) -> None:
        self.close()
        if self._engine.value is not None:
            self._reading = asyncio.create_task(self._read(self._engine.value, bool(self._follow.value)))

    async def _read(self, engine: str, follow: bool) -> None:
        while True:
            self._lines.clear()
            try:
                async for lines in self._source.log(self._token, engine, LINES_MAX, follow):
                    self._lines.add(lines)
                    self._news = True
            except Unanswered as e:
                self._lines.add(str(e))
            self._news = True
            if not follow:
                return
            await asyncio.sleep(_AGAIN_S)

    def _draw(self) -> None:
        if self._news:
            self._news = False
            more = f"… for what was before: rotator logs {self._engine.value} -n 10000"
            self._box.set_content(esc(self._lines.text(more)))
