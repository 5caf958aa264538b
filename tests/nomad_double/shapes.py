"""Keys that Nomad 2.0's API knows. A real one drops others without a word, so a misspelt one would go unnoticed."""

from collections.abc import Iterable, Mapping
from typing import Any


def _keys(text: str) -> frozenset[str]:
    return frozenset(text.split())


JOB = _keys(
    """Region Namespace ID ParentID Name Type Priority AllAtOnce Datacenters NodePool Constraints Affinities TaskGroups
    Update Multiregion Spreads Periodic ParameterizedJob Reschedule Migrate Meta UI Stop VersionTag Dispatched
    DispatchIdempotencyToken Payload ConsulNamespace VaultNamespace NomadTokenID ConsulToken VaultToken Status
    StatusDescription Stable Version SubmitTime CreateIndex ModifyIndex JobModifyIndex"""
)
GROUP = _keys(
    """Name Count Constraints Affinities Tasks Spreads Volumes RestartPolicy Disconnect ReschedulePolicy EphemeralDisk
    Update Migrate Networks Meta Services ShutdownDelay StopAfterClientDisconnect MaxClientDisconnect Scaling Consul
    PreventRescheduleOnLost"""
)
TASK = _keys(
    """Name Driver User Lifecycle Config Constraints Affinities Env Services Resources RestartPolicy Meta KillTimeout
    LogConfig Artifacts Vault Consul Templates DispatchPayload VolumeMounts CSIPluginConfig Leader ShutdownDelay
    KillSignal Kind ScalingPolicies Identity Identities Actions Schedule Secrets"""
)
DURATIONS = (
    "KillTimeout",
    "ShutdownDelay",
    "MinHealthyTime",
    "HealthyDeadline",
    "ProgressDeadline",
    "Interval",
    "Delay",
)

BODIES: Mapping[str, frozenset[str]] = {
    "parse": frozenset({"JobHCL", "Variables", "Canonicalize"}),
    "plan": frozenset({"Job", "Diff", "PolicyOverride"}),
    "register": frozenset({"Job", "EnforceIndex", "JobModifyIndex", "PreserveCounts", "Submission"}),
    "signal": frozenset({"Signal", "Task"}),
    "alloc-stop": frozenset(),
    "restart": frozenset({"TaskName", "AllTasks"}),
}
SUBMISSION = frozenset({"Source", "Format", "Variables", "VariableFlags"})


def job_problems(job: Mapping[str, Any]) -> Iterable[str]:
    yield from _unknown("Job", job, JOB)
    for group in job.get("TaskGroups") or ():
        yield from _unknown("TaskGroup", group, GROUP)
        for task in group.get("Tasks") or ():
            yield from _unknown("Task", task, TASK)


def duration_problem(value: Any) -> str | None:
    """Durations are integers of nanoseconds; Nomad says so in Go's words."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in DURATIONS and isinstance(inner, str):
                return f"json: cannot unmarshal string into Go struct field {key} of type time.Duration"
            if (found := duration_problem(inner)) is not None:
                return found
    if isinstance(value, list):
        return next((found for item in value if (found := duration_problem(item)) is not None), None)
    return None


def _unknown(what: str, value: Mapping[str, Any], known: frozenset[str]) -> Iterable[str]:
    return (f"{what} has no key '{key}'" for key in value if key not in known)
