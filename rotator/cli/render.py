"""What the service says, as tables for people. ``--json`` goes around all of this."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, Literal

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

_STYLES = {
    "awake": "green",
    "asleep": "blue",
    "ok": "green",
    "failed": "red",
    "quarantined": "bold red",
    "unknown": "red",
    "cordoned": "yellow",
    "stopped": "dim",
}
_GIB = 1 << 30


def console(*, stderr: bool = False) -> Console:
    """No markup: an engine's name or a reason in square brackets is text."""
    return Console(markup=False, highlight=False, stderr=stderr, soft_wrap=False)


def gib(size_bytes: int | None) -> str:
    return "?" if size_bytes is None else f"{size_bytes / _GIB:.1f}"


def seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], whole: Collection[str] = ()) -> Table:
    """Columns whose name ends in a unit or a count are set right; those of ``whole`` are never broken, to be copied."""
    made = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        justify: Literal["right", "left"] = "right" if column.endswith(("GiB", " s", "#")) else "left"
        made.add_column(column, justify=justify, overflow="fold", no_wrap=column in whole)
    for row in rows:
        made.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
    return made


def word(state: str) -> Text:
    return Text(state, style=_STYLES.get(state, "yellow"))


def engines(views: Sequence[Mapping[str, Any]]) -> Group:
    """The figures as a table, the reasons below it: beside it they would leave no room for each other."""
    made = table(
        "engines",
        ("engine", "state", "GPUs", "held GiB", "of GiB", "wait#", "flying#", "ETA s", "canary"),
        (
            (
                e["name"] + (" (pinned)" if e["pinned"] else " (held)" if e["held_by"] else ""),
                word(e["state"]),
                ",".join(map(gpu_name, e["gpus"], e["gpu_indices"])),
                gib(sum(e["held_bytes"])),
                gib(sum(e["awake_bytes"])),
                e["waiting"],
                f"{e['in_flight']} ({e['frozen']} frozen)" if e["frozen"] else e["in_flight"],
                seconds(e["eta_s"]),
                e["canary"],
            )
            for e in views
        ),
    )
    return Group(made, *(Text(f"  {e['name']}: {_words(e)}", style="dim") for e in views))


def _words(engine: Mapping[str, Any]) -> str:
    """Why it is as it is, then what its launcher has to say of it."""
    return "; ".join([engine["reason"], *engine.get("notes", ())])


def gpu_name(id: str, index: int) -> str:
    """A GPU as it may be named in a command: its index, after its node's name where it is on another machine."""
    node = id.rpartition("/")[0]
    return f"{node}/{index}" if node else str(index)


def gpus(views: Sequence[Mapping[str, Any]]) -> Group:
    made = table(
        "GPUs",
        ("GPU#", "health", "used GiB", "of GiB", "ledger GiB", "foreign GiB", "moving"),
        (
            (
                gpu_name(g["id"], g["index"]),
                word(g["health"]),
                gib(g["used_bytes"]),
                gib(g["total_bytes"]),
                gib(g["ledger_bytes"]),
                gib(g["foreign_bytes"]),
                g["claimed_by"] or g["reason"],
            )
            for g in views
        ),
    )
    lines = (f"  GPU {gpu_name(g['id'], g['index'])}, {g['name']}: {_holders(g)}" for g in views)
    return Group(made, *(Text(line, style="dim") for line in lines))


def _holders(gpu: Mapping[str, Any]) -> str:
    held = ", ".join(f"{name} {gib(size)} GiB" for name, size in gpu["by_engine"].items() if size)
    return held or "held by no engine"


def queue(entries: Iterable[Mapping[str, Any]]) -> Table:
    return table(
        "waiting requests",
        ("request", "model", "engine", "waited s", "deadline in s", "ETA s"),
        (
            (q["id"], q["model"], q["engine"], seconds(q["waited_s"]), seconds(q["deadline_in_s"]), seconds(q["eta_s"]))
            for q in entries
        ),
    )


def calendar(view: Mapping[str, Any]) -> Group | None:
    """None where it is empty."""
    entries = sorted([*view["windows"], *view["reservations"]], key=lambda e: float(e["begins_wall_s"]))
    parts: list[Any] = []
    if entries:
        parts.append(
            table("calendar", ("what", "engines", "from", "until", "priority#", "state"), map(_entry, entries))
        )
    if view["default_engines"]:
        after = view["default_after_s"]
        when = "after a window" if after is None else f"after a window, or {after:.0f} s without use of the others"
        parts.append(Text(f"  returns to {', '.join(view['default_engines'])} {when}", style="dim"))
    return Group(*parts) if parts else None


def _entry(e: Mapping[str, Any]) -> tuple[Any, ...]:
    what = f"window {e['name']}" if e["id"] is None else f"reservation {e['id']}"
    state = Text("in force", style="green") if e["in_force"] else Text("to come", style="dim")
    if e["in_force"] and e["waived"]:
        state = Text(f"in force without {', '.join(e['waived'])}", style="yellow")
    what += f" ({e['note']})" if e["note"] else ""
    return what, ", ".join(e["engines"]), e["begins"], e["ends"], e["priority"], state


# What a line has room for; --json has all.
_SHOWN = {"transitions": ("id", "opened_at_wall_s", "engine", "action", "result", "duration_s", "reason", "error")}


def rows(name: str, found: Sequence[Mapping[str, Any]]) -> Table:
    columns = [c for c in _SHOWN.get(name, found[0]) if c in found[0]] if found else []
    return table(name, columns, ([_cell(c, row.get(c)) for c in columns] for row in found))


def _cell(column: str, value: Any) -> str:
    if column.endswith("_wall_s") and isinstance(value, int | float):
        return datetime.fromtimestamp(value).strftime("%m-%d %H:%M:%S")
    if column.endswith("_s") and isinstance(value, float):
        return f"{value:.2f}"
    return "" if value is None else str(value)


def plan(view: Mapping[str, Any]) -> str:
    return "\n".join(view["summary"])


_LEFT_OUT = ("timeline",)  # of events, for people: phases_s has its sums


def event(view: Mapping[str, Any]) -> str:
    at = datetime.fromtimestamp(view["at_wall_s"]).strftime("%H:%M:%S.%f")[:-3]
    data = " ".join(_datum(k, v) for k, v in view["data"].items() if v is not None and k not in _LEFT_OUT)
    return " ".join(part for part in (at, view["kind"], view["engine"] or "", data) if part)


def _datum(name: str, value: Any) -> str:
    """One word of an event for people: what is nested in few words, as --json has all of it."""
    if name == "plan" and isinstance(value, Mapping):
        steps = [*value.get("evict", ()), *filter(None, [value.get("admit")])]
        done = ", then ".join(f"{step['action']} {step['engine']}" for step in steps)
        return f"plan='{done}: {value.get('reason', '')}'"
    if isinstance(value, Mapping):
        return f"{name}=({', '.join(f'{k} {v}' for k, v in value.items())})"
    return f"{name}={value}"


def result(answer: Mapping[str, Any]) -> str:
    """A command's outcome, one line an engine; the plan where it was a dry run."""
    if answer["dry_run"]:
        return "dry run, nothing was done:\n" + plan(answer["plan"])
    return "\n".join(_result_line(r) for r in answer["results"])


def _result_line(r: Mapping[str, Any]) -> str:
    if not r["done"]:
        return f"{r['engine']}: {r['action']} begun, it is {r['state']}; follow it with `rotator events`"
    phases = ", ".join(f"{name} {took:.2f}" for name, took in r["phases_s"].items())
    done = f"{r['engine']}: {r['action']} done in {r['seconds']:.2f} s, it is {r['state']}"
    return f"{done} ({phases})" if phases else done
