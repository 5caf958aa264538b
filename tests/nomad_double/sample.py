"""A small engine job: its text, its variables, and what Nomad makes of them."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

HCL = """\
variable "job_id" { type = string }
variable "port" { type = number }
variable "note" {
  type    = string
  default = ""
}

job "engine" {
  id   = var.job_id
  name = var.job_id
  type = "service"
  meta { note = var.note }

  group "engine" {
    count = 1
    restart {
      attempts = 0
      mode     = "fail"
    }
    reschedule {
      attempts  = 0
      unlimited = false
    }
    network {
      mode = "host"
      port "http" { static = var.port }
    }
    task "vllm" {
      driver       = "raw_exec"
      kill_signal  = "SIGTERM"
      kill_timeout = "5s"
      config { command = "engine" }
    }
  }
}
"""


def sample_job(
    job_id: str = "vllm-a",
    *,
    port: int = 8001,
    argv: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    note: str = "",
    **more: Any,
) -> dict[str, Any]:
    """What Nomad would parse ``HCL`` to, canonical as far as anybody here looks. Without ``argv`` its task runs nothing
    (driver docker). ``more`` overrides keys of the job."""
    driver = "raw_exec" if argv else "docker"
    config: dict[str, Any] = {"command": argv[0], "args": list(argv[1:])} if argv else {"image": "vllm@sha256:0"}
    task = {
        "Name": "vllm",
        "Driver": driver,
        "Config": config,
        "Env": dict(env or {}),
        "Lifecycle": None,
        "KillSignal": "SIGTERM",
        "KillTimeout": 5_000_000_000,
        "Resources": {"CPU": 100, "MemoryMB": 512},
    }
    group = {
        "Name": "engine",
        "Count": 1,
        "RestartPolicy": {"Attempts": 0, "Mode": "fail", "Delay": 15_000_000_000, "Interval": 1_800_000_000_000},
        "ReschedulePolicy": {"Attempts": 0, "Unlimited": False, "Interval": 0},
        "Networks": [{"Mode": "host", "ReservedPorts": [{"Label": "http", "Value": port, "To": 0}]}],
        "Tasks": [task],
        "Update": None,
    }
    job = {
        "ID": job_id,
        "Name": job_id,
        "Type": "service",
        "Region": "global",
        "Namespace": "default",
        "Priority": 50,
        "Datacenters": ["*"],
        "NodePool": "gpu",
        "Meta": {"note": note} if note else None,
        "Update": {"MaxParallel": 1, "AutoRevert": False},
        "TaskGroups": [group],
    }
    return copy.deepcopy({**job, **more})
