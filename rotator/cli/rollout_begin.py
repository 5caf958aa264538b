"""What a rollout is to change, looked at from every side before it begins. Changes nothing."""

import secrets
import time
from collections.abc import Sequence
from pathlib import Path

import typer

from rotator.cli import rollout_check as check
from rotator.cli.errors import PROBLEM, UNREACHABLE, USAGE, fail
from rotator.cli.rollout_options import Goal
from rotator.cli.rollout_service import RestService
from rotator.cli.rollout_world import FleetFile, engine_of, users_of
from rotator.config import FleetConfig
from rotator.rollout.change import with_site
from rotator.rollout.ports import Away, RolloutError
from rotator.rollout.records import Rollout, Settings
from rotator.rollout.steps import Part

NOTHING = "nothing was begun"

Changes = dict[str, tuple[str, ...]]


def prepared(file: FleetFile, service: RestService, goal: Goal, names: Sequence[str], settings: Settings) -> Rollout:
    """A rollout that may begin, told in lines. Ends the command where it may not."""
    try:
        return _prepared(file, service, _target(file, goal), names, settings)
    except Away as e:
        fail(UNREACHABLE, str(e), NOTHING)
    except RolloutError as e:
        fail(PROBLEM, str(e), NOTHING)


def _prepared(file: FleetFile, service: RestService, target: str, names: Sequence[str], settings: Settings) -> Rollout:
    present = file.read()
    old, new = file.parsed(present), file.parsed(target)
    changes, problems = _in_place(old, settings, names) if settings.install else check.chosen(old, new, names)
    nomad: list[str] = []
    if not problems:
        service.look()
        nomad, problems = check.all_problems(file, service, old, new, tuple(changes))
    if problems:
        fail(PROBLEM, *problems, NOTHING)
    _tell(changes, nomad)
    parts = tuple(Part(name, bool(settings.install)) for name in changes)
    now_s = time.time()
    id = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime(now_s))}-{secrets.token_hex(2)}"
    return Rollout(id, str(file.path), present, target, parts, settings, now_s)


def _tell(changes: Changes, nomad: Sequence[str]) -> None:
    for name, fields in changes.items():
        typer.echo(f"{name}: {', '.join(fields)} {'changes' if len(fields) == 1 else 'change'}", err=True)
    for line in nomad:
        typer.echo(f"  {line}", err=True)


def _target(file: FleetFile, goal: Goal) -> str:
    """The text of the fleet file as it is to be."""
    if goal.to is not None:
        return _of_file(file, goal.to)
    if goal.site_to is not None:
        return _of_site(file, goal.site_to)
    return file.read()


def _of_file(file: FleetFile, to: Path) -> str:
    if not to.is_file():
        fail(USAGE, f"--to: there is no file {to}")
    if to.resolve().parent != file.path.parent:
        fail(USAGE, f"{to}: lay it beside {file.path}: paths in it are relative to its folder")
    target = FleetFile(to)
    text = target.read()
    target.parsed(text)  # its problems are told by its own name
    return text


def _of_site(file: FleetFile, site: Path) -> str:
    present = file.read()
    jobs = {e.name: e.job for e in file.parsed(present).engines if e.job is not None and e.job.site is not None}
    if not jobs:
        fail(USAGE, "--site-to: no engine's job comes from a site file: give a fleet file with --to")
    if not site.is_file():
        fail(USAGE, f"--site-to: there is no file {site}")
    return with_site(present, {name: str(site.resolve()) for name in jobs})


def _in_place(old: FleetConfig, settings: Settings, names: Sequence[str]) -> tuple[Changes, list[str]]:
    mine = list(names) or [e.name for e in users_of(old, Path(settings.environment))]
    for name in mine:
        engine_of(old, name)
    problems = list(check.environment_problems(old, settings, mine))
    if not mine:
        problems = [f"{settings.environment}: no engine's program lies in it: name its prefix, as /opt/vllm"]
    return dict.fromkeys(mine, (f"the environment {settings.environment}",)), problems
