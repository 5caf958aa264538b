"""What Nomad answers, in words for operators. Pure."""

from collections.abc import Iterable, Mapping
from typing import Any

# Job meta that the service writes itself: no drift.
META_ENGINE = "rotator_engine"
META_SERVICE = "rotator_service"
META_LAUNCH = "rotator_launch"
OUR_META = (META_ENGINE, META_SERVICE, META_LAUNCH)

LINES_MAX = 40
_VALUE_CHARS = 120


def diff_lines(diff: Mapping[str, Any]) -> tuple[str, ...]:
    """One line a changed field: where, from what, to what. Leaves out our own meta."""
    lines = list(_object(diff, ""))
    for group in diff.get("TaskGroups") or ():
        if group.get("Type") == "None":
            continue
        if group.get("Type") in ("Added", "Deleted"):
            lines.append(f"group {group['Name']}: {group['Type'].lower()}")
        lines += _object(group, f"{group['Name']}.")
        for task in group.get("Tasks") or ():
            if task.get("Type") in ("Added", "Deleted"):
                lines.append(f"task {task['Name']}: {task['Type'].lower()}")
            if task.get("Type") != "None":
                lines += _object(task, f"{task['Name']}.")
    return tuple(lines[:LINES_MAX])


def _object(node: Mapping[str, Any], place: str) -> Iterable[str]:
    for field in node.get("Fields") or ():
        name = f"{place}{field.get('Name')}"
        if field.get("Type") == "None" or any(name.startswith(f"Meta[{own}") for own in OUR_META):
            continue
        notes = [n for n in field.get("Annotations") or () if n]
        said = f" ({', '.join(notes)})" if notes else ""
        yield f"{name}: {_value(field.get('Old'))} -> {_value(field.get('New'))}{said}"
    for child in node.get("Objects") or ():
        if child.get("Type") != "None":
            yield from _object(child, f"{place}{child.get('Name')}.")


def _value(value: object) -> str:
    text = str(value) if value not in (None, "") else "(none)"
    return text if len(text) <= _VALUE_CHARS else f"{text[:_VALUE_CHARS]}…"


def placement_words(failed: Mapping[str, Any]) -> str:
    """Why a job has no place: FailedTGAllocs of a plan or an evaluation."""
    return "; ".join(f"group '{group}': {_metric(metric)}" for group, metric in sorted(failed.items()))


def _metric(metric: Mapping[str, Any]) -> str:
    evaluated = int(metric.get("NodesEvaluated") or 0)
    if not evaluated and not metric.get("NodesAvailable"):
        return "no node is there for it: check datacenters, node_pool, and whether nodes are ready and not draining"
    parts = [f"{n} of its nodes lack '{what}'" for what, n in sorted((metric.get("ConstraintFiltered") or {}).items())]
    parts += [f"{n} nodes are too full: {what}" for what, n in sorted((metric.get("DimensionExhausted") or {}).items())]
    parts += [f"{n} nodes of class '{c}' are too full" for c, n in sorted((metric.get("ClassExhausted") or {}).items())]
    parts += [f"quota: {quota}" for quota in metric.get("QuotaExhausted") or ()]
    if not parts:
        available = sum((metric.get("NodesAvailable") or {}).values())
        parts = [f"{evaluated} nodes were looked at, {available} available, none fits"]
    return ", ".join(parts)


def end_words(alloc: Mapping[str, Any]) -> str:
    """How an allocation ended: what Nomad says of it, then the last words of tasks that failed."""
    said = alloc.get("ClientDescription") or alloc.get("DesiredDescription") or ""
    head = f"allocation {short_id(alloc)} is {alloc.get('ClientStatus')}" + (f" ({said})" if said else "")
    return "; ".join([head, *_task_words(alloc)])


def _task_words(alloc: Mapping[str, Any]) -> Iterable[str]:
    for name, state in sorted((alloc.get("TaskStates") or {}).items()):
        told = [e for e in state.get("Events") or () if e.get("DisplayMessage") or e.get("Message")]
        if state.get("Failed") or (state.get("State") == "dead" and told and not _is_clean(state)):
            words = [str(e.get("DisplayMessage") or e.get("Message")) for e in told[-3:]]
            yield f"task '{name}': {' | '.join(words) or 'failed'}{_killer(told)}"


def _is_clean(state: Mapping[str, Any]) -> bool:
    return not state.get("Failed") and any(
        e.get("Type") == "Terminated" and not e.get("ExitCode") for e in state["Events"]
    )


def _killer(events: list[Mapping[str, Any]]) -> str:
    oom = any((e.get("Details") or {}).get("oom_killed") == "true" for e in events)
    return " (the kernel killed it: out of its memory limit)" if oom else ""


def short_id(alloc: Mapping[str, Any]) -> str:
    return str(alloc.get("ID", ""))[:8]


def where(alloc: Mapping[str, Any]) -> str:
    return str(alloc.get("NodeName") or str(alloc.get("NodeID", ""))[:8] or "an unknown node")
