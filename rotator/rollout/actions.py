"""What each step does, over the ports. Every step may be begun again after it was done in part: it looks first."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rotator.rollout import judge, needles
from rotator.rollout.change import compose
from rotator.rollout.judge import GIB, Speed, Version
from rotator.rollout.ports import Away, Baselines, Clock, Environments, Fleet, Refused, Service, StepFailed
from rotator.rollout.records import Rollout
from rotator.rollout.steps import Move, Step, Way, facts_of, switched

AGAIN_S = 0.5
CLEAN_TRIES = 4  # of a measurement that somebody's turn came between
FAILED_STATES = ("failed", "quarantined")
HELD = "rollout of {engine}: its environment is being exchanged"
FOREIGN_SLACK_GIB = 0.25  # what a driver itself takes and gives while nobody looks

Found = tuple[str, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Actions:
    """Implements run.CarryOut."""

    service: Service
    fleet: Fleet
    baselines: Baselines
    environments: Environments
    clock: Clock

    def __call__(self, rollout: Rollout, move: Move) -> Found:
        if away := self.fleet.nomad_away(move.engine):
            raise Away(away)
        self.service.look()
        do = _STEPS[move.step]
        try:
            return do(self, rollout, move)
        except Refused as e:
            raise StepFailed(str(e)) from None
        except StepFailed as e:
            # What fails while Nomad is away says nothing about the new version.
            if away := self.fleet.nomad_away(move.engine):
                raise Away(f"{away} ({e})") from None
            raise

    # -- before ------------------------------------------------------------------------------------------------------

    def baseline(self, rollout: Rollout, move: Move) -> Found:
        engine, settings = move.engine, rollout.settings
        self._serves(rollout, engine)
        self._check_is(rollout, engine, rollout.present)
        version = self._version(rollout.present, engine)
        wanted = {"recall_words": settings.recall_words, "speed_tokens": settings.speed_tokens}
        known = self.baselines.get(engine, version.key)
        if known is not None and _covers(known, settings.recall, wanted):
            return f"{version.words}: as recorded", {**known, "version": version.key}
        facts = {**wanted, **self._recall(rollout, engine), **self._speed(rollout, engine)}
        if (why := judge.forgets([], facts["recall"], as_before=False)) and not settings.recall_as_before:
            said = f"the version in place ({version.words}) already forgets: {why}; with --recall-as-before it may"
            raise StepFailed(said, facts)
        self.baselines.put(engine, version, facts)
        return f"{version.words}: {_told(facts)}", {**facts, "version": version.key}

    def archive(self, rollout: Rollout, move: Move) -> Found:
        made = self.environments.archive(move.engine)
        return f"the environment is archived as {made['name']}", made

    # -- exchange ----------------------------------------------------------------------------------------------------

    def hold(self, rollout: Rollout, move: Move) -> Found:
        gpus = list(self.service.engine(move.engine)["gpus"])
        for gpu in gpus:
            self.service.cordon(gpu, HELD.format(engine=move.engine))
        return "nothing starts or wakes on its GPUs", {"gpus": gpus}

    def let_go(self, rollout: Rollout, move: Move) -> Found:
        for gpu in self.service.gpus():
            if gpu["reason"] == HELD.format(engine=move.engine):
                self.service.cordon(str(gpu["id"]), None)
        return "its GPUs are free again", {}

    def switch(self, rollout: Rollout, move: Move) -> Found:
        """The file first, then the service: whichever dies in between, the next start is by the file."""
        there = switched(rollout.parts, rollout.log)
        before = {True: there - {move.engine}, False: there | {move.engine}}[move.way is Way.FORWARD]
        after = {True: there | {move.engine}, False: there - {move.engine}}[move.way is Way.FORWARD]
        texts = [compose(rollout.present, rollout.target, names) for names in (before, after)]
        if self.fleet.read() not in texts:
            raise StepFailed(f"{rollout.fleet_file} was changed by somebody else meanwhile: put it back or abort")
        foreign = {g["id"]: g["foreign_bytes"] for g in self.service.gpus()}
        self.fleet.write(texts[1])
        lines = self.service.reload()
        return "; ".join(lines) or "the service has the file already", {"changes": list(lines), "foreign": foreign}

    def stop(self, rollout: Rollout, move: Move) -> Found:
        engine, deadline_s = move.engine, rollout.settings.drain_deadline_s
        give_up_at_s = self.clock.now_s() + deadline_s
        tries = 0
        while True:
            state = self.service.engine(engine)["state"]
            if state in ("stopped", *FAILED_STATES):
                return f"it is {state}", {"tries": tries}
            tries += 1
            try:
                self.service.stop(engine, deadline_s=max(1.0, give_up_at_s - self.clock.now_s()))
                return "its requests have ended, and it with them", {"tries": tries}
            except Refused as e:
                view = self.service.engine(engine)
                if view["state"] in FAILED_STATES:
                    raise StepFailed(f"it did not stop well: {view['reason']}") from None
                if self.clock.now_s() >= give_up_at_s:
                    said = f"it could not be stopped in {deadline_s:.0f} s without losing requests: {e}"
                    raise StepFailed(said, {"in_flight": view["in_flight"], "tries": tries}) from None
                self.clock.sleep(AGAIN_S)

    def vram(self, rollout: Rollout, move: Move) -> Found:
        """The service counts an engine as stopped only when NVML told that its bytes are back. Here that is looked up,
        and that nobody's bytes have come in their place."""
        engine = move.engine
        foreign = facts_of(rollout.log, engine, Step.SWITCH, move.way).get("foreign", {})
        give_up_at_s = self.clock.now_s() + rollout.settings.vram_deadline_s
        while True:
            view, mine = self.service.engine(engine), []
            gpus = [g for g in self.service.gpus() if g["id"] in view["gpus"]]
            for gpu in gpus:
                grown = gpu["foreign_bytes"] - foreign.get(gpu["id"], gpu["foreign_bytes"])
                if gpu["used_bytes"] is None:
                    mine.append(f"GPU {gpu['index']} cannot be read: {gpu['reason']}")
                elif grown > FOREIGN_SLACK_GIB * GIB:
                    mine.append(f"GPU {gpu['index']}: {grown / GIB:.2f} GiB that are no engine's were left behind")
            row = self.service.last_stop(engine)
            if row is not None and row["result"] not in ("ok", "open"):
                mine.append(f"its stop ended as {row['result']}: {row['error']}")
            facts = {"used_bytes": {g["id"]: g["used_bytes"] for g in gpus}, "stop": (row or {}).get("result")}
            if not mine:
                return "its bytes are back on every GPU", facts
            if self.clock.now_s() >= give_up_at_s:
                raise StepFailed("; ".join(mine), facts)
            self.clock.sleep(AGAIN_S)

    def install(self, rollout: Rollout, move: Move) -> Found:
        if move.way is Way.FORWARD:
            return "the new environment is in place", self.environments.install(move.engine)
        name = str(facts_of(rollout.log, move.engine, Step.ARCHIVE)["name"])
        return f"the environment is again that of {name}", self.environments.restore(move.engine, name)

    def start(self, rollout: Rollout, move: Move) -> Found:
        """It runs, and as the version that is wanted: what runs otherwise is stopped first."""
        engine = move.engine
        wanted = self._wanted(rollout, move)
        state = self.service.engine(engine)["state"]
        if state in FAILED_STATES:  # of the other version, or of a start while Nomad was away
            self.service.release(engine)
        elif state != "stopped" and self._runs(engine) != wanted.spec_hash:
            self.stop(rollout, move)
        deadline_s = self.fleet.start_deadline_s(engine) + rollout.settings.step_deadline_s
        try:
            self.service.start(engine, deadline_s=deadline_s)
        except Refused as e:
            view = self.service.engine(engine)
            if view["state"] != "awake":
                said = view["reason"] if view["state"] in FAILED_STATES else str(e)
                raise StepFailed(f"it does not start: {said}", {"state": view["state"]}) from None
        if (runs := self._runs(engine)) != wanted.spec_hash:
            raise StepFailed(f"what was started is {runs}, and {wanted.spec_hash} was wanted")
        view = self.service.engine(engine)
        return f"it runs with vLLM {view['version']}", {"version": view["version"], "pids": list(view["pids"])}

    # -- trying ------------------------------------------------------------------------------------------------------

    def canary(self, rollout: Rollout, move: Move) -> Found:
        self._serves(rollout, move.engine)
        view = self.service.engine(move.engine)
        if view["canary"] == "failed":
            raise StepFailed(f"its canary failed: {view['reason']}")
        self._check_is(rollout, move.engine, _text(rollout, move))
        (answer,) = self.service.ask(
            move.engine, ["Say in a few words what a lighthouse is for."], tokens=64, deadline_s=_patience(rollout)
        )
        if not answer.strip().strip("!"):
            raise StepFailed(f"it answers nothing that could be read: {answer[:40]!r}")
        return f"canary {view['canary']}, and it answers", {"canary": view["canary"], "answer": answer[:80]}

    def recall(self, rollout: Rollout, move: Move) -> Found:
        self._serves(rollout, move.engine)
        facts = self._recall(rollout, move.engine)
        before = facts_of(rollout.log, move.engine, Step.BASELINE)["recall"]
        if why := judge.forgets(before, facts["recall"], as_before=rollout.settings.recall_as_before):
            raise StepFailed(why, facts)
        return _told(facts), facts

    def soak(self, rollout: Rollout, move: Move) -> Found:
        engine, settings = move.engine, rollout.settings
        residues: list[list[int]] = []
        for cycle in range(1, settings.cycles + 1):
            try:
                self._insist(rollout, engine, self.service.sleep, "asleep")
                residues.append(list(self.service.engine(engine)["held_bytes"]))
                self._insist(rollout, engine, self.service.wake, "awake")
                if self.service.engine(engine)["canary"] == "failed":
                    raise StepFailed("its canary failed after the wake")
            except StepFailed as e:
                raise StepFailed(f"cycle {cycle} of {settings.cycles}: {e}", {"residues": residues}) from None
            if why := judge.grows(residues, settings.residue_tolerance_gib):
                raise StepFailed(why, {"residues": residues})
        shown = ", ".join(f"{size / GIB:.2f}" for size in residues[-1]) if residues else "none"
        return f"{settings.cycles} cycles; asleep it holds {shown} GiB", {"residues": residues[-1:]}

    def speed(self, rollout: Rollout, move: Move) -> Found:
        engine = move.engine
        self._serves(rollout, engine)
        facts = self._speed(rollout, engine)
        old = Speed.known(facts_of(rollout.log, engine, Step.BASELINE)["speed"])
        if why := judge.slower(old, Speed.known(facts["speed"]), rollout.settings.speed_tolerance):
            raise StepFailed(why, facts)
        version = self._version(rollout.target, engine)
        recalled = facts_of(rollout.log, engine, Step.RECALL)
        settings = {"recall_words": rollout.settings.recall_words, "speed_tokens": rollout.settings.speed_tokens}
        self.baselines.put(engine, version, {**settings, **recalled, **facts})
        return _told(facts), {**facts, "version": version.key}

    def _recall(self, rollout: Rollout, engine: str) -> dict[str, Any]:
        settings, found = rollout.settings, []
        for count in settings.recall:
            asked = needles.batch(count, settings.recall_words)
            prompts = [needle.prompt for needle in asked]
            answers = self.service.ask(engine, prompts, tokens=settings.recall_tokens, deadline_s=_patience(rollout))
            found.append(needles.judge(asked, answers).as_dict())
        return {"recall": found}

    def _speed(self, rollout: Rollout, engine: str) -> dict[str, Any]:
        """A sample counts only if the engine was awake all along: a turn in between is not its speed."""
        settings, samples = rollout.settings, list[tuple[float, float]]()
        for _ in range(settings.speed_samples * CLEAN_TRIES):
            if len(samples) == settings.speed_samples:
                break
            before = self._turns(engine)
            sample = self.service.pace(engine, tokens=settings.speed_tokens, deadline_s=_patience(rollout))
            if self._turns(engine) == before:
                samples.append(sample)
        if not samples:
            raise StepFailed(
                "its speed cannot be measured: others take its turn each time; try when there is less to do"
            )
        measured = Speed.of(samples)
        return {
            "speed": {"tokens_per_s": measured.tokens_per_s, "ttft_s": measured.ttft_s, "samples": measured.samples}
        }

    def _turns(self, engine: str) -> tuple[int, int]:
        view = self.service.engine(engine)
        return view["wakes"], view["sleeps"]

    def _serves(self, rollout: Rollout, engine: str) -> None:
        self._insist(rollout, engine, self.service.wake, "awake")

    def _insist(self, rollout: Rollout, engine: str, command: Callable[..., None], aim: str) -> None:
        """Others' turns and requests in flight may come in between: tried until its deadline, or until it failed."""
        give_up_at_s = self.clock.now_s() + rollout.settings.step_deadline_s
        while True:
            try:
                command(engine, deadline_s=rollout.settings.step_deadline_s)
                return
            except Refused as e:
                view = self.service.engine(engine)
                if view["state"] in FAILED_STATES:
                    raise StepFailed(f"it is {view['state']}: {view['reason']}") from None
                if self.clock.now_s() >= give_up_at_s:
                    raise StepFailed(f"it is not {aim}: {e}") from None
                self.clock.sleep(AGAIN_S)

    # -- versions ----------------------------------------------------------------------------------------------------

    def _version(self, text: str, engine: str) -> Version:
        return self.fleet.version(text, engine, str(self.service.engine(engine)["version"]))

    def _wanted(self, rollout: Rollout, move: Move) -> Version:
        return self._version(_text(rollout, move), move.engine)

    def _runs(self, engine: str) -> str:
        return self.service.started_as(engine)

    def _check_is(self, rollout: Rollout, engine: str, text: str) -> None:
        wanted = self._version(text, engine)
        if (runs := self._runs(engine)) != wanted.spec_hash:
            raise StepFailed(f"it was started as {runs}, and the file says {wanted.spec_hash}: restart it first")


def _text(rollout: Rollout, move: Move) -> str:
    return rollout.target if move.way is Way.FORWARD else rollout.present


def _patience(rollout: Rollout) -> float:
    return rollout.settings.step_deadline_s


def _covers(known: Mapping[str, Any], sizes: tuple[int, ...], wanted: Mapping[str, Any]) -> bool:
    """Whether a baseline was measured the same way. One that forgot is measured again: it may have been chance."""
    recalled = {int(one["asked"]): one for one in known.get("recall", ())}
    same = all(known.get(key) == value for key, value in wanted.items())
    return same and "speed" in known and all(size in recalled and not recalled[size]["missed"] for size in sizes)


def _told(facts: Mapping[str, Any]) -> str:
    recalled = [f"{r['asked'] - len(r['missed'])} of {r['asked']}" for r in facts.get("recall", ())]
    said = [f"needles {' and '.join(recalled)}"] if recalled else []
    if speed := facts.get("speed"):
        said.append(f"{speed['tokens_per_s']:.1f} tokens/s, {speed['ttft_s']:.3f} s to the first")
    return "; ".join(said)


_STEPS: Mapping[Step, Callable[[Actions, Rollout, Move], Found]] = {
    Step.BASELINE: Actions.baseline,
    Step.ARCHIVE: Actions.archive,
    Step.HOLD: Actions.hold,
    Step.SWITCH: Actions.switch,
    Step.STOP: Actions.stop,
    Step.VRAM: Actions.vram,
    Step.INSTALL: Actions.install,
    Step.LET_GO: Actions.let_go,
    Step.START: Actions.start,
    Step.CANARY: Actions.canary,
    Step.RECALL: Actions.recall,
    Step.SOAK: Actions.soak,
    Step.SPEED: Actions.speed,
}
