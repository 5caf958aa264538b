"""What the doctor finds: what is wrong, the evidence, and the command that mends it."""

from dataclasses import dataclass
from enum import StrEnum


class Severity(StrEnum):
    BROKEN = "broken"  # it does not work now: the walk stops here, for what lies above stands on it
    RISK = "risk"  # it works now, and will break: at a reboot, at the next launch, over time
    NOTE = "note"  # worth knowing: the exit code stays 0


class RepairKind(StrEnum):
    """What ``--fix`` may do. Nothing here touches a process, a GPU or a file that anybody uses."""

    REMOVE_SHM = "remove-shm"
    MAKE_DIRECTORY = "make-directory"
    FORGET_PORT = "forget-port"


@dataclass(frozen=True, slots=True)
class Repair:
    """A safe repair. ``target`` is a path, or an engine's name; ``says`` what will be done, in words."""

    kind: RepairKind
    target: str
    says: str


@dataclass(frozen=True, slots=True)
class Finding:
    """``code`` names the kind of finding for good: scripts may match it. ``fix`` is a command where one exists, else
    what a person must do. ``stops_launch``: this engine (or, without one, every engine) surely cannot start."""

    code: str
    severity: Severity
    what: str
    evidence: str
    fix: str
    engine: str | None = None
    repair: Repair | None = None
    stops_launch: bool = False

    @property
    def layer(self) -> str:
        return self.code.partition(".")[0]


def broken(code: str, what: str, evidence: str, fix: str, **more: object) -> Finding:
    return Finding(code, Severity.BROKEN, what, evidence, fix, **more)  # type: ignore[arg-type] # the callers' own names


def risk(code: str, what: str, evidence: str, fix: str, **more: object) -> Finding:
    return Finding(code, Severity.RISK, what, evidence, fix, **more)  # type: ignore[arg-type] # the callers' own names


def note(code: str, what: str, evidence: str, fix: str, **more: object) -> Finding:
    return Finding(code, Severity.NOTE, what, evidence, fix, **more)  # type: ignore[arg-type] # the callers' own names
