"""The rollout's own journal: one file in the state directory, written whole, read by whoever goes on.

A file and no table: it must be there while the service is down, and it is what the service's ledger is compared with.
"""

import dataclasses
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rotator.rollout.ports import RolloutError
from rotator.rollout.steps import End, Entry, Move, Part, Result, Step, Way, next_move

FORMAT = 1
NAME, LOCK = "rollout.json", "rollout.lock"
MOVE_AWAY = "move it away if no rollout is under way"


@dataclass(frozen=True, slots=True)
class Settings:
    """How hard a new version is tried. ``recall`` are sizes of batches of concurrent prompts."""

    recall: tuple[int, ...] = (8, 16)
    recall_words: int = 6000
    recall_tokens: int = 512
    recall_as_before: bool = False
    cycles: int = 20
    residue_tolerance_gib: float = 0.25
    speed_samples: int = 5
    speed_tokens: int = 128
    speed_tolerance: float = 0.15
    drain_deadline_s: float = 1800.0
    step_deadline_s: float = 900.0
    vram_deadline_s: float = 120.0
    away_max_s: float = 3600.0
    environment: str = ""
    install: tuple[str, ...] = ()
    archives: str = ""


@dataclass(slots=True)
class Rollout:
    """``present`` and ``target`` are texts of the fleet file; ``waiting`` says for what it waits now."""

    id: str
    fleet_file: str
    present: str
    target: str
    parts: tuple[Part, ...]
    settings: Settings
    began_wall_s: float
    log: list[Entry] = field(default_factory=list)
    waiting: str = ""

    @property
    def next(self) -> Move | End:
        return next_move(self.parts, self.log)


class Records:
    """``folder`` holds the journal of the newest rollout; those before it lie beside, by their ids."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / NAME

    @contextmanager
    def held(self) -> Iterator[None]:
        """For one command at a time; the kernel lets go of it however the process ends. Raises RolloutError."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as e:
            raise RolloutError(f"{self.folder}: {e.strerror}: run this where the service runs, as its user") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise RolloutError("another `rotator jobs rollout` is at work here: see --status") from None
        try:
            yield
        finally:
            os.close(handle)

    def load(self) -> Rollout | None:
        """The newest rollout. Raises RolloutError for a file that is none."""
        try:
            told = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as e:
            raise RolloutError(f"{self.path} cannot be read: {e}: {MOVE_AWAY}") from None
        if not isinstance(told, dict):
            raise RolloutError(f"{self.path} is no journal of a rollout: {MOVE_AWAY}")
        if told.get("format") != FORMAT:
            raise RolloutError(f"{self.path} is of another release (format {told.get('format')}): go on with that one")
        try:
            return _rollout(told)
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise RolloutError(f"{self.path} is no journal of a rollout ({e!r}): {MOVE_AWAY}") from None

    def keep(self, rollout: Rollout) -> None:
        """Durable when it returns. Raises RolloutError."""
        text = json.dumps({"format": FORMAT, **dataclasses.asdict(rollout)}, indent=1)
        try:
            write_whole(self.path, text)
        except OSError as e:
            raise RolloutError(f"{self.path}: {e.strerror}: make room, then --resume") from None

    def begin(self, rollout: Rollout) -> None:
        """Keep a new one; the one before stays under its id."""
        former = self.load()
        if former is not None:
            os.replace(self.path, self.folder / f"rollout-{former.id}.json")
        self.keep(rollout)


def write_whole(path: Path, text: str) -> None:
    """The file has its former content or the new one, whenever the power goes. It keeps its owner and rights; a new one
    is its owner's alone, since fleet files may hold secrets. Raises OSError."""
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    if path.exists():
        former = path.stat()
        if (former.st_uid, former.st_gid) != (os.geteuid(), part.stat().st_gid):
            os.chown(part, former.st_uid, former.st_gid)
        part.chmod(former.st_mode & 0o777)
    os.replace(part, path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _rollout(told: dict[str, Any]) -> Rollout:
    told.pop("format")
    settings = {**told.pop("settings")}
    for name in ("recall", "install"):
        settings[name] = tuple(settings[name])
    parts = tuple(Part(**part) for part in told.pop("parts"))
    log = [
        Entry(**{**e, "way": Way(e["way"]), "step": Step(e["step"]), "result": Result(e["result"])})
        for e in told.pop("log")
    ]
    return Rollout(**told, parts=parts, settings=Settings(**settings), log=log)
