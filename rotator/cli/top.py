"""``rotator top``: engines, GPUs and queue, live."""

import contextlib
import json
import os
import select
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from rotator.cli import render
from rotator.cli.client import Client
from rotator.cli.options import URL_DEFAULT, AsJson, Key, Url, client

SORTS = ("name", "state", "held", "waiting", "flying", "wakes")
_BAR = 24
_GIB = 1 << 30


def top(
    context: typer.Context,
    every_s: Annotated[float, typer.Option("--every", min=0.1, max=3600, help="seconds between two looks")] = 1.0,
    sort: Annotated[str, typer.Option("--sort", help=f"{', '.join(SORTS[:-1])} or {SORTS[-1]}")] = "name",
    count: Annotated[int | None, typer.Option("--count", min=1, help="end after so many looks")] = None,
    url: Url = URL_DEFAULT,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Engines, GPUs and queue, live. Keys: s sorts by the next column, r turns the order, q ends.

    With --json one object a look; without a terminal one look, or as many as --count says.
    """
    if sort not in SORTS:
        raise typer.BadParameter(f"is one of {', '.join(SORTS)}", param_hint="--sort")
    service = client(context, url, key)
    if as_json:
        for _ in _looks(count, every_s):
            typer.echo(json.dumps(look(service), ensure_ascii=False))
        return
    out = render.console()
    if not out.is_terminal:
        for _ in _looks(count or 1, every_s):
            out.print(frame(look(service), sort, False, out.width))
        return
    _live(service, out, sort, count, every_s)


def look(service: Client) -> dict[str, Any]:
    return {name: service.get(f"/{name}") for name in ("engines", "gpus", "queue")}


def _looks(count: int | None, every_s: float) -> Iterator[int]:
    number = 0
    while count is None or number < count:
        if number:
            time.sleep(every_s)
        yield number
        number += 1


# -- live --------------------------------------------------------------------------------------------------------------


def _live(service: Client, out: Console, sort: str, count: int | None, every_s: float) -> None:
    """A key is answered at once, from what was last seen; a size that changed too, at the next look."""
    reverse, seen, number, due_s = False, look(service), 1, time.monotonic() + every_s
    with (
        _keys() as read,
        Live(frame(seen, sort, reverse, out.width), console=out, screen=True, auto_refresh=False) as live,
    ):
        while count is None or number < count:
            pressed = read(max(0.0, min(every_s, due_s - time.monotonic())))
            if pressed == "q":
                return
            if pressed == "s":
                sort = SORTS[(SORTS.index(sort) + 1) % len(SORTS)]
            reverse = reverse != (pressed == "r")
            if time.monotonic() >= due_s:
                seen, number, due_s = look(service), number + 1, time.monotonic() + every_s
            live.update(frame(seen, sort, reverse, out.width), refresh=True)


@contextmanager
def _keys() -> Iterator[Any]:
    """Gives a function that waits so many seconds for a key and returns it, or an empty text."""
    if not sys.stdin.isatty():
        yield _no_key
        return
    import termios
    import tty

    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)

    def read(seconds: float) -> str:
        ready, _, _ = select.select([descriptor], [], [], seconds)
        return os.read(descriptor, 1).decode(errors="replace").lower() if ready else ""

    try:
        tty.setcbreak(descriptor)
        yield read
    finally:
        with contextlib.suppress(termios.error):
            termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _no_key(seconds: float) -> str:
    time.sleep(seconds)
    return ""


# -- one look ----------------------------------------------------------------------------------------------------------


def frame(seen: Mapping[str, Any], sort: str, reverse: bool, width: int) -> Group:
    """One look as tables. Narrow terminals get fewer columns, never folded ones."""
    queue = seen["queue"]
    head = Text(
        f"{time.strftime('%H:%M:%S')}  {len(queue)} waiting  sorted by {sort}{' (turned)' if reverse else ''}", "bold"
    )
    parts: list[Any] = [head, _gpus(seen["gpus"], width), _engines(ordered(seen["engines"], sort, reverse), width)]
    if queue:
        longest = max(queue, key=lambda q: float(q["waited_s"]))
        parts.append(Text(f"longest wait: {longest['waited_s']:.1f} s, for {longest['engine']}", "yellow"))
    return Group(*parts)


def ordered(engines: Sequence[Mapping[str, Any]], sort: str, reverse: bool) -> list[Mapping[str, Any]]:
    """Names and states from A, numbers from the largest; ``reverse`` turns that."""
    keys: dict[str, Any] = {
        "name": lambda e: e["name"],
        "state": lambda e: (e["state"], e["name"]),
        "held": lambda e: -sum(e["held_bytes"]),
        "waiting": lambda e: -e["waiting"],
        "flying": lambda e: -e["in_flight"],
        "wakes": lambda e: -e["wakes"],
    }
    return sorted(engines, key=keys[sort], reverse=reverse)


def _gpus(views: Sequence[Mapping[str, Any]], width: int) -> Table:
    rows = []
    for g in views:
        used, total = g["used_bytes"], g["total_bytes"]
        share = 0.0 if used is None or not total else min(1.0, used / total)
        holders = ", ".join(f"{n} {b / _GIB:.0f}" for n, b in g["by_engine"].items() if b)
        foreign = f", foreign {g['foreign_bytes'] / _GIB:.0f}" if g["foreign_bytes"] >= _GIB else ""
        bar = Text("█" * round(share * _BAR), "green" if share < 0.95 else "yellow") + Text(
            "░" * (_BAR - round(share * _BAR)), "dim"
        )
        row = [render.gpu_name(g["id"], g["index"]), render.word(g["health"]), bar, render.gib(used), render.gib(total)]
        rows.append([*row, (holders + foreign) or "–"] if width >= 90 else row)
    columns = ("GPU#", "health", "VRAM", "used GiB", "of GiB", "held by, GiB")
    return render.table("", columns[: 6 if width >= 90 else 5], rows)


def _engines(views: Sequence[Mapping[str, Any]], width: int) -> Table:
    columns = ("engine", "state", "held GiB", "wait#", "flying#", "ETA s", "wakes#", "wake s", "canary")
    shown = len(columns) if width >= 90 else 6
    rows = (
        (
            e["name"] + (" (pinned)" if e["pinned"] else ""),
            render.word(e["state"]),
            render.gib(sum(e["held_bytes"])),
            e["waiting"],
            e["in_flight"],
            render.seconds(e["eta_s"]),
            e["wakes"],
            render.seconds(e["wake_s"]),
            e["canary"],
        )[:shown]
        for e in views
    )
    return render.table("", columns[:shown], rows)
