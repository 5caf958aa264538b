"""Jobs that others wrote, as views: Nomad's JSON, or HCL as far as it can be read without evaluating it."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rotator.jobs.findings import JobsError
from rotator.jobs.view import View

_NS = 1e9
_UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_EXPRESSION = re.compile(r"^(var|local|each|dynamic)\.|^\[\s*for |^\{\s*for |^[a-z_]+\(.*\)$", re.DOTALL)
_ENGINE_WORDS = ("--served-model-name", "--enable-sleep-mode", "--tensor-parallel-size", "--gpu-memory-utilization")


def views_of(job: Mapping[str, Any], *, file: str) -> tuple[View, ...]:
    """One view for each vLLM task of a job as Nomad's parser gives it (also wrapped in ``{"Job": …}``)."""
    inner = job.get("Job", job)
    if not isinstance(inner, Mapping) or "TaskGroups" not in inner:
        raise JobsError(f"{file}: is no Nomad job: it has no TaskGroups")
    found: list[View] = []
    for group in inner.get("TaskGroups") or ():
        tasks = group.get("Tasks") or ()
        found += [_view(inner, group, task, file) for task in tasks if _is_engine(task)]
    return tuple(found)


def job_of_json(text: str, *, file: str) -> Mapping[str, Any]:
    """Raises JobsError where it is no JSON object."""
    try:
        job = json.loads(text)
    except ValueError as e:
        raise JobsError(f"{file}: is not valid JSON ({e}): fix it, or end its name in .hcl") from None
    if not isinstance(job, Mapping):
        raise JobsError(f"{file}: is no JSON object: give a job")
    return job


def _is_engine(task: Mapping[str, Any]) -> bool:
    if (task.get("Lifecycle") or {}).get("Hook"):
        return False
    config = task.get("Config") or {}
    words = _words(config)
    if any(w == "vllm" or w.endswith("/vllm") or w.startswith("vllm.entrypoints") for w in words):
        return True
    text = " ".join(words)
    named = f"{config.get('image', '')} {task.get('Name', '')}".lower()
    return any(w in text for w in (*_ENGINE_WORDS, "vllm serve")) or "vllm" in named


def _words(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Entry point, command and arguments; of an expression its quoted strings."""
    found: list[str] = []
    for key in ("entrypoint", "command", "args"):
        value = config.get(key)
        if isinstance(value, str):
            found += re.findall(r'"((?:[^"\\]|\\.)*)"', value) if _EXPRESSION.match(value) else [value]
        elif isinstance(value, Sequence):
            found += [str(v) for v in value]
    return tuple(found)


def _view(job: Mapping[str, Any], group: Mapping[str, Any], task: Mapping[str, Any], file: str) -> View:
    config, env = task.get("Config") or {}, {k: str(v) for k, v in (task.get("Env") or {}).items()}
    resources = task.get("Resources") or {}
    visible = env.get("NVIDIA_VISIBLE_DEVICES", "")
    ulimits = [u for u in _listed(config.get("ulimit")) if isinstance(u, Mapping)]
    kill = task.get("KillTimeout")
    return View(
        place=f"{file}: task '{task.get('Name')}'",
        words=_words(config),
        env=env,
        image=_text(config.get("image")),
        is_partial=bool(job.get("_partial")),
        gpus=tuple(visible.split(",")) if visible.startswith(("GPU-", "MIG-")) else None,
        has_device=bool(resources.get("Devices")),
        memory_mib=_whole(resources.get("MemoryMB")),
        kill_timeout_s=kill / _NS if isinstance(kill, int | float) else None,
        logs_mb=_logs_mb(group),
        disk_mb=_whole((group.get("EphemeralDisk") or {}).get("SizeMB", 300)),
        restart=_lower(task.get("RestartPolicy") or group.get("RestartPolicy")),
        reschedule=_lower(group.get("ReschedulePolicy") or job.get("Reschedule")),
        update={**_lower(job.get("Update")), **_lower(group.get("Update"))},
        count=_whole(group.get("Count", 1)),
        has_check_restart=any(_check_restarts([*_listed(group.get("Services")), *_listed(task.get("Services"))])),
        change_modes=tuple(str(t.get("ChangeMode") or "restart") for t in _listed(task.get("Templates"))),
        is_readonly=config.get("readonly_rootfs") is True,
        writable=tuple(_writable(config)),
        memlock=next((str(u["memlock"]) for u in ulimits if "memlock" in u), None),
    )


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and not _EXPRESSION.match(value) else None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _listed(value: Any) -> list[Any]:
    return [] if value is None or isinstance(value, str) else value if isinstance(value, list) else [value]


def _lower(value: Any) -> dict[str, Any]:
    """Go's names as the file's: AutoRevert is auto_revert. Nulls are left out: they mean the default."""
    pairs = value.items() if isinstance(value, Mapping) else ()
    return {re.sub(r"(?<=[a-z])(?=[A-Z])", "_", k).lower(): v for k, v in pairs if v is not None}


def _logs_mb(group: Mapping[str, Any]) -> int:
    """Both streams of every task, at their fullest. Ten files of 10 MB are Nomad's default."""
    total = 0
    for task in group.get("Tasks") or ():
        logs = task.get("LogConfig") or {}
        files, size = logs.get("MaxFiles", 10), logs.get("MaxFileSizeMB", 10)
        if isinstance(files, int) and isinstance(size, int) and not task.get("Lifecycle"):
            total += 2 * files * size
    return total


def _check_restarts(services: Sequence[Mapping[str, Any]]) -> Iterator[bool]:
    for service in services:
        yield bool(service.get("CheckRestart"))
        yield from (bool(check.get("CheckRestart")) for check in _listed(service.get("Checks")))


def _writable(config: Mapping[str, Any]) -> Iterator[str]:
    for mount in [*_listed(config.get("mount")), *_listed(config.get("mounts"))]:
        if isinstance(mount, Mapping) and not mount.get("readonly"):
            yield str(mount.get("target"))
    for volume in _listed(config.get("volumes")):
        parts = str(volume).split(":")
        if len(parts) >= 2 and "ro" not in parts[2:]:
            yield parts[1]


# -- HCL -------------------------------------------------------------------------------------------------------------


def job_of_hcl(parsed: Mapping[str, Any], values: Mapping[str, Any], *, file: str) -> Mapping[str, Any]:
    """HCL as pygohcl gives it, in the names of Nomad's JSON, as far as the rules ask. ``values`` are of a var-file.

    Expressions other than a variable with a known value stay text; the job is then marked as read in part.
    """
    jobs = parsed.get("job")
    if not isinstance(jobs, Mapping) or len(jobs) != 1:
        raise JobsError(f"{file}: has no job block, or more than one: give a file with one job")
    defaults = {k: v.get("default") for k, v in (parsed.get("variable") or {}).items() if isinstance(v, Mapping)}
    known = {**{k: v for k, v in defaults.items() if v is not None}, **values}
    resolved = _resolved(next(iter(jobs.values())), known)
    groups = [_group(name, group) for name, group in _labelled(resolved.get("group"))]
    return {
        "_partial": _has_expression(resolved),
        "TaskGroups": groups,
        "Update": _go(resolved.get("update")),
        "Reschedule": _go(resolved.get("reschedule")),
    }


def _resolved(value: Any, known: Mapping[str, Any]) -> Any:
    match value:
        case str() if value.startswith("var.") and value[4:] in known:
            return known[value[4:]]
        case Mapping():
            return {k: _resolved(v, known) for k, v in value.items()}
        case list():
            return [_resolved(v, known) for v in value]
    return value


def _has_expression(value: Any) -> bool:
    match value:
        case str():
            return bool(_EXPRESSION.match(value))
        case Mapping():
            return any(map(_has_expression, value.values()))
        case list():
            return any(map(_has_expression, value))
    return False


def _labelled(value: Any) -> list[tuple[str, Mapping[str, Any]]]:
    pairs = value.items() if isinstance(value, Mapping) else ()
    return [(str(k), v) for k, v in pairs if isinstance(v, Mapping)]


def _go(block: Any) -> dict[str, Any] | None:
    """A block's keys in Go's way: auto_revert is AutoRevert."""
    if not isinstance(block, Mapping):
        return None
    return {"".join(part.capitalize() for part in k.split("_")): v for k, v in block.items()}


def _group(name: str, group: Mapping[str, Any]) -> dict[str, Any]:
    disk = group.get("ephemeral_disk")
    return {
        "Name": name,
        "Count": group.get("count", 1),
        "RestartPolicy": _go(group.get("restart")),
        "ReschedulePolicy": _go(group.get("reschedule")),
        "Update": _go(group.get("update")),
        "EphemeralDisk": {"SizeMB": disk.get("size", 300)} if isinstance(disk, Mapping) else None,
        "Services": [_service(s) for s in _listed(group.get("service"))],
        "Tasks": [_task(name, task) for name, task in _labelled(group.get("task"))],
    }


def _service(service: Mapping[str, Any]) -> dict[str, Any]:
    checks = [{"CheckRestart": check.get("check_restart")} for check in _listed(service.get("check"))]
    return {"CheckRestart": service.get("check_restart"), "Checks": checks}


def _task(name: str, task: Mapping[str, Any]) -> dict[str, Any]:
    resources, logs = task.get("resources") or {}, task.get("logs")
    env = task.get("env")
    return {
        "Name": name,
        "Driver": task.get("driver"),
        "Lifecycle": {"Hook": task["lifecycle"].get("hook")} if isinstance(task.get("lifecycle"), Mapping) else None,
        "Config": task.get("config") or {},
        "Env": {k: v for k, v in env.items() if not _has_expression(v)} if isinstance(env, Mapping) else {},
        "KillTimeout": _duration_ns(task.get("kill_timeout")),
        "LogConfig": {"MaxFiles": logs.get("max_files", 10), "MaxFileSizeMB": logs.get("max_file_size", 10)}
        if isinstance(logs, Mapping)
        else None,
        "Resources": {"MemoryMB": resources.get("memory"), "Devices": _listed(resources.get("device"))},
        "RestartPolicy": _go(task.get("restart")),
        "Services": [_service(s) for s in _listed(task.get("service"))],
        "Templates": [{"ChangeMode": t.get("change_mode")} for t in _listed(task.get("template"))],
    }


def _duration_ns(value: Any) -> float | None:
    parts = re.findall(r"(\d+(?:\.\d+)?)(ms|s|m|h)", value) if isinstance(value, str) else []
    return sum(float(n) * _UNITS_S[unit] for n, unit in parts) * _NS if parts else None
