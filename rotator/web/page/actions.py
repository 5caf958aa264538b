"""What the buttons do: the same requests as over REST, with the viewer's own session, asked first where it hurts."""

from collections.abc import Mapping, Sequence
from typing import Any

from nicegui import background_tasks, ui

from rotator.web.page import parts
from rotator.web.page.model import Model
from rotator.web.page.source import Unanswered, engine_path
from rotator.web.page.text import esc

OPERATE, ADMIN = 2, 3  # ranks of keys, as the service counts them
_DONE = {"wake": "is awake", "sleep": "sleeps", "start": "runs", "stop": "has stopped", "restart": "runs again"}
_STOPS = ("stop", "restart")


class Actions:
    def __init__(self, model: Model, token: str, rank: int) -> None:
        self._model = model
        self._token = token
        self.rank = rank
        self._confirm = _Confirm()

    async def plan(self, model: str | None, sleep: Sequence[str] = ()) -> dict[str, Any]:
        """A dry run. Raises Unanswered."""
        if model is None or (not sleep and self.rank < OPERATE):
            return await self._model.source.plan(self._token, model)
        return await self._dry("/swap", {"wake": model, "sleep": list(sleep)})

    async def turn(self, action: str, engine: str) -> None:
        """Wake, sleep, start, stop or restart: with the plan and a question where somebody loses by it."""
        path = f"/{action}" if action in ("wake", "sleep") else engine_path(engine, action)
        body = {"model": engine} if action in ("wake", "sleep") else {}
        await self._ask_and_do(path, body, f"{action.capitalize()} {engine}?", engine, action, action in _STOPS)

    async def swap(self, wake: str, sleep: Sequence[str]) -> None:
        body = {"wake": wake, "sleep": list(sleep)}
        await self._ask_and_do("/swap", body, f"Swap to {wake}?", wake, "wake", False)

    async def pin(self, engine: str, pinned: bool) -> None:
        await self._do(
            engine_path(engine, "pin" if pinned else "unpin"), {}, f"{engine} is {'' if pinned else 'un'}pinned"
        )

    async def release(self, engine: str) -> None:
        if await self._confirm.ask(f"Release {engine}?", "It is tried again at once. Was its cause mended?", None):
            await self._do(engine_path(engine, "release"), {}, f"{engine} is released")

    async def _ask_and_do(
        self, path: str, body: Mapping[str, Any], question: str, engine: str, action: str, always: bool
    ) -> None:
        try:
            plan = await self._dry(path, body)
            hurt = _interrupted(plan, await self._model.source.look())  # what the page shows may be a second old
        except Unanswered as e:
            _tell(str(e), good=False)
            return
        if always or hurt:
            told = (
                f"Requests in flight: {', '.join(hurt)}. They finish or freeze."
                if hurt
                else "Nothing is in flight there."
            )
            if not await self._confirm.ask(question, told, plan):
                return
        ui.notify(f"{action} of {engine} has begun", type="ongoing", timeout=2000, position="bottom-right")
        background_tasks.create(self._do(path, {**body, "wait": True}, f"{engine} {_DONE[action]}", ui.context.client))

    async def _dry(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        answer = await self._model.source.act(self._token, path, {**body, "dry_run": True})
        return dict(answer["plan"])

    async def _do(self, path: str, body: Mapping[str, Any], done: str, client: Any = None) -> None:
        """Carry it out and tell how it went, on the page that asked, if it is still open."""
        try:
            await self._model.source.act(self._token, path, body)
        except Unanswered as e:
            told, good = str(e), False
        else:
            told, good = done, True
        self._model.hurry()
        with client or ui.context.client:
            _tell(told, good=good)


def _interrupted(plan: Mapping[str, Any], look: Mapping[str, Any]) -> list[str]:
    """Who is served now and would not be."""
    served = {e["name"]: e["in_flight"] for e in look["engines"]}
    names = [step["engine"] for swap in plan["swaps"] for step in swap["evict"]]
    return [f"{name} {served[name]}" for name in names if served.get(name)]


class _Confirm:
    """One dialog of the page, used for every question."""

    def __init__(self) -> None:
        with ui.dialog() as self._dialog, ui.element("div").classes("card ask").props("role=document"):
            self._title = ui.html("", sanitize=False, tag="h2")
            self._text = ui.html("", sanitize=False).classes("ask-text")
            with ui.element("div").classes("ask-acts"):
                ui.button("Cancel", on_click=lambda: self._dialog.submit(False), color=None).props(
                    "flat no-caps autofocus"
                ).classes("act")
                ui.button("Do it", on_click=lambda: self._dialog.submit(True), color=None).props(
                    "unelevated no-caps"
                ).classes("act main")
        self._dialog.props["aria-label"] = "Confirm"

    async def ask(self, title: str, text: str, plan: Mapping[str, Any] | None) -> bool:
        self._title.set_content(esc(title))
        steps = parts.plan(plan, "What would happen") if plan else ""
        self._text.set_content(f"<p>{esc(text)}</p>{steps}")
        return bool(await self._dialog)


def _tell(text: str, *, good: bool) -> None:
    ui.notify(
        text,
        type="positive" if good else "negative",
        position="bottom-right",
        timeout=4000 if good else 0,
        close_button="Close" if not good else False,
        multi_line=True,
    )
