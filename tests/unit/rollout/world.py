"""A fleet that is rolled through, as values: what runs, what the file says, and where it fails or dies."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rotator.rollout.ports import Away, StepFailed
from rotator.rollout.records import Rollout, Settings
from rotator.rollout.steps import Move, Part, Step, Way

OLD, NEW = "old", "new"


class Died(Exception):
    """The command was killed here."""


@dataclass
class Fleet:
    """Carries steps out on values. ``fails`` names steps that fail; ``dies`` says at which of its chances (before and
    after each effect and each write) the command is killed."""

    names: tuple[str, ...]
    fails: frozenset[tuple[str, Way, Step]] = frozenset()
    away: frozenset[int] = frozenset()
    dies: frozenset[int] = frozenset()
    chances: int = 0
    tries: int = 0
    runs: dict[str, str | None] = field(default_factory=dict)
    file: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)  # what lies in the environment, where one is exchanged
    kept: Rollout | None = None
    steps: list[Move] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.runs = dict.fromkeys(self.names, OLD)
        self.file = dict.fromkeys(self.names, OLD)
        self.files = dict.fromkeys(self.names, OLD)

    def _chance(self) -> None:
        self.chances += 1
        if self.chances in self.dies:
            raise Died

    def keep(self, rollout: Rollout) -> None:
        self._chance()
        self.kept = again(rollout)
        self._chance()

    def __call__(self, rollout: Rollout, move: Move) -> tuple[str, Mapping[str, Any]]:
        self._chance()
        self.tries += 1
        if self.tries in self.away:
            raise Away("Nomad cannot be reached")
        self.steps.append(move)
        if (move.engine, move.way, move.step) in self.fails:
            raise StepFailed(f"{move.step} of {move.engine} failed")
        self._do(move)
        down = [name for name in self.names if self.runs[name] is None]
        assert len(down) <= 1, f"{down} are down at once"
        self._chance()
        return "", {}

    def _do(self, move: Move) -> None:
        name, aim = move.engine, NEW if move.way is Way.FORWARD else OLD
        match move.step:
            case Step.SWITCH:
                self.file[name] = aim
            case Step.INSTALL:
                assert self.runs[name] is None, "files are exchanged under an engine that runs"
                self.files[name] = aim
            case Step.STOP:
                self.runs[name] = None
            case Step.START:
                self.runs[name] = self.file[name]
            case Step.CANARY | Step.RECALL | Step.SOAK | Step.SPEED:
                assert self.runs[name] == aim, "another version is tried than the one that is meant"
            case Step.BASELINE:
                assert self.runs[name] == OLD

    # -- a clock -----------------------------------------------------------------------------------------------------

    def now_s(self) -> float:
        return float(self.tries)

    def wall_s(self) -> float:
        return 0.0

    def sleep(self, seconds: float) -> None:
        pass


def rollout_of(parts: tuple[Part, ...]) -> Rollout:
    return Rollout("1", "fleet.yaml", "", "", parts, Settings(), 0.0)


def again(rollout: Rollout) -> Rollout:
    """What a new command reads of it."""
    return Rollout(
        rollout.id, rollout.fleet_file, "", "", rollout.parts, rollout.settings, 0.0, list(rollout.log), rollout.waiting
    )
