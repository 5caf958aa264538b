"""One engine's row: what it is and does, and the buttons that its state and the viewer's key allow."""

from collections.abc import Mapping
from typing import Any, Protocol

from nicegui import ui

from rotator.web.page import parts
from rotator.web.page.actions import ADMIN, OPERATE, Actions
from rotator.web.page.live import Live
from rotator.web.page.text import MOVING

_LIVE = frozenset({"awake", "asleep"})
_WAKES = frozenset({"asleep", "stopped", "failed"})


class Chooser(Protocol):
    """A panel that shows something of one engine."""

    def choose(self, engine: str) -> None: ...


class EngineRow:
    def __init__(self, name: str, actions: Actions, plan: Chooser, log: Chooser) -> None:
        self._name = name
        self._actions = actions
        self._plan = plan
        self._log = log
        with ui.element("div").classes("engine card").props("role=listitem"):
            self._cells = [Live("cell") for _ in range(4)]
            self._buttons: dict[str, ui.button | ui.menu_item] = {}
            if actions.rank >= OPERATE:
                self._build_buttons()

    def _build_buttons(self) -> None:
        with ui.element("div").classes("acts"):
            self._button("wake", "Wake", lambda: self._actions.turn("wake", self._name), "main")
            self._button("sleep", "Sleep", lambda: self._actions.turn("sleep", self._name))
            if self._actions.rank >= ADMIN:
                self._button("release", "Release", lambda: self._actions.release(self._name), "main")
            with ui.button("More", color=None).props("flat dense no-caps aria-haspopup=menu").classes("act") as more:
                more.props["aria-label"] = f"More for {self._name}"
                with ui.menu().props("role=menu auto-close"):
                    self._item("pin", "Pin", lambda: self._actions.pin(self._name, True))
                    self._item("unpin", "Unpin", lambda: self._actions.pin(self._name, False))
                    self._item("start", "Start", lambda: self._actions.turn("start", self._name))
                    self._item("restart", "Restart", lambda: self._actions.turn("restart", self._name))
                    self._item("stop", "Stop", lambda: self._actions.turn("stop", self._name))
                    self._item("plan", "Show plan", lambda: self._plan.choose(self._name))
                    self._item("log", "Show log", lambda: self._log.choose(self._name))

    def _button(self, key: str, text: str, act: Any, classes: str = "") -> None:
        button = ui.button(text, on_click=act, color=None).props("dense no-caps unelevated").classes(f"act {classes}")
        button.props["aria-label"] = f"{text} {self._name}"
        self._buttons[key] = button

    def _item(self, key: str, text: str, act: Any) -> None:
        self._buttons[key] = ui.menu_item(text, on_click=act).props("role=menuitem")

    def update(self, engine: Mapping[str, Any], color: str, progress: Mapping[str, Any] | None) -> None:
        drawn = (
            parts.engine_name(engine, color),
            parts.engine_state(engine, progress),
            parts.engine_memory(engine),
            parts.engine_work(engine),
        )
        for cell, content in zip(self._cells, drawn, strict=True):
            cell.set(content)
        for key, shown in _shown(engine, self._actions.rank).items():
            if (button := self._buttons.get(key)) is not None and button.visible != shown:
                button.set_visibility(shown)


def _shown(engine: Mapping[str, Any], rank: int) -> dict[str, bool]:
    """A failed engine comes back after its backoff: who may release it has it come at once."""
    state, ours = engine["state"], engine["launcher"] != "attach"
    live = state in _LIVE or state in MOVING
    return {
        "wake": state in _WAKES and not (state == "failed" and rank >= ADMIN),
        "sleep": state == "awake",
        "release": state in ("quarantined", "failed"),
        "pin": not engine["pinned"],
        "unpin": bool(engine["pinned"]),
        "start": state in ("stopped", "failed"),
        "restart": ours and state in _LIVE,
        "stop": ours and live,
    }
