"""Figures and words for people, and HTML that holds them safely."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape as _escape
from typing import Any

GIB = 1 << 30
# Told apart on light and dark, and by people who do not see red from green; engines take them in the fleet's order.
PALETTE = (
    "#4c8dff", "#f2994a", "#2bb673", "#b07cff", "#e5576b", "#1fb5c9", "#c9a227", "#d86fb5", "#7d9b3a", "#a9806a",
)  # fmt: skip
FOREIGN_COLOR = "#8892a0"
MOVING = frozenset({"starting", "draining", "falling_asleep", "waking", "stopping"})
_RESIDENCY = {"kv": "device, KV freed", "host": "host RAM", "disk": "disk", "discarded": "discarded"}


def esc(value: Any) -> str:
    return _escape(str(value), quote=True)


def gib(size_bytes: float | None) -> str:
    if size_bytes is None:
        return "?"
    size = size_bytes / GIB
    return f"{size:.0f}" if size >= 100 else f"{size:.1f}"


def seconds(value: float | None) -> str:
    if value is None:
        return "–"
    if value < 0.095:
        return f"{value * 1000:.0f} ms"
    if value < 120:
        return f"{value:.1f} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"


def words(state: str) -> str:
    return state.replace("_", " ")


def since(at_wall_s: float | None) -> str:
    """A time that the browser keeps current, so that nothing is sent for a clock that ticks."""
    return "" if at_wall_s is None else f'<time data-since="{at_wall_s:.1f}"></time>'


def until(at_wall_s: float | None) -> str:
    return "" if at_wall_s is None else f'<time data-until="{at_wall_s:.1f}"></time>'


def clock(at_wall_s: float | None) -> str:
    """In the browser's own zone."""
    return "" if at_wall_s is None else f'<time data-clock="{at_wall_s:.1f}"></time>'


def tone(state: str) -> str:
    """Which of the few colours of state a word belongs to."""
    if state in ("awake", "ok", "ready"):
        return "good"
    if state in ("failed", "quarantined", "unknown", "not ready", "abandoned", "serious"):
        return "bad" if state != "abandoned" else "warn"
    if state in MOVING or state in ("cordoned", "open", "under way", "warning"):
        return "warn"
    return "calm" if state == "asleep" else "off"


def badge(state: str, what: str = "state") -> str:
    """A word with its colour; what it is of is said to those who only hear it."""
    return f'<span class="badge {tone(state)}"><span class="sr">{esc(what)}: </span>{esc(words(state))}</span>'


def residency(engine: Mapping[str, Any]) -> str:
    """Where its weights are now."""
    state = engine["state"]
    if state in ("awake", "draining"):
        return "device"
    if state in MOVING:
        return "moving"
    return _RESIDENCY.get(engine["depth"] or "", "host RAM") if state == "asleep" else "none"


def colors(engines: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    return {e["name"]: PALETTE[i % len(PALETTE)] for i, e in enumerate(engines)}


def swatch(color: str) -> str:
    return f'<i class="swatch" style="background:{color}"></i>'


def bar(parts: Iterable[tuple[str, float]], total: float) -> str:
    """A stacked bar of (colour, size); for the eye only, its figures stand beside it."""
    if total <= 0:
        return ""
    cells = "".join(
        f'<i style="width:{min(100.0, 100 * size / total):.2f}%;background:{color}"></i>'
        for color, size in parts
        if size
    )
    return f'<span class="bar" aria-hidden="true">{cells}</span>'


def table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """``rows`` are HTML already. Columns that end in '#' are set right."""
    heads = "".join(f'<th scope="col"{_side(c)}>{esc(c.rstrip("#"))}</th>' for c in columns)
    body = "".join(
        "<tr>"
        + "".join(
            f'<td data-label="{esc(c.rstrip("#"))}"{_side(c)}>{cell}</td>' for c, cell in zip(columns, row, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    title = f'<caption class="sr">{esc(caption)}</caption>'
    return f"<table>{title}<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"


def _side(column: str) -> str:
    return ' class="num"' if column.endswith("#") else ""
