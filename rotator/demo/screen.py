"""The demo's live picture: each GPU's bytes by engine, each engine's state, and what just happened and why."""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

_GIB = 1 << 30
_BAR_CELLS = 48
_COLOURS = ("cyan", "magenta", "yellow", "green", "blue")
_STATE_STYLES = {"awake": "bold green", "asleep": "dim", "failed": "bold red", "quarantined": "bold red"}
_STORY_LINES = 12
_TOLD = {
    "engine.starting": "starts",
    "engine.waking": "wakes",
    "engine.draining": "drains",
    "engine.awake": "is awake",
    "engine.asleep": "sleeps",
    "engine.failed": "failed",
    "engine.quarantined": "is quarantined",
    "engine.stopped": "stopped",
}


class Screen:
    """Live on a terminal; plain lines where the output is a file or a pipe."""

    def __init__(self, console: Console, models: Sequence[str]) -> None:
        self._console = console
        self._colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(models)}
        self._story: deque[Text] = deque(maxlen=_STORY_LINES)
        self._engines: Sequence[Mapping[str, Any]] = ()
        self._gpus: Sequence[Mapping[str, Any]] = ()
        self._requests = (0, 0)
        self._live = Live(console=console, refresh_per_second=8, transient=True) if console.is_terminal else None

    def __enter__(self) -> "Screen":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def say(self, text: str) -> None:
        self._tell(Text(f"▸ {text}", style="bold"))

    def event(self, event: Mapping[str, Any], at_s: float) -> None:
        """Tell one event of the service's stream, if a person wants to know it."""
        verb = _TOLD.get(str(event["kind"]))
        name = event.get("engine")
        if verb is None or name is None:
            return
        line = Text(f"{at_s:6.1f} s  ", style="dim")
        line.append(str(name), style=self._colours.get(str(name), ""))
        line.append(f" {verb}", style="bold")
        line.append(f"  {event['data'].get('reason', '')}", style="dim")
        self._tell(line)

    def state(
        self, engines: Sequence[Mapping[str, Any]], gpus: Sequence[Mapping[str, Any]], answered: int, asked: int
    ) -> None:
        self._engines, self._gpus, self._requests = engines, gpus, (answered, asked)
        if self._live:
            self._live.update(self._picture())

    def _tell(self, line: Text) -> None:
        self._story.append(line)
        if self._live is None:
            self._console.print(line, soft_wrap=True)

    # -- drawing -----------------------------------------------------------------------------------------------------

    def _picture(self) -> RenderableType:
        story = Group(*(_cropped(line) for line in self._story))
        answered, asked = self._requests
        return Group(
            Panel(self._bars(), title="GPU memory", title_align="left"),
            self._states(),
            Panel(story, title=f"{answered} of {asked} requests answered", title_align="left"),
        )

    def _bars(self) -> RenderableType:
        grid = Table.grid(padding=(0, 1))
        for gpu in self._gpus:
            used = (gpu["used_bytes"] or 0) / _GIB
            grid.add_row(f"GPU {gpu['index']}", self._bar(gpu), f"{used:5.1f} / {gpu['total_bytes'] / _GIB:.0f} GiB")
        return grid

    def _bar(self, gpu: Mapping[str, Any]) -> Text:
        bar, cells = Text(), 0
        for name, size in gpu["by_engine"].items():
            width = round(_BAR_CELLS * size / gpu["total_bytes"])
            bar.append("█" * width, style=self._colours.get(name, "white"))
            cells += width
        return bar.append("·" * max(0, _BAR_CELLS - cells), style="dim")

    def _states(self) -> RenderableType:
        table = Table(expand=True)
        for name, wide in (
            ("engine", False),
            ("state", False),
            ("waiting", False),
            ("in flight", False),
            ("why", True),
        ):
            table.add_column(name, no_wrap=True, ratio=1 if wide else None, overflow="ellipsis")
        for engine in self._engines:
            state = str(engine["state"])
            table.add_row(
                Text(engine["name"], style=self._colours.get(engine["name"], "")),
                Text(state, style=_STATE_STYLES.get(state, "bold yellow")),
                str(engine["waiting"]),
                str(engine["in_flight"]) + (" frozen" if engine["frozen"] else ""),
                engine["reason"],
            )
        return table


def _cropped(line: Text) -> Text:
    copy = line.copy()
    copy.no_wrap, copy.overflow = True, "ellipsis"
    return copy
