"""What a check finds, and the machine around a configuration as the checks see it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rotator.ports import HostMemory, Recovered


@dataclass(frozen=True, slots=True)
class Finding:
    """``line`` reads ``place: problem: fix``. An error keeps something from working; a warning may be meant; a note
    only says what the rest was judged beside."""

    line: str
    is_error: bool = True
    is_note: bool = False

    @property
    def level(self) -> str:
        return "note" if self.is_note else "error" if self.is_error else "warning"


def error(place: str, problem: str, fix: str) -> Finding:
    return Finding(f"{place}: {problem}: {fix}")


def warning(place: str, problem: str, fix: str) -> Finding:
    return Finding(f"{place}: {problem}: {fix}", is_error=False)


def note(place: str, what: str, hint: str) -> Finding:
    return Finding(f"{place}: {what}: {hint}", is_error=False, is_note=True)


class Surroundings(Protocol):
    """The machine, as far as the checks ask about it. Nothing here changes anything or blocks for long."""

    @property
    def env(self) -> Mapping[str, str]:
        """The environment that the service would run with."""
        ...

    def port_holder(self, host: str, port: int) -> str | None:
        """Who listens there, in words; None where the port is free."""
        ...

    def service_pid(self, ledger_url: str, port: int) -> int | None:
        """The process that holds this ledger and listens on this port; None where nobody does both, or nobody tells."""
        ...

    def engine_on(self, port: int, state_dir: Path) -> str | None:
        """Which engine of the service with this folder listens there; None where it is none, or nobody tells."""
        ...

    def engine_of(self, pid: int, state_dir: Path) -> str | None:
        """Which engine of the service with this folder the process belongs to, likewise."""
        ...

    def program_problem(self, program: str, workdir: str | None, path: str | None) -> str | None:
        """Why the program cannot be run; ``path`` is the PATH it would be looked up in."""
        ...

    def exists(self, path: Path) -> bool: ...

    def unwritable(self, folder: Path) -> str | None:
        """Why no file can be made there (or the folder itself cannot be); None where one can."""
        ...

    def host_memory(self) -> HostMemory: ...

    def memlock_bytes(self) -> int | None:
        """How much memory a process may lock; None for no limit."""
        ...

    def now_wall_s(self) -> float: ...

    def remembered(self, url: str) -> Recovered | None:
        """What the ledger at this URL tells of engines' bytes and seconds; None where there is none to read."""
        ...

    def ledger_problem(self, url: str) -> str | None:
        """Why the ledger at this URL cannot be opened."""
        ...
