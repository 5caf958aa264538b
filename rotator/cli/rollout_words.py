"""A rollout in words: each step as it goes, and how it ended or where it stands."""

import time
from dataclasses import asdict
from typing import Any

import typer

from rotator.cli.options import print_json
from rotator.rollout.records import Rollout
from rotator.rollout.steps import End, Move, Result, Verdict, Way


def say(move: Move, result: Result, words: str) -> None:
    """One step, to stderr as it happens."""
    if result is Result.BEGUN and not words:
        return
    mark = "FAILED: " if result is Result.FAILED else ""
    typer.echo(f"{time.strftime('%H:%M:%S')} {move.engine}: {_way(move.way)}{move.step.value}: {mark}{words}", err=True)


def tell_end(mine: Rollout, end: End, as_json: bool) -> None:
    if as_json:
        print_json(_as_dict(mine))
    else:
        typer.echo("\n".join(_words(mine, end)))


def tell(found: Rollout | None, as_json: bool) -> None:
    """The newest rollout: what each step found, and how it ended or where it stands."""
    if as_json:
        print_json(_as_dict(found) if found else {})
    elif found is None:
        typer.echo("there was no rollout here yet")
    else:
        typer.echo("\n".join((*_log(found), *_standing(found))))


def _way(way: Way) -> str:
    return "" if way is Way.FORWARD else "back: "


def _log(found: Rollout) -> list[str]:
    lines = []
    for e in found.log:
        if e.result is not Result.BEGUN:
            at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(e.at_wall_s))
            said = f"{e.result.value}{': ' if e.words else ''}{e.words}"
            lines.append(f"{at} {e.engine}: {_way(e.way)}{e.step.value}: {said}")
    return lines


def _standing(found: Rollout) -> list[str]:
    now = found.next
    if isinstance(now, End):
        return _words(found, now)
    way = "" if now.way is Way.FORWARD else "on its way back, "
    waits = [f"it waits: {found.waiting}"] if found.waiting else []
    return [f"rollout {found.id} is under way: {now.engine}, {way}at {now.step.value}", *waits]


def _words(mine: Rollout, end: End) -> list[str]:
    new = f"{', '.join(end.new)} {'run' if len(end.new) > 1 else 'runs'} the new version" if end.new else "none is new"
    if end.verdict is Verdict.DONE:
        return [f"rollout {mine.id} is done: {new}"]
    what = "was aborted" if end.aborted else f"failed at {end.step}: {end.words}"
    became = {
        Verdict.UNTOUCHED: f"{end.engine} was not touched",
        Verdict.REVERTED: f"{end.engine} runs its former version again",
        Verdict.STUCK: f"{end.engine} could not be taken back ({end.back_failed}): look at it, then --resume",
    }[end.verdict]
    left = [name for name in end.left if name != end.engine]
    untouched = f"; {', '.join(left)} were not begun" if left else ""
    return [f"rollout {mine.id}: {end.engine} {what}", became, new + untouched]


def _as_dict(mine: Rollout) -> dict[str, Any]:
    now = mine.next
    shown: dict[str, Any] = {"id": mine.id, "engines": [p.engine for p in mine.parts], "waiting": mine.waiting}
    shown["end" if isinstance(now, End) else "next"] = asdict(now)
    return {**shown, "log": [asdict(e) for e in mine.log]}
