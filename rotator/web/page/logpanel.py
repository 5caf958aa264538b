"""The log of one engine, with what is written to it meanwhile."""

from collections.abc import Mapping, Sequence
from typing import Any

from nicegui import ui

from rotator.web.page import parts
from rotator.web.page.logs import LogGone, Tail
from rotator.web.page.model import Model
from rotator.web.page.text import esc

LINES_MAX = 400
_EVERY_S = 1.0


class LogPanel:
    def __init__(self, model: Model, allowed: bool) -> None:
        self._model = model
        self._allowed = allowed
        self._names: list[str] = []
        self._tail: Tail | None = None
        self._lines: list[str] = []
        if not allowed:
            ui.html(parts.EMPTY.format("A key with scope operate sees logs."), sanitize=False)
            return
        with ui.element("div").classes("form"):
            self._engine = ui.select([], label="Engine", on_change=self._open).classes("pick")
            self._engine.props('outlined dense aria-label="Engine whose log is shown"')
            self._follow = ui.checkbox("Follow", value=True)
        self._box = ui.html("", sanitize=False, tag="pre").classes("log")
        self._box.props('id=logbox role=log aria-live=off tabindex=0 aria-label="Log lines"')
        ui.timer(_EVERY_S, self._more)

    def offer(self, engines: Sequence[Mapping[str, Any]]) -> None:
        names = [e["name"] for e in engines]
        if self._allowed and names != self._names:
            self._names = names
            awake = next((e["name"] for e in engines if e["state"] == "awake"), names[0])
            self._engine.set_options(names, value=self._engine.value if self._engine.value in names else awake)

    def choose(self, engine: str) -> None:
        self._engine.set_value(engine)
        ui.run_javascript("rotatorGo('log')")

    async def _open(self) -> None:
        look, self._lines, self._tail = self._model.look, [], None
        for engine in look["engines"] if look else ():
            if engine["name"] == self._engine.value:
                self._tail = Tail(engine["log_path"])
        self._box.set_content("")
        await self._more(first=True)

    async def _more(self, first: bool = False) -> None:
        if self._tail is None or not (first or self._follow.value):
            return
        try:
            lines = await self._tail.more()
        except LogGone as e:
            self._box.set_content(esc(e))
            return
        if lines:
            self._lines = [*self._lines, *lines][-LINES_MAX:]
            self._box.set_content(esc("\n".join(self._lines)))
