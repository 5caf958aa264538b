"""What would happen: the plan for any model, and with it the swap that it describes."""

from collections.abc import Mapping, Sequence
from typing import Any

from nicegui import ui

from rotator.web.page import parts
from rotator.web.page.actions import OPERATE, Actions
from rotator.web.page.live import Live
from rotator.web.page.source import Unanswered
from rotator.web.page.text import esc


class PlanPanel:
    def __init__(self, actions: Actions) -> None:
        self._actions = actions
        self._offered: tuple[list[str], list[str]] = ([], [])
        operates = actions.rank >= OPERATE
        with ui.element("div").classes("form"):
            self._model = ui.select([], label="Wake", clearable=True, on_change=self._show).classes("pick")
            self._model.props('outlined dense aria-label="Model to plan for"')
            self._sleep = ui.select([], label="And put to sleep", multiple=True, on_change=self._show).classes("pick")
            self._sleep.props('outlined dense aria-label="Models to put to sleep"')
            self._sleep.set_visibility(operates)
            ui.button("Show plan", on_click=self._show, color=None).props("no-caps flat").classes("act")
            if operates:
                ui.button("Swap now", on_click=self._swap, color=None).props("no-caps unelevated").classes("act main")
        self._shown = Live("scroll", "aria-live=polite")
        self._shown.set(parts.EMPTY.format("Choose a model to see who would yield, and why."))

    def offer(self, engines: Sequence[Mapping[str, Any]]) -> None:
        names = [e["name"] for e in engines]
        awake = [e["name"] for e in engines if e["state"] == "awake"]
        if (names, awake) != self._offered:
            self._offered = (names, awake)
            self._model.set_options(names, value=self._model.value if self._model.value in names else None)
            self._sleep.set_options(awake, value=[n for n in self._sleep.value or () if n in awake])

    def choose(self, engine: str) -> None:
        self._model.set_value(engine)
        ui.run_javascript("rotatorGo('plan')")

    async def _show(self) -> None:
        model = self._model.value
        sleep = [n for n in self._sleep.value or () if n != model]
        try:
            plan = await self._actions.plan(model, sleep if model else ())
        except Unanswered as e:
            self._shown.set(f'<p class="why bad">{esc(e)}</p>')
            return
        of = f"If you woke {model}" if model else "As things are"
        self._shown.set(parts.plan(plan, of))

    async def _swap(self) -> None:
        if self._model.value is None:
            ui.notify("Choose the model to wake first", type="warning", position="bottom-right")
            return
        await self._actions.swap(self._model.value, [n for n in self._sleep.value or () if n != self._model.value])
