"""What each step does with a service that is busy, that lies in pieces, or that is not there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from rotator.rollout.actions import HELD, Actions
from rotator.rollout.judge import GIB, Version
from rotator.rollout.ports import Away, Refused, StepFailed
from rotator.rollout.records import Rollout, Settings
from rotator.rollout.steps import Entry, Move, Part, Result, Step, Way

OLD = "engines: [{name: a, command: [old]}]\n"
NEW = "engines: [{name: a, command: [new]}]\n"


@dataclass
class Service:
    """One engine on one GPU. ``runs`` is the spec hash that it was started as, ``file`` that of the next start."""

    state: str = "awake"
    runs: str = "old"
    file: str = "old"
    busy: int = 0  # so many stops are refused for requests in flight
    foreign_bytes: int = 0
    residues: list[int] = field(default_factory=list)
    forgets: bool = False
    tokens_per_s: list[float] = field(default_factory=lambda: [100.0])
    turns: int = 0
    turn_in: int = 0  # so many measurements have a turn of somebody else in them
    stop_row: dict[str, Any] = field(default_factory=lambda: {"result": "ok", "error": None})
    cordons: dict[str, str] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)

    def look(self) -> None: ...

    def engine(self, name: str) -> Mapping[str, Any]:
        held = self.residues[0] if self.residues else 0
        view = {"name": name, "state": self.state, "gpus": ["g0"], "version": "0.26.0", "in_flight": self.busy}
        more = {"reason": "its words", "canary": "passed", "held_bytes": [held], "pids": [7], "wakes": self.turns}
        return {**view, **more, "sleeps": 0}

    def gpus(self) -> Sequence[Mapping[str, Any]]:
        reason = self.cordons.get("g0", "")
        return [{"id": "g0", "index": 0, "used_bytes": GIB, "foreign_bytes": self.foreign_bytes, "reason": reason}]

    def started_as(self, engine: str) -> str:
        return self.runs

    def last_stop(self, engine: str) -> Mapping[str, Any] | None:
        return self.stop_row

    def wake(self, engine: str, *, deadline_s: float) -> None:
        self.calls.append("wake")
        if self.state in ("failed", "stopped"):
            raise Refused("it is down")
        self.state = "awake"

    def sleep(self, engine: str, *, deadline_s: float) -> None:
        self.calls.append("sleep")
        self.state = "asleep"
        self.residues = self.residues[1:] or self.residues

    def start(self, engine: str, *, deadline_s: float) -> None:
        self.calls.append("start")
        self.runs, self.state = (self.file if self.state == "stopped" else self.runs), "awake"

    def stop(self, engine: str, *, deadline_s: float) -> None:
        self.calls.append("stop")
        if self.busy:
            self.busy -= 1
            raise Refused("a still has 1 request in flight, which a stop would lose")
        self.state = "stopped"

    def release(self, engine: str) -> None:
        self.calls.append("release")
        self.state = "stopped"

    def reload(self) -> tuple[str, ...]:
        return ("engine 'a': started differently from now on",)

    def cordon(self, gpu: str, reason: str | None) -> None:
        self.cordons = {**self.cordons, gpu: reason} if reason else {}

    def ask(self, engine: str, prompts: Sequence[str], *, tokens: int, deadline_s: float) -> list[str]:
        if len(prompts) > 1 and self.forgets:
            return ["I do not know"] * len(prompts)
        return [p.split(" is ")[1].split(".")[0] if "vault" in p else "ships" for p in map(_line, prompts)]

    def pace(self, engine: str, *, tokens: int, deadline_s: float) -> tuple[float, float]:
        if self.turn_in:
            self.turn_in -= 1
            self.turns += 1
            return 1.0, 99.0
        return self.tokens_per_s[0], 0.1


def _line(prompt: str) -> str:
    return next((s for s in prompt.split(". ") if s.startswith("The code of vault")), prompt) + "."


@dataclass
class World:
    """Fleet file, baselines, environments and clock in one; ``away`` is what Nomad is said to be."""

    service: Service
    text: str = OLD
    away: str = ""
    now: float = 0.0
    kept: dict[str, Mapping[str, Any]] = field(default_factory=dict)

    def read(self) -> str:
        return self.text

    def write(self, text: str) -> None:
        self.text = text
        self.service.file = "new" if "new" in text else "old"

    def version(self, text: str, engine: str, vllm: str) -> Version:
        return Version("a", vllm, "", "", "", "new" if "new" in text else "old")

    def start_deadline_s(self, engine: str) -> float:
        return 10.0

    def nomad_away(self, engine: str) -> str:
        return self.away

    def get(self, engine: str, version: str) -> Mapping[str, Any] | None:
        return self.kept.get(version)

    def put(self, engine: str, version: Version, facts: Mapping[str, Any]) -> None:
        self.kept[version.key] = facts

    def archive(self, engine: str) -> Mapping[str, Any]:
        return {"name": "kept"}

    def install(self, engine: str) -> Mapping[str, Any]:
        return {}

    def restore(self, engine: str, name: str) -> Mapping[str, Any]:
        return {"restored": name}

    def now_s(self) -> float:
        return self.now

    def wall_s(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Table:
    """One rollout of one engine, whose steps are carried out one by one."""

    def __init__(self, service: Service | None = None, **settings: Any) -> None:
        self.service = service or Service()
        self.world = World(self.service)
        given = Settings(recall=(2,), recall_words=60, cycles=3, speed_samples=2, drain_deadline_s=30, **settings)
        self.rollout = Rollout("1", "fleet.yaml", OLD, NEW, (Part("a"),), given, 0.0)
        self._do = Actions(self.service, self.world, self.world, self.world, self.world)

    def do(self, step: Step, way: Way = Way.FORWARD) -> str:
        self.rollout.log.append(Entry("a", way, step, Result.BEGUN))
        words, facts = self._do(self.rollout, Move("a", way, step))
        self.rollout.log.append(Entry("a", way, step, Result.DONE, 0.0, words, facts))
        return words


def test_a_version_is_measured_once_and_known_the_next_time() -> None:
    table = Table()
    assert "needles 2 of 2; 100.0 tokens/s" in table.do(Step.BASELINE)
    assert table.do(Step.BASELINE).endswith("as recorded")


def test_a_version_in_place_that_forgets_is_told_apart_before_anything_is_touched() -> None:
    table = Table(Service(forgets=True))
    with pytest.raises(StepFailed, match=r"the version in place .* already forgets: 2 of 2"):
        table.do(Step.BASELINE)
    assert table.world.text == OLD
    assert "needles 0 of 2" in Table(Service(forgets=True), recall_as_before=True).do(Step.BASELINE)


def test_a_turn_in_between_is_not_the_engines_speed() -> None:
    assert "100.0 tokens/s" in Table(Service(turn_in=3)).do(Step.BASELINE)
    with pytest.raises(StepFailed, match="others take its turn each time"):
        Table(Service(turn_in=99)).do(Step.BASELINE)


def test_the_switch_writes_the_file_and_refuses_one_that_somebody_else_changed() -> None:
    table = Table()
    table.do(Step.SWITCH)
    assert table.world.text == NEW
    table.do(Step.SWITCH)  # a second time after a death
    table.world.text = "engines: []\n"
    with pytest.raises(StepFailed, match="changed by somebody else"):
        table.do(Step.SWITCH, Way.BACK)


def test_a_stop_waits_for_requests_in_flight_and_gives_up_without_losing_one() -> None:
    table = Table(Service(busy=3))
    assert "requests have ended" in table.do(Step.STOP)
    assert table.service.calls == ["stop"] * 4
    stubborn = Table(Service(busy=10_000))
    with pytest.raises(StepFailed, match="could not be stopped in 30 s without losing requests"):
        stubborn.do(Step.STOP)
    assert stubborn.service.state == "awake"


def test_bytes_that_are_nobodys_after_the_stop_are_named_and_no_new_version_comes() -> None:
    table = Table()
    table.do(Step.SWITCH)
    table.do(Step.STOP)
    table.service.foreign_bytes = 3 * GIB
    with pytest.raises(StepFailed, match=r"GPU 0: 3\.00 GiB that are no engine's were left behind"):
        table.do(Step.VRAM)
    table.service.foreign_bytes = 0
    table.service.stop_row = {"result": "failed", "error": "still there after SIGKILL"}
    with pytest.raises(StepFailed, match="its stop ended as failed: still there"):
        table.do(Step.VRAM)


def test_a_start_ends_what_still_runs_as_the_other_version() -> None:
    table = Table(Service(runs="new", file="new", state="awake"))
    table.world.write(OLD)
    table.do(Step.START, Way.BACK)
    assert (table.service.runs, table.service.calls) == ("old", ["stop", "start"])


def test_a_failed_engine_is_released_on_its_way_back() -> None:
    table = Table(Service(runs="new", state="failed"))
    table.do(Step.START, Way.BACK)
    assert (table.service.runs, table.service.calls) == ("old", ["release", "start"])


def test_what_fails_while_nomad_is_away_says_nothing_about_the_version() -> None:
    table = Table(Service(busy=10_000))
    sleep = table.world.sleep

    def goes_away(seconds: float) -> None:
        sleep(seconds)
        table.world.away = "Nomad cannot be reached"

    table.world.sleep = goes_away  # type: ignore[method-assign]  # it goes away in the middle of the step
    with pytest.raises(Away, match=r"Nomad cannot be reached \(it could not be stopped"):
        table.do(Step.STOP)


def test_a_soak_stops_at_a_residue_that_grows() -> None:
    steady = Table(Service(residues=[GIB] * 9))
    assert steady.do(Step.SOAK) == "3 cycles; asleep it holds 1.00 GiB"
    growing = Table(Service(residues=[GIB, GIB, GIB, 2 * GIB]))
    with pytest.raises(StepFailed, match="in cycle 3"):
        growing.do(Step.SOAK)


def test_a_slower_version_fails_by_its_own_baseline() -> None:
    table = Table(Service(state="awake"))
    table.do(Step.BASELINE)
    table.service.tokens_per_s = [80.0]
    with pytest.raises(StepFailed, match=r"80\.0 tokens/s, and the version before made 100\.0"):
        table.do(Step.SPEED)


def test_gpus_are_held_while_files_are_exchanged_and_only_our_own_cordons_are_lifted() -> None:
    table = Table()
    table.do(Step.HOLD)
    assert table.service.cordons == {"g0": HELD.format(engine="a")}
    table.do(Step.LET_GO)
    assert table.service.cordons == {}
    table.service.cordons = {"g0": "a fan is being changed"}
    table.do(Step.LET_GO)
    assert table.service.cordons == {"g0": "a fan is being changed"}


def test_an_archive_is_restored_by_the_name_that_it_was_made_with() -> None:
    table = Table()
    table.do(Step.ARCHIVE)
    assert table.do(Step.INSTALL, Way.BACK) == "the environment is again that of kept"
