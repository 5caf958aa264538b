"""``rotator jobs rollout``: a new bundle, image or recipe through the fleet, one engine at a time."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import typer

from rotator.cli import rollout_options as given
from rotator.cli.env import ARCHIVES_DEFAULT
from rotator.cli.errors import FAILED, OK, PROBLEM, REFUSED, UNREACHABLE, fail
from rotator.cli.local import CONFIG_DEFAULT, ConfigPath
from rotator.cli.options import URL_DEFAULT, AsJson, Key, Url, Yes, client
from rotator.cli.rollout_begin import NOTHING, prepared
from rotator.cli.rollout_environments import LocalEnvironments
from rotator.cli.rollout_service import RestService
from rotator.cli.rollout_words import say, tell, tell_end
from rotator.cli.rollout_world import FleetFile, LedgerBaselines, SystemClock
from rotator.rollout.actions import Actions
from rotator.rollout.ports import Away, RolloutError
from rotator.rollout.records import Records, Rollout, Settings
from rotator.rollout.run import drive, note_wish
from rotator.rollout.steps import End, Move, Result, Verdict, Way

_CODES = {Verdict.DONE: OK, Verdict.UNTOUCHED: FAILED, Verdict.REVERTED: FAILED, Verdict.STUCK: FAILED}
_USUAL = Settings()


def rollout(
    context: typer.Context,
    engines: given.Engines = None,
    to: given.To = None,
    site_to: given.SiteTo = None,
    install: given.Install = None,
    environment: given.Environment = None,
    archives: given.Archives = ARCHIVES_DEFAULT,
    resume: given.Resume = False,
    abort: given.Abort = False,
    status: given.Status = False,
    dry_run: given.DryRun = False,
    recall: given.Recall = "8,16",
    recall_words: given.RecallWords = _USUAL.recall_words,
    recall_as_before: given.RecallAsBefore = False,
    cycles: given.Cycles = _USUAL.cycles,
    samples: given.Samples = _USUAL.speed_samples,
    tolerance: given.Tolerance = _USUAL.speed_tolerance,
    drain_deadline_s: given.Drain = _USUAL.drain_deadline_s,
    away_s: given.AwayFor = _USUAL.away_max_s,
    config: ConfigPath = CONFIG_DEFAULT,
    yes: Yes = False,
    url: Url = URL_DEFAULT,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Take a new overlay bundle, image, recipe or environment through the fleet, one engine at a time.

    Each engine: baseline, drain, stop, VRAM back, start, canary, recall, soak, speed. The first failure takes that
    engine back to its former version and ends the rollout. Run it where the service runs; it may be killed and resumed.
    """
    goal = given.goal(to, site_to, install, environment, resume + abort + status)
    settings = Settings(
        recall=given.sizes(recall),
        recall_words=recall_words,
        recall_as_before=recall_as_before,
        cycles=cycles,
        speed_samples=samples,
        speed_tolerance=tolerance,
        drain_deadline_s=drain_deadline_s,
        away_max_s=away_s,
        environment=goal.environment,
        install=goal.install,
        archives=str(archives.absolute()),
    )
    with _told():
        desk = _Desk(FleetFile(config), RestService(client(context, url, key)), as_json)
        if status:
            tell(desk.records.load(), as_json)
        elif goal.is_given:
            desk.begin(goal, engines or [], settings, dry_run=dry_run, yes=yes)
        else:
            desk.go_on(abort=abort)


@contextmanager
def _told() -> Iterator[None]:
    """Errors of a rollout that is under way end the command with a line and a code."""
    try:
        yield
    except Away as e:
        fail(UNREACHABLE, str(e), "the rollout stands still here: --resume it when that is mended")
    except RolloutError as e:
        fail(PROBLEM, str(e))


class _Desk:
    """One fleet's rollouts: begun, gone on with, carried out. Raises RolloutError."""

    def __init__(self, file: FleetFile, service: RestService, as_json: bool) -> None:
        self._file, self._service, self._as_json = file, service, as_json
        self._fleet = file.parsed(file.read())
        self.records = Records(self._fleet.state_dir / "rollout")

    def begin(self, goal: given.Goal, names: Sequence[str], settings: Settings, *, dry_run: bool, yes: bool) -> None:
        with self.records.held():
            found = self.records.load()
            if found is not None and isinstance(found.next, Move):
                fail(REFUSED, f"rollout {found.id} is under way: --resume it, or --abort it")
            mine = prepared(self._file, self._service, goal, names, settings)
            if dry_run:
                return
            if not yes and not typer.confirm("begin?", err=True):
                fail(REFUSED, NOTHING)
            self.records.begin(mine)
            self._drive(mine)

    def go_on(self, *, abort: bool) -> None:
        with self.records.held():
            mine = _known(self.records.load(), resume=not abort)
            _wish(mine, self.records, abort=abort)
            self._drive(mine)

    def _drive(self, mine: Rollout) -> None:
        baselines, clock = LedgerBaselines(self._fleet), SystemClock()
        actions = Actions(self._service, self._file, baselines, LocalEnvironments(mine.settings, mine.id), clock)
        try:
            end = drive(mine, self.records, actions, clock, say)
        finally:
            baselines.close()
        tell_end(mine, end, self._as_json)
        raise typer.Exit(_CODES[end.verdict])


def _known(found: Rollout | None, *, resume: bool) -> Rollout:
    if found is None:
        fail(PROBLEM, "there is no rollout here: begin one with --to")
    ended = found.next
    if isinstance(ended, End) and not (resume and ended.verdict is Verdict.STUCK):
        fail(PROBLEM, f"rollout {found.id} has ended ({ended.verdict.value}): begin another with --to")
    return found


def _wish(mine: Rollout, records: Records, *, abort: bool) -> None:
    if abort and isinstance(mine.next, Move) and mine.next.way is Way.FORWARD:
        note_wish(mine, Result.ABORT, SystemClock(), "an operator ended it")
    elif not abort and isinstance(mine.next, End):
        note_wish(mine, Result.AGAIN, SystemClock(), "an operator tries the way back again")
    records.keep(mine)
