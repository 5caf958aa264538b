"""Judgements on jobs and allocations as Nomad tells of them: may the service run it, does an engine live. Pure."""

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from rotator.adapters.nomad_words import META_ENGINE, META_LAUNCH, META_SERVICE, end_words, short_id, where

Json = Mapping[str, Any]

_ENDED = ("complete", "failed")
_PREPARED = ("pending", "")


def var_file(variables: Mapping[str, Any]) -> str:
    """The text of an HCL2 variables file, sorted. JSON's literals are HCL's, but for templates in texts."""
    return "".join(f"{name} = {_literal(variables[name])}\n" for name in sorted(variables))


def _literal(value: Any) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("${", "$${").replace("%{", "%%{")
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(str(k))} = {_literal(v)}" for k, v in sorted(value.items())) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return json.dumps(value)


# -- jobs ------------------------------------------------------------------------------------------------------------


def job_problems(job: Json, *, port: int | None) -> tuple[str, ...]:
    """Why the service must not run this job as an engine, with what to do; empty where it may. Nomad must neither start
    an engine again by itself nor keep a second one: the service decides that, for it knows the GPUs."""
    groups = job.get("TaskGroups") or ()
    found = [] if job.get("Type") == "service" else [f'type is "{job.get("Type")}": set type = "service"']
    if not groups:
        found.append("it has no group")
    for group in groups:
        found += [f"group '{group.get('Name')}': {problem}" for problem in _group_problems(group)]
        if ((group.get("Update") or job.get("Update") or {}).get("AutoRevert")) is True:
            found.append(f"group '{group.get('Name')}': update.auto_revert would start an old version: set it to false")
    ports = sorted(set(_static_ports(groups)))
    if port is not None and ports and port not in ports:
        found.append(
            f"it listens on {', '.join(map(str, ports))}, not on the fleet file's port {port}: make them equal"
        )
    return tuple(found)


def _group_problems(group: Json) -> Iterable[str]:
    if group.get("Count", 1) != 1:
        yield f"count is {group.get('Count')}: set count = 1"
    restart, again = group.get("RestartPolicy") or {}, group.get("ReschedulePolicy") or {}
    if restart.get("Attempts") != 0 or restart.get("Mode") != "fail":
        yield 'Nomad would restart it by itself: set restart { attempts = 0  mode = "fail" }'
    if again.get("Attempts") != 0 or again.get("Unlimited") is not False:
        yield "Nomad would reschedule it by itself: set reschedule { attempts = 0  unlimited = false }"


def _static_ports(groups: Iterable[Json]) -> Iterable[int]:
    for group in groups:
        networks = [*(group.get("Networks") or ())]
        for network in networks:
            yield from (int(port["Value"]) for port in network.get("ReservedPorts") or () if port.get("Value"))


def marked(job: Json, *, engine: str, service: str, launch: str) -> dict[str, Any]:
    """The job with our meta. Another launch is another version of the job: an engine that crashed is placed again."""
    meta = {**(job.get("Meta") or {}), META_ENGINE: engine, META_SERVICE: service, META_LAUNCH: launch}
    return {**job, "Meta": meta}


def marked_like(job: Json, registered: Json) -> dict[str, Any]:
    """The job with the meta that the registered one has of ours: what differs then is drift."""
    theirs = registered.get("Meta") or {}
    meta = {k: v for k, v in (job.get("Meta") or {}).items() if k not in (META_ENGINE, META_SERVICE, META_LAUNCH)}
    return {**job, "Meta": {**meta, **{k: theirs[k] for k in (META_ENGINE, META_SERVICE, META_LAUNCH) if k in theirs}}}


def stranger(job: Json, *, engine: str, service: str) -> str | None:
    """Whose the registered job is, where it is not ours. One without marks was registered by hand: it is ours."""
    meta = job.get("Meta") or {}
    if meta.get(META_SERVICE) not in (None, "", service):
        return (
            f"job '{job.get('ID')}' belongs to another rotation service: stop it, or give this engine's job another id"
        )
    if meta.get(META_ENGINE) not in (None, "", engine):
        return f"job '{job.get('ID')}' is that of engine '{meta[META_ENGINE]}': give each engine's job its own id"
    return None


def engine_tasks(job: Json, task: str = "") -> dict[str, str]:
    """By group, the task that is the engine: ``task``, else the only one without a lifecycle, else the first such."""
    found: dict[str, str] = {}
    for group in job.get("TaskGroups") or ():
        tasks = [t for t in group.get("Tasks") or () if not t.get("Lifecycle")]
        named = [t for t in tasks if t.get("Name") == task] or tasks
        if named:
            found[str(group.get("Name"))] = str(named[0]["Name"])
    return found


# -- allocations -----------------------------------------------------------------------------------------------------


class Life(Enum):
    ALIVE = "alive"
    ENDED = "ended"  # Nomad saw it end
    UNCERTAIN = "uncertain"  # Nomad lost sight of it: it may serve all the same


@dataclass(frozen=True, slots=True)
class Verdict:
    """``words`` say how it ended, or what is worth knowing of it while it lives; empty where all is well."""

    life: Life
    words: str = ""


def is_live(alloc: Json) -> bool:
    """Whether something of it may still run. A lost one may: its node decides when it hears of Nomad again."""
    return alloc.get("ClientStatus") not in (*_ENDED, "lost")


def judge(allocs: Iterable[Json], ids: Collection[str]) -> Verdict:
    """The state of the engine that these allocations are. All of its ranks live, or it does not."""
    mine = {a["ID"]: a for a in allocs if a.get("ID") in ids}
    for alloc in mine.values():
        if alloc.get("ClientStatus") in _ENDED:
            return Verdict(Life.ENDED, end_words(alloc) + _wish(alloc))
    for alloc in mine.values():
        if alloc.get("ClientStatus") == "lost":
            return Verdict(
                Life.UNCERTAIN, f"allocation {short_id(alloc)} is lost: node {where(alloc)} is down for Nomad"
            )
    if missing := [alloc_id for alloc_id in ids if alloc_id not in mine]:
        return Verdict(Life.UNCERTAIN, f"Nomad has forgotten allocation {', '.join(i[:8] for i in missing)}")
    return Verdict(Life.ALIVE, "; ".join(words for alloc in mine.values() if (words := _unrest(alloc))))


def _wish(alloc: Json) -> str:
    """Who wanted it to end, where somebody did."""
    if _is_migrating(alloc):
        return f": node {where(alloc)} is being drained"
    if alloc.get("DesiredStatus") in ("stop", "evict") and alloc.get("ClientDescription"):
        return f" ({alloc.get('DesiredDescription') or 'Nomad was asked to stop it'})"
    return ""


def _unrest(alloc: Json) -> str:
    """What is about to happen to a living allocation."""
    if alloc.get("ClientStatus") == "unknown":
        return f"node {where(alloc)} is disconnected from Nomad: allocation {short_id(alloc)} is believed to run"
    if _is_migrating(alloc):
        return f"node {where(alloc)} is being drained: Nomad will end allocation {short_id(alloc)}"
    if alloc.get("DesiredStatus") in ("stop", "evict"):
        why = alloc.get("DesiredDescription") or "it was asked to"
        return f"Nomad is ending allocation {short_id(alloc)}: {why}"
    return ""


def _is_migrating(alloc: Json) -> bool:
    return bool((alloc.get("DesiredTransition") or {}).get("Migrate"))
