"""One viewer's page: built once, then only what changed is sent. What a key may not do has no button."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nicegui import ui

from rotator.web.page import charts, parts
from rotator.web.page.actions import OPERATE, Actions
from rotator.web.page.engines import EngineRow
from rotator.web.page.live import Live, section
from rotator.web.page.logpanel import LogPanel
from rotator.web.page.model import Model
from rotator.web.page.planpanel import PlanPanel
from rotator.web.page.text import colors, esc, gib
from rotator.web.page.vram import FOREIGN

_CHART_EVERY_S = 2.0
_WINDOWS_S = {300: "5 min", 900: "15 min", 3600: "1 h"}
SECTIONS = ("Engines", "Memory", "Swaps", "Queue", "Plan", "Calendar", "Incidents", "Log")


@dataclass(frozen=True, slots=True)
class Who:
    """The viewer: name and rank of the key, and the session that goes with each action."""

    name: str
    rank: int
    token: str


class View:
    """``model`` must have looked once."""

    def __init__(self, model: Model, who: Who) -> None:
        self._model = model
        self._who = who
        self._actions = Actions(model, who.token, who.rank)
        self._window_s = 900
        self._charts: dict[str, _GpuCard] = {}
        self._rows: dict[str, EngineRow] = {}
        self._drawn_at_s = 0.0
        self._said = ""
        self._build()
        self.update()

    # -- building ----------------------------------------------------------------------------------------------------

    def _build(self) -> None:
        self._header()
        with ui.element("div").props("id=main"):  # the library's own layout is the <main>
            self._tiles = Live("tiles")
            self._announce = Live("sr", "role=status aria-live=polite")
            self._engines()
            self._memory()
            with ui.element("div").classes("two"):
                self._swaps()
                with ui.element("div").classes("stack"):
                    with section("Queue"):
                        self._queue = Live("scroll")
                    with section("Plan"):
                        self._plan = PlanPanel(self._actions)
            with ui.element("div").classes("two"):
                with section("Calendar"):
                    self._calendar = Live("scroll")
                with section("Incidents"):
                    self._incidents = Live("scroll") if self._operates else _lacking("incidents")
            with section("Log"):
                self._log = LogPanel(self._model, self._who.token, self._operates)

    @property
    def _operates(self) -> bool:
        return self._who.rank >= OPERATE

    def _header(self) -> None:
        with ui.element("header").classes("top"):
            ui.html('<a class="skip" href="#main">Skip to the engines</a><h1>rotator</h1>', sanitize=False)
            self._status = Live("status")
            with ui.element("nav").props('aria-label="Sections"'):
                links = "".join(
                    f'<a href="#{name.lower()}" title="key {i}">{name}</a>' for i, name in enumerate(SECTIONS, start=1)
                )
                ui.html(links, sanitize=False).classes("links")
            ui.html(_tools(self._who), sanitize=False).classes("tools")

    def _engines(self) -> None:
        with section("Engines"):
            self._engine_box = ui.element("div").classes("engines").props("role=list")

    def _memory(self) -> None:
        with section("Memory"):
            with ui.element("div").classes("memory-bar"):
                self._legend = Live()
                window = ui.toggle(_WINDOWS_S, value=self._window_s, on_change=self._choose_window)
                window.props('dense unelevated no-caps aria-label="Time shown"')
            self._host = Live("card host")
            self._gpu_box = ui.element("div").classes("gpus")

    def _swaps(self) -> None:
        with section("Swaps"):
            self._swap_list = Live("scroll") if self._operates else _lacking("swaps")

    def _choose_window(self, event: Any) -> None:
        self._window_s = int(event.value)
        self._drawn_at_s = 0.0
        self.update()

    # -- updating ----------------------------------------------------------------------------------------------------

    def update(self) -> None:
        model, look = self._model, self._model.look
        if look is None:
            return
        shades = colors(look["engines"])
        self._status.set(parts.status(look, model.reachable))
        self._tiles.set(parts.tiles(look))
        self._legend.set(parts.legend(look, shades))
        self._host.set(parts.host(look, shades))
        self._queue.set(parts.queue(look))
        self._calendar.set(parts.calendar(look))
        if self._operates:
            self._swap_list.set(parts.swap_list(model.swaps))
            self._incidents.set(parts.incidents(look["incidents"], model.alarms))
        self._update_engines(look, shades)
        self._update_gpus(look, shades)
        self._plan.offer(look["engines"])
        self._log.offer(look["engines"])
        self._say(look)

    def _update_engines(self, look: Mapping[str, Any], shades: Mapping[str, str]) -> None:
        names = [e["name"] for e in look["engines"]]
        if names != list(self._rows):  # the fleet file was changed
            self._engine_box.clear()
            with self._engine_box:
                self._rows = {name: EngineRow(name, self._actions, self._plan, self._log) for name in names}
        for engine in look["engines"]:
            self._rows[engine["name"]].update(engine, shades[engine["name"]], self._model.progress.get(engine["name"]))

    def _update_gpus(self, look: Mapping[str, Any], shades: Mapping[str, str]) -> None:
        ids = [g["id"] for g in look["gpus"]]
        if ids != list(self._charts):
            self._gpu_box.clear()
            with self._gpu_box:
                self._charts = {g["id"]: _GpuCard(g, shades) for g in look["gpus"]}
        now = time.monotonic()
        redraw = now - self._drawn_at_s >= _CHART_EVERY_S
        for gpu in look["gpus"]:
            card = self._charts[gpu["id"]]
            card.update(gpu, shades)
            if redraw:
                holders = [e["name"] for e in look["engines"] if gpu["id"] in e["gpus"]]
                curves = self._model.vram.curves(gpu["id"], [*holders, FOREIGN], self._window_s, look["wall_s"])
                card.draw(gpu, curves, shades, _WINDOWS_S[self._window_s])
        if redraw:
            self._drawn_at_s = now

    def _say(self, look: Mapping[str, Any]) -> None:
        """What changed, for those who listen to the page."""
        said = ", ".join(f"{e['name']} is {e['state'].replace('_', ' ')}" for e in look["engines"])
        if said != self._said:
            before, self._said = set(self._said.split(", ")), said
            self._announce.set(esc(", ".join(s for s in said.split(", ") if s not in before)))


class _GpuCard:
    def __init__(self, gpu: Mapping[str, Any], shades: Mapping[str, str]) -> None:
        self._index = gpu["index"]
        with ui.element("article").classes("card gpu"):
            self._head = Live()
            with ui.element("div").classes("chart").props("role=img") as self._frame:
                self._chart = ui.echart({"series": []}, renderer="svg").classes("plot")
                self._chart.props["aria-hidden"] = "true"
            with ui.element("details"):
                ui.html(f"GPU {self._index} in figures", sanitize=False, tag="summary")
                self._table = Live()
        self.update(gpu, shades)

    def update(self, gpu: Mapping[str, Any], shades: Mapping[str, str]) -> None:
        self._head.set(parts.gpu_head(gpu, shades))

    def draw(self, gpu: Mapping[str, Any], curves: Any, shades: Mapping[str, str], span: str) -> None:
        held = ", ".join(f"{name} {gib(size)} GiB" for name, size in gpu["by_engine"].items() if size)
        label = f"VRAM of GPU {self._index} over the last {span}. Now: {held or 'held by no engine'}"
        if self._frame.props.get("aria-label") != label:
            self._frame.props["aria-label"] = label
            self._frame.update()
        self._chart.options.clear()
        self._chart.options.update(charts.options(gpu, curves, shades))
        self._chart.update()
        self._table.set(parts.gpu_table(gpu, curves.by_holder, span))


def _lacking(what: str) -> Live:
    live = Live()
    live.set(parts.EMPTY.format(f"A key with scope operate sees {what}."))
    return live


def _tools(who: Who) -> str:
    key = f'<span class="dim" title="the key of this session">{esc(who.name)}</span>' if who.name else ""
    out = '<form method="post" action="/logout"><button class="tool">Log out</button></form>' if who.name else ""
    return (
        f"{key}{out}"
        '<button type="button" class="tool" id="theme" aria-label="Colours: as the system">Auto</button>'
        '<button type="button" class="tool" id="help" aria-label="Keyboard shortcuts">?</button>'
    )
