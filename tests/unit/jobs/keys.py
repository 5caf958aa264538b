"""The keys that Nomad 2.0 knows in a job file and in the docker driver's config, written down from its structs.

Nomad silently ignores an unknown key of a driver's config in JSON, and a wrong one in a file fails only at the parser.
``*`` is any key; a block's name maps to what it may hold, a plain key to None.
"""

from typing import Any

RESTART = dict.fromkeys(("attempts", "interval", "delay", "mode", "render_templates"))
RESCHEDULE = dict.fromkeys(("attempts", "interval", "delay", "delay_function", "max_delay", "unlimited"))
UPDATE = dict.fromkeys(
    (
        *("max_parallel", "health_check", "min_healthy_time", "healthy_deadline", "progress_deadline"),
        *("auto_revert", "auto_promote", "canary", "stagger"),
    )
)
CONSTRAINT = dict.fromkeys(("attribute", "operator", "value"))
CHECK_RESTART = dict.fromkeys(("limit", "grace", "ignore_warnings"))
CHECK: dict[str, Any] = {
    **dict.fromkeys(("name", "type", "path", "interval", "timeout", "port", "method", "protocol", "initial_status")),
    "check_restart": CHECK_RESTART,
}
SERVICE: dict[str, Any] = {
    **dict.fromkeys(("name", "provider", "port", "tags", "address_mode", "address")),
    "check": CHECK,
}
DOCKER: dict[str, Any] = {
    **dict.fromkeys(
        (
            *("image", "args", "command", "entrypoint", "runtime", "init", "network_mode", "ipc_mode", "pid_mode"),
            *("shm_size", "readonly_rootfs", "cap_add", "cap_drop", "security_opt", "privileged", "work_dir"),
            *("mounts", "mount", "volumes", "devices", "ports", "pids_limit", "image_pull_timeout", "auth_soft_fail"),
        )
    ),
    "ulimit": {"*": None},
}
TEMPLATE = dict.fromkeys(
    (
        *("source", "destination", "data", "env", "change_mode", "change_signal", "perms", "uid", "gid", "splay"),
        *("left_delimiter", "right_delimiter", "once", "error_on_missing_key"),
    )
)
DEVICE: dict[str, Any] = {"*": {"count": None, "constraint": CONSTRAINT, "affinity": None}}
TASK: dict[str, Any] = {
    **dict.fromkeys(("driver", "user", "kill_timeout", "kill_signal", "leader", "shutdown_delay")),
    "config": DOCKER,
    "env": {"*": None},
    "identity": dict.fromkeys(("env", "file", "ttl", "aud", "change_mode", "name")),
    "lifecycle": dict.fromkeys(("hook", "sidecar")),
    "logs": dict.fromkeys(("max_files", "max_file_size", "disabled")),
    "resources": {**dict.fromkeys(("cpu", "cores", "memory", "memory_max")), "device": DEVICE},
    "restart": RESTART,
    "service": SERVICE,
    "template": TEMPLATE,
    "constraint": CONSTRAINT,
    "meta": {"*": None},
}
GROUP: dict[str, Any] = {
    "count": None,
    "constraint": CONSTRAINT,
    "disconnect": dict.fromkeys(("lost_after", "stop_on_client_after", "replace", "reconcile")),
    "ephemeral_disk": dict.fromkeys(("size", "migrate", "sticky")),
    "network": {"mode": None, "port": {"*": dict.fromkeys(("static", "to", "host_network"))}},
    "reschedule": RESCHEDULE,
    "restart": RESTART,
    "service": SERVICE,
    "task": {"*": TASK},
    "update": UPDATE,
    "meta": {"*": None},
}
JOB: dict[str, Any] = {
    **dict.fromkeys(("id", "name", "type", "region", "namespace", "node_pool", "datacenters", "priority")),
    "constraint": CONSTRAINT,
    "group": {"*": GROUP},
    "meta": {"*": None},
    "reschedule": RESCHEDULE,
    "update": UPDATE,
}
FILE: dict[str, Any] = {
    "job": {"*": JOB},
    "variable": {"*": dict.fromkeys(("type", "default", "description"))},
    "locals": {"*": None},
}
