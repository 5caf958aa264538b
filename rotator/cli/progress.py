"""A bar for each engine on its way in, drawn from the service's events while a command waits for its answer."""

import contextlib
import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from rotator.cli.client import Client
from rotator.cli.errors import CliError

T = TypeVar("T")
_ENDED = ("engine.awake", "engine.failed", "engine.quarantined", "engine.stopped")


class _Eta(ProgressColumn):
    """What the service expects, not what a bar's pace would give."""

    def render(self, task: Task) -> Text:
        eta_s = task.fields.get("eta_s")
        return Text("ready soon" if eta_s is None else f"ready in {eta_s:.0f} s", style="progress.remaining")


class Bars:
    """Turns events into bars. Not for use by two threads at once."""

    def __init__(self, console: Console) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeElapsedColumn(),
            _Eta(),
            console=console,
            transient=True,
        )
        self._tasks: dict[str, Any] = {}

    def see(self, event: Mapping[str, Any]) -> None:
        kind, engine, data = event.get("kind"), event.get("engine"), event.get("data") or {}
        if not isinstance(engine, str):
            return
        if kind == "engine.progress":
            task = self._task(engine, data.get("action", "wake"))
            total = data.get("total_bytes") or None
            self.progress.update(task, total=total, completed=data.get("done_bytes", 0), eta_s=data.get("eta_s"))
        elif kind in ("engine.waking", "engine.starting"):
            self._task(engine, "wake" if kind == "engine.waking" else "start")
        elif kind in ("engine.draining", "engine.falling_asleep"):
            self.progress.console.print(Text(f"{engine}: {str(kind).partition('.')[2].replace('_', ' ')}", "dim"))
        elif kind in _ENDED and engine in self._tasks:
            task = self._tasks.pop(engine)
            self.progress.remove_task(task)

    def _task(self, engine: str, action: str) -> Any:
        if engine not in self._tasks:
            self._tasks[engine] = self.progress.add_task(f"{action} {engine}", total=None, eta_s=None)
        return self._tasks[engine]


def shown(service: Client, console: Console, ask: Callable[[], T]) -> T:
    """What ``ask`` returns or raises, with bars on ``console`` meanwhile. Without a terminal there are none."""
    if not console.is_terminal:
        return ask()
    bars = Bars(console)
    follower = threading.Thread(target=_follow, args=(service, bars), name="events", daemon=True)
    with bars.progress:
        follower.start()
        return ask()


def _follow(service: Client, bars: Bars) -> None:
    """Events are an extra: a key without their scope, or a stream that breaks, costs the bars and nothing else."""
    with contextlib.suppress(CliError, ValueError, KeyError):
        for event in service.events(kind=["engine"]):
            bars.see(event)
