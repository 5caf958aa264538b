"""``rotator jobs rollout``: a new bundle, image or recipe through the fleet, one engine at a time."""

import secrets
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from rotator.cli import rollout_check as check
from rotator.cli.env import ARCHIVES_DEFAULT
from rotator.cli.errors import FAILED, OK, PROBLEM, REFUSED, UNREACHABLE, USAGE, fail
from rotator.cli.local import CONFIG_DEFAULT, ConfigPath
from rotator.cli.options import URL_DEFAULT, AsJson, Key, Url, Yes, client, print_json
from rotator.cli.rollout_service import RestService
from rotator.cli.rollout_world import FleetFile, LedgerBaselines, LocalEnvironments, SystemClock, engine_of, users_of
from rotator.config import FleetConfig
from rotator.rollout.actions import Actions
from rotator.rollout.change import with_site
from rotator.rollout.ports import Away, RolloutError
from rotator.rollout.records import Records, Rollout, Settings
from rotator.rollout.run import drive, note_wish
from rotator.rollout.steps import End, Move, Part, Result, Verdict, Way

_CODES = {Verdict.DONE: OK, Verdict.UNTOUCHED: FAILED, Verdict.REVERTED: FAILED, Verdict.STUCK: FAILED}
_GIVEN = Settings()


def rollout(
    context: typer.Context,
    engines: Annotated[
        list[str] | None, typer.Argument(help="only these, in this order; all that differ if none")
    ] = None,
    to: Annotated[Path | None, typer.Option("--to", help="the fleet file as it is to be")] = None,
    site_to: Annotated[
        Path | None, typer.Option("--site-to", help="the site file that jobs are to come from, instead of a fleet file")
    ] = None,
    install: Annotated[
        str, typer.Option("--install", help="command that changes --environment in place, run while its engine is down")
    ] = "",
    environment: Annotated[
        Path | None,
        typer.Option("--environment", help="the Python environment that --install changes; archived before"),
    ] = None,
    archives: Annotated[Path, typer.Option("--archives", help="folder of environments' archives")] = ARCHIVES_DEFAULT,
    resume: Annotated[bool, typer.Option("--resume", help="go on where the last one stopped")] = False,
    abort: Annotated[bool, typer.Option("--abort", help="take back the engine that is under way, and end it")] = False,
    status: Annotated[bool, typer.Option("--status", help="show the last one, and change nothing")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check everything, show what would be done")] = False,
    recall: Annotated[str, typer.Option("--recall", help="how many long prompts at once, batch after batch")] = "8,16",
    recall_words: Annotated[
        int, typer.Option("--recall-words", min=20, max=1_000_000, help="length of each")
    ] = _GIVEN.recall_words,
    recall_as_before: Annotated[
        bool, typer.Option("--recall-as-before", help="a version may miss as many needles as the one in place does")
    ] = False,
    cycles: Annotated[int, typer.Option("--cycles", min=0, max=10_000, help="sleeps and wakes")] = _GIVEN.cycles,
    samples: Annotated[
        int, typer.Option("--samples", min=1, max=1000, help="answers whose speed is measured")
    ] = _GIVEN.speed_samples,
    tolerance: Annotated[
        float, typer.Option("--tolerance", min=0, max=10, help="how much slower it may be, as a share")
    ] = _GIVEN.speed_tolerance,
    drain_deadline_s: Annotated[
        float, typer.Option("--drain-deadline", min=1, max=86400, help="seconds for requests in flight to end")
    ] = _GIVEN.drain_deadline_s,
    away_s: Annotated[
        float, typer.Option("--away", min=0, max=86400, help="seconds to wait for a service or Nomad that is away")
    ] = _GIVEN.away_max_s,
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
    if sum((resume, abort, status, to is not None or site_to is not None or bool(install))) != 1:
        fail(USAGE, "give one of --to, --site-to, --install, --resume, --abort and --status")
    file = FleetFile(config)
    service = RestService(client(context, url, key))
    try:
        present = file.parsed(file.read())
        records = Records(present.state_dir / "rollout")
        if status:
            _show(records.load(), as_json)
            return
        settings = Settings(
            recall=_sizes(recall),
            recall_words=recall_words,
            recall_as_before=recall_as_before,
            cycles=cycles,
            speed_samples=samples,
            speed_tolerance=tolerance,
            drain_deadline_s=drain_deadline_s,
            away_max_s=away_s,
            environment=str(environment.absolute()) if environment else "",
            install=tuple(shlex.split(install)),
            archives=str(archives.absolute()),
        )
        with records.held():
            found = records.load()
            if resume or abort:
                mine = _known(found, resume=resume)
                _wish(mine, records, abort=abort)
            else:
                if found is not None and isinstance(found.next, Move):
                    fail(REFUSED, f"rollout {found.id} is under way: --resume it, or --abort it")
                target = _target(file, to, site_to)
                mine = _prepared(file, service, target, engines or [], settings)
                if dry_run:
                    return
                if not yes and not typer.confirm("begin?", err=True):
                    fail(REFUSED, "nothing was begun")
                records.begin(mine)
            _drive(mine, records, file, service, present, as_json)
    except Away as e:
        fail(UNREACHABLE, f"{e}", "the rollout stands still here: --resume it when that is mended")
    except RolloutError as e:
        fail(PROBLEM, str(e))


def _sizes(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        sizes = (0,)
    if any(not 1 <= size <= 256 for size in sizes):
        fail(USAGE, f"--recall: '{text}' is no list of numbers from 1 to 256, as 8,16")
    return sizes


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


def _target(file: FleetFile, to: Path | None, site_to: Path | None) -> str:
    """The text of the fleet file as it is to be."""
    present = file.read()
    if to is not None:
        if to.resolve().parent != file.path.parent:
            fail(USAGE, f"{to}: lay it beside {file.path}: paths in it are relative to its folder")
        return FleetFile(to).read()
    if site_to is None:
        return present
    jobs = {e.name: e.job for e in file.parsed(present).engines if e.job is not None and e.job.site is not None}
    if not jobs:
        fail(USAGE, "--site-to: no engine's job comes from a site file")
    if not site_to.is_file():
        fail(USAGE, f"--site-to: there is no file {site_to}")
    return with_site(present, {name: str(site_to.resolve()) for name in jobs})


def _prepared(file: FleetFile, service: RestService, target: str, names: Sequence[str], settings: Settings) -> Rollout:
    """Everything looked at and told; a rollout that may begin. Ends the command where it may not."""
    present = file.read()
    old, new = file.parsed(present), file.parsed(target)
    if settings.install:
        changes, problems = _in_place(old, settings, names)
    else:
        changes, problems = check.chosen(old, new, names)
    nomad: list[str] = []
    if not problems:
        service.look()
        nomad, problems = check.all_problems(file, service, old, new, tuple(changes))
    if problems:
        fail(PROBLEM, *problems, "nothing was begun")
    for name, fields in changes.items():
        typer.echo(f"{name}: {', '.join(fields)} {'changes' if len(fields) == 1 else 'change'}", err=True)
    for line in nomad:
        typer.echo(f"  {line}", err=True)
    parts = tuple(Part(name, bool(settings.install)) for name in changes)
    now_s = time.time()
    id = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime(now_s))}-{secrets.token_hex(2)}"
    return Rollout(id, str(file.path), present, target, parts, settings, now_s)


def _in_place(
    old: FleetConfig, settings: Settings, names: Sequence[str]
) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    if not settings.environment:
        fail(USAGE, "--install changes an environment: name it with --environment")
    mine = list(names) or [e.name for e in users_of(old, Path(settings.environment))]
    for name in mine:
        engine_of(old, name)
    problems = list(check.environment_problems(old, settings, mine))
    if not mine:
        problems = [f"{settings.environment}: no engine's program lies in it"]
    return dict.fromkeys(mine, (f"the environment {settings.environment}",)), problems


def _drive(
    mine: Rollout, records: Records, file: FleetFile, service: RestService, fleet: FleetConfig, as_json: bool
) -> None:
    baselines = LedgerBaselines(fleet)
    actions = Actions(service, file, baselines, LocalEnvironments(mine.settings, mine.id), SystemClock())
    try:
        end = drive(mine, records, actions, SystemClock(), _say)
    finally:
        baselines.close()
    if as_json:
        print_json(_as_dict(mine))
    else:
        typer.echo("\n".join(_words(mine, end)))
    raise typer.Exit(_CODES[end.verdict])


def _say(move: Move, result: Result, words: str) -> None:
    way = "" if move.way is Way.FORWARD else "back: "
    if result is Result.BEGUN and not words:
        return
    typer.echo(f"{time.strftime('%H:%M:%S')} {move.engine}: {way}{move.step.value}: {_mark(result)}{words}", err=True)


def _mark(result: Result) -> str:
    return "FAILED: " if result is Result.FAILED else ""


def _words(mine: Rollout, end: End) -> list[str]:
    new = f"{', '.join(end.new)} {'run' if len(end.new) > 1 else 'runs'} the new version" if end.new else "none is new"
    if end.verdict is Verdict.DONE:
        return [f"rollout {mine.id} is done: {new}"]
    what = "was aborted" if end.aborted else f"failed at {end.step}: {end.words}"
    lines = [f"rollout {mine.id}: {end.engine} {what}"]
    lines.append(
        {
            Verdict.UNTOUCHED: f"{end.engine} was not touched",
            Verdict.REVERTED: f"{end.engine} runs its former version again",
            Verdict.STUCK: f"{end.engine} could not be taken back ({end.back_failed}): look at it, then --resume",
        }[end.verdict]
    )
    left = [name for name in end.left if name != end.engine]
    return [*lines, new + (f"; {', '.join(left)} were not begun" if left else "")]


def _show(found: Rollout | None, as_json: bool) -> None:
    if as_json:
        print_json(_as_dict(found) if found else {})
        return
    if found is None:
        typer.echo("there was no rollout here yet")
        return
    for e in found.log:
        if e.result is not Result.BEGUN:
            at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(e.at_wall_s))
            way = "" if e.way is Way.FORWARD else "back: "
            typer.echo(f"{at} {e.engine}: {way}{e.step.value}: {e.result.value}{': ' if e.words else ''}{e.words}")
    now = found.next
    if isinstance(now, End):
        typer.echo("\n".join(_words(found, now)))
        return
    way = "" if now.way is Way.FORWARD else "on its way back, "
    typer.echo(f"rollout {found.id} is under way: {now.engine}, {way}at {now.step.value}")
    if found.waiting:
        typer.echo(f"it waits: {found.waiting}")


def _as_dict(mine: Rollout) -> dict[str, Any]:
    now = mine.next
    shown: dict[str, Any] = {"id": mine.id, "engines": [p.engine for p in mine.parts], "waiting": mine.waiting}
    shown["end" if isinstance(now, End) else "next"] = asdict(now)
    return {**shown, "log": [asdict(e) for e in mine.log]}
