"""The difference of two jobs as a plan tells it."""

from collections.abc import Iterable
from typing import Any

_OWN = ("ID", "Status", "StatusDescription", "Version", "Stable", "CreateIndex", "ModifyIndex", "JobModifyIndex")
_APART = (*_OWN, "SubmitTime", "TaskGroups", "Tasks", "Name", "Update")
_FORCES = ["forces create/destroy update"]  # said of tasks alone, though a job's meta forces it as well
Json = dict[str, Any]


def job_diff(old: Json | None, new: Json) -> Json:
    """Fields as Nomad names them: Meta[key], and a task's Config as an object of its own."""
    fields = list(_fields(old or {}, new, _APART))
    groups = [_group(o, n) for o, n in _pairs(old or {}, new, "TaskGroups")]
    changed = bool(fields) or any(g["Type"] != "None" for g in groups)
    kind = "Added" if old is None else "Edited" if changed else "None"
    return {"Type": kind, "ID": new["ID"], "Fields": fields or None, "Objects": None, "TaskGroups": groups}


def _group(old: Json | None, new: Json | None) -> Json:
    name = (new or old or {})["Name"]
    fields = list(_fields(old or {}, new or {}, _APART))
    tasks = [_task(o, n) for o, n in _pairs(old or {}, new or {}, "Tasks")]
    changed = bool(fields) or any(t["Type"] != "None" for t in tasks)
    kind = _kind(old, new, changed)
    updates = {"Added": "create", "Deleted": "destroy", "Edited": "create/destroy update"}.get(kind, "ignore")
    return {
        "Type": kind, "Name": name, "Fields": fields or None, "Objects": None, "Tasks": tasks, "Updates": {updates: 1},
    }  # fmt: skip


def _task(old: Json | None, new: Json | None) -> Json:
    name = (new or old or {})["Name"]
    fields = list(_fields(old or {}, new or {}, (*_APART, "Config"), _FORCES))
    inner = list(_fields((old or {}).get("Config") or {}, (new or {}).get("Config") or {}, (), _FORCES))
    objects = [{"Type": "Edited", "Name": "Config", "Fields": inner, "Objects": None}] if inner else None
    kind = _kind(old, new, bool(fields or inner))
    return {"Type": kind, "Name": name, "Fields": fields or None, "Objects": objects, "Annotations": None}


def _kind(old: Json | None, new: Json | None, changed: bool) -> str:
    return "Added" if old is None else "Deleted" if new is None else "Edited" if changed else "None"


def _pairs(old: Json, new: Json, key: str) -> Iterable[tuple[Json | None, Json | None]]:
    before = {g["Name"]: g for g in old.get(key) or ()}
    after = {g["Name"]: g for g in new.get(key) or ()}
    return ((before.get(name), after.get(name)) for name in sorted({*before, *after}))


def _fields(old: Json, new: Json, apart: tuple[str, ...], notes: list[str] | None = None) -> Iterable[Json]:
    before, after = _flat(old, apart), _flat(new, apart)
    for name in sorted({*before, *after}):
        a, b = before.get(name, ""), after.get(name, "")
        if a != b:
            kind = "Added" if not a else "Deleted" if not b else "Edited"
            yield {"Type": kind, "Name": name, "Old": a, "New": b, "Annotations": notes}


def _flat(value: Json, apart: tuple[str, ...]) -> dict[str, str]:
    flat: dict[str, str] = {}

    def add(name: str, inner: Any) -> None:
        if isinstance(inner, dict):
            for key, item in inner.items():
                add(f"{name}[{key}]", item)
        elif isinstance(inner, list):
            for i, item in enumerate(inner):
                add(f"{name}[{i}]", item)
        elif inner not in (None, ""):
            flat[name] = str(inner).lower() if isinstance(inner, bool) else str(inner)

    for key, item in value.items():
        if key not in apart:
            add(key, item)
    return flat
