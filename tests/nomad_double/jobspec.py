"""From a job's text to what Nomad's API calls it: the keys, the defaults, durations in nanoseconds. Strict: what a job
may not hold is an error, as it is for Nomad."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from tests.nomad_double.hcl import TYPES, Block, HclError, Parser, Scope, text_of

Json = dict[str, Any]
_UNITS_NS = {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9}

# Attributes of each block: as written -> as the API says. A duration's key ends in ~.
ATTRIBUTES: Mapping[str, Mapping[str, str]] = {
    "job": {
        "id": "ID", "name": "Name", "namespace": "Namespace", "type": "Type", "node_pool": "NodePool",
        "datacenters": "Datacenters", "priority": "Priority", "region": "Region", "meta": "Meta",
    },
    "group": {"count": "Count", "meta": "Meta"},
    "task": {
        "driver": "Driver", "user": "User", "env": "Env", "meta": "Meta", "kill_signal": "KillSignal",
        "kill_timeout": "KillTimeout~", "leader": "Leader", "shutdown_delay": "ShutdownDelay~",
    },
    "constraint": {"attribute": "LTarget", "value": "RTarget", "operator": "Operand"},
    "reschedule": {
        "attempts": "Attempts", "interval": "Interval~", "unlimited": "Unlimited", "delay": "Delay~",
        "max_delay": "MaxDelay~", "delay_function": "DelayFunction",
    },
    "restart": {"attempts": "Attempts", "interval": "Interval~", "delay": "Delay~", "mode": "Mode"},
    "update": {
        "max_parallel": "MaxParallel", "canary": "Canary", "health_check": "HealthCheck", "stagger": "Stagger~",
        "min_healthy_time": "MinHealthyTime~", "healthy_deadline": "HealthyDeadline~",
        "progress_deadline": "ProgressDeadline~", "auto_revert": "AutoRevert", "auto_promote": "AutoPromote",
    },
    "disconnect": {"lost_after": "LostAfter~", "replace": "Replace", "reconcile": "Reconcile"},
    "ephemeral_disk": {"size": "SizeMB", "migrate": "Migrate", "sticky": "Sticky"},
    "network": {"mode": "Mode"},
    "port": {"static": "Value", "to": "To", "host_network": "HostNetwork"},
    "service": {"name": "Name", "provider": "Provider", "port": "PortLabel", "tags": "Tags"},
    "check": {
        "name": "Name", "type": "Type", "path": "Path", "interval": "Interval~", "timeout": "Timeout~",
        "method": "Method", "protocol": "Protocol",
    },
    "check_restart": {"limit": "Limit", "grace": "Grace~"},
    "lifecycle": {"hook": "Hook", "sidecar": "Sidecar"},
    "template": {
        "destination": "DestPath", "env": "Envvars", "change_mode": "ChangeMode", "data": "EmbeddedTmpl",
        "source": "SourcePath", "perms": "Perms", "change_signal": "ChangeSignal",
    },
    "logs": {"max_files": "MaxFiles", "max_file_size": "MaxFileSizeMB", "disabled": "Disabled"},
    "resources": {"cpu": "CPU", "cores": "Cores", "memory": "MemoryMB", "memory_max": "MemoryMaxMB"},
    "device": {"count": "Count"},
    "identity": {"env": "Env", "file": "File", "name": "Name", "aud": "Audience"},
}  # fmt: skip
# Blocks in a block: as written -> (key, whether there may be many).
BLOCKS: Mapping[str, Mapping[str, tuple[str, bool]]] = {
    "job": {
        "constraint": ("Constraints", True), "reschedule": ("Reschedule", False), "update": ("Update", False),
        "group": ("TaskGroups", True),
    },
    "group": {
        "constraint": ("Constraints", True), "restart": ("RestartPolicy", False),
        "reschedule": ("ReschedulePolicy", False), "update": ("Update", False), "disconnect": ("Disconnect", False),
        "ephemeral_disk": ("EphemeralDisk", False), "network": ("Networks", True), "service": ("Services", True),
        "task": ("Tasks", True),
    },
    "task": {
        "constraint": ("Constraints", True), "lifecycle": ("Lifecycle", False), "template": ("Templates", True),
        "logs": ("LogConfig", False), "resources": ("Resources", False), "identity": ("Identity", False),
        "service": ("Services", True),
    },
    "service": {"check": ("Checks", True), "check_restart": ("CheckRestart", False)},
    "check": {"check_restart": ("CheckRestart", False)},
    "resources": {"device": ("Devices", True)},
    "device": {"constraint": ("Constraints", True)},
}  # fmt: skip
# Canonical values of what is left out, for a service (api/jobs.go, api/tasks.go).
RESTART = {"Attempts": 2, "Interval": 30 * 60 * 10**9, "Delay": 15 * 10**9, "Mode": "fail"}
RESCHEDULE = {
    "Attempts": 0, "Interval": 0, "Delay": 30 * 10**9, "DelayFunction": "exponential",
    "MaxDelay": 3600 * 10**9, "Unlimited": True,
}  # fmt: skip
UPDATE = {
    "Stagger": 30 * 10**9, "MaxParallel": 1, "HealthCheck": "checks", "MinHealthyTime": 10 * 10**9,
    "HealthyDeadline": 300 * 10**9, "ProgressDeadline": 600 * 10**9, "AutoRevert": False, "AutoPromote": False,
    "Canary": 0,
}  # fmt: skip


def read_job(hcl: str, variables: str) -> Json:
    """The job as Nomad's parse would give it with Canonicalize. Raises HclError in Nomad's words."""
    body = Parser(hcl).body()
    scope = _scope(body, variables)
    jobs = [block for block in body.blocks if block.kind == "job"]
    if len(jobs) != 1:
        raise HclError("input.hcl:1,1-1: Missing job block; A job block is required")
    return _canonical(_block(jobs[0], scope))


def _scope(body: Block, variables: str) -> Scope:
    given = {name: value({}) for name, value in Parser(variables).body().attributes.items()}
    declared = {block.labels[0]: block for block in body.blocks if block.kind == "variable"}
    for name in given.keys() - declared.keys():
        raise HclError(f'input.vars:1,1-1: Undefined variable; A "{name}" variable was set but was not found')
    values: Json = {}
    for name, block in declared.items():
        if name in given:
            kind = block.attributes["type"](TYPES) if "type" in block.attributes else "any"
            values[name] = _of_type(name, kind, given[name])
        elif "default" in block.attributes:
            values[name] = block.attributes["default"]({})
        else:
            raise HclError(f'input.hcl:1,1-9: Unset variable "{name}"; A used variable has not been set')
    scope: Json = {"var": values, "local": {}}
    for block in [b for b in body.blocks if b.kind == "locals"]:
        for name, value in block.attributes.items():
            scope["local"][name] = value(scope)
    return scope


def _of_type(name: str, kind: str, value: Any) -> Any:
    """Values are turned into their variable's type where that can be."""
    good = {"string": str, "list": list, "map": dict, "bool": bool}.get(kind)
    if kind == "number" and isinstance(value, str) and re.fullmatch(r"\d+", value):
        return int(value)
    if kind == "string" and isinstance(value, int | float):
        return text_of(value)
    if (good is not None and not isinstance(value, good)) or (kind == "number" and not isinstance(value, int | float)):
        raise HclError(f"input.vars:1,1-1: Invalid value for variable; The value for {name} is no {kind}")
    return value


def _block(block: Block, scope: Scope) -> Json:
    known, inner = ATTRIBUTES[block.kind], BLOCKS.get(block.kind, {})
    made: Json = {"Name": block.labels[0]} if block.kind in ("job", "group", "task", "device") else {}
    for name, expression in block.attributes.items():
        if name not in known:
            raise HclError(f'Unsupported argument; An argument named "{name}" is not expected here ({block.kind}).')
        key = known[name]
        value = expression(scope)
        made[key.rstrip("~")] = duration_ns(value) if key.endswith("~") else value
    for child in block.blocks:
        _child(block, child, made, inner, scope)
    return made


def _child(block: Block, child: Block, made: Json, inner: Mapping[str, tuple[str, bool]], scope: Scope) -> None:
    if child.kind in ("meta", "env") and child.kind in ATTRIBUTES[block.kind]:
        made[ATTRIBUTES[block.kind][child.kind]] = _plain(child, scope)
    elif block.kind == "task" and child.kind == "config":
        made["Config"] = _plain(child, scope)
    elif block.kind == "network" and child.kind == "port":
        port = {"Label": child.labels[0], "Value": 0, "To": 0, "HostNetwork": "default", **_block(child, scope)}
        made.setdefault("ReservedPorts" if port["Value"] else "DynamicPorts", []).append(port)
    elif child.kind in inner:
        key, many = inner[child.kind]
        value = _block(child, scope)
        if many:
            made.setdefault(key, []).append(value)
        elif key in made:
            raise HclError(f"Duplicate {child.kind} block; Only one {child.kind} block is allowed.")
        else:
            made[key] = value
    else:
        raise HclError(f'Unsupported block type; Blocks of type "{child.kind}" are not expected here ({block.kind}).')


def _plain(block: Block, scope: Scope) -> Json:
    """A driver's configuration is its driver's business: blocks in it become lists of what they hold."""
    made: Json = {name: value(scope) for name, value in block.attributes.items()}
    for child in block.blocks:
        made.setdefault(child.kind, []).append(_plain(child, scope))
    return made


def duration_ns(value: Any) -> int:
    if isinstance(value, int):
        return value
    parts = re.findall(r"(\d+(?:\.\d+)?)(ns|us|ms|s|m|h)", str(value))
    if not parts or "".join(n + u for n, u in parts) != value:
        raise HclError(f'Unsuitable value type; Unsuitable duration value: time: invalid duration "{value}"')
    return int(sum(float(number) * _UNITS_NS[unit] for number, unit in parts))


# -- defaults --------------------------------------------------------------------------------------------------------


def _canonical(job: Json) -> Json:
    job = {
        "Region": "global", "Namespace": "default", "Type": "service", "Priority": 50, "Datacenters": ["*"],
        "NodePool": "", "Meta": None, "Constraints": None, **job,
    }  # fmt: skip
    job.setdefault("ID", job["Name"])
    update = {**UPDATE, **(job.get("Update") or {})}
    job["Update"], again = update, job.pop("Reschedule", None)
    job["Meta"] = _texts(job["Meta"])
    job["TaskGroups"] = [_group(group, update, again) for group in job.get("TaskGroups") or ()]
    if job["Type"] == "system":
        _check_system(job, again)
    _each(job.get("Constraints"), lambda c: c.setdefault("Operand", "="))
    return job


def _check_system(job: Json, again: Json | None) -> None:
    """One allocation on every node that fits: there is nothing to count, and nowhere else to go."""
    if again is not None:
        raise HclError("System jobs should not have a reschedule policy")
    for group in job["TaskGroups"]:
        if group["Count"] > 1:
            raise HclError(
                f"Job task group {group['Name']} has count {group['Count']}. Count cannot exceed 1 with system"
            )
        group["ReschedulePolicy"] = None


def _group(group: Json, update: Json, again: Json | None) -> Json:
    group = {"Count": 1, "Meta": None, "Networks": None, "Services": None, "Disconnect": None, **group}
    group["RestartPolicy"] = {**RESTART, **(group.get("RestartPolicy") or {})}
    group["ReschedulePolicy"] = {**RESCHEDULE, **(again or {}), **(group.get("ReschedulePolicy") or {})}
    group["Update"] = {**update, **(group.get("Update") or {})}
    group["EphemeralDisk"] = {"SizeMB": 300, "Migrate": False, "Sticky": False, **(group.get("EphemeralDisk") or {})}
    group["Meta"] = _texts(group["Meta"])
    group["Tasks"] = [_task(task, group["RestartPolicy"]) for task in group.get("Tasks") or ()]
    _each(group.get("Constraints"), lambda c: c.setdefault("Operand", "="))
    _each(group["Networks"], lambda n: (n.setdefault("ReservedPorts", None), n.setdefault("DynamicPorts", None)))
    return group


def _task(task: Json, restart: Json) -> Json:
    task = {
        "Driver": "", "User": "", "Lifecycle": None, "Config": {}, "Meta": None, "KillTimeout": 5 * 10**9,
        "KillSignal": "", "Templates": None, "Leader": False, **task,
    }  # fmt: skip
    task["Env"], task["Meta"] = _texts(task.get("Env")), _texts(task["Meta"])
    task["LogConfig"] = {"MaxFiles": 10, "MaxFileSizeMB": 10, "Disabled": False, **(task.get("LogConfig") or {})}
    task["Resources"] = {"CPU": 100, "MemoryMB": 300, **(task.get("Resources") or {})}
    task["RestartPolicy"] = dict(restart)
    _each(task.get("Templates"), lambda t: t.setdefault("ChangeMode", "restart"))
    return task


def _texts(values: Mapping[str, Any] | None) -> Json | None:
    return None if values is None else {key: text_of(value) for key, value in values.items()}


def _each(items: Iterable[Json] | None, act: Callable[[Json], Any]) -> None:
    for item in items or ():
        act(item)
