"""``rotator replay``: a recorded journal through today's policy."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Group
from rich.text import Text

from rotator import config
from rotator.adapters.ledger_reader import Decided, LedgerReader
from rotator.check.planned import ledger_url
from rotator.cli import render
from rotator.cli.errors import PROBLEM, USAGE, fail
from rotator.cli.local import CONFIG_DEFAULT, ConfigPath
from rotator.cli.options import AsJson, print_json
from rotator.config import ConfigError
from rotator.config_policies import PoliciesConfig
from rotator.config_text import TextProblem, problem_lines, read_mapping
from rotator.core.replay import Verdict, compare, summary
from rotator.core.snapshot_text import SnapshotError
from rotator.core.values import Policy
from rotator.ports import LedgerError
from rotator.service.decisions import unpack
from rotator.service.wording import Wording

_SQLITE = b"SQLite format 3\0"
Judged = tuple[Decided, Verdict | None]


def replay(
    path: ConfigPath = CONFIG_DEFAULT,
    journal: Annotated[
        Path | None,
        typer.Option("--journal", help="a ledger file, or what --export wrote; else the fleet's"),
    ] = None,
    ledger: Annotated[str | None, typer.Option("--ledger", help="a SQLAlchemy URL instead")] = None,
    since: Annotated[str | None, typer.Option("--since", help="Unix seconds or e.g. 2026-11-20T00:00:00Z")] = None,
    policy: Annotated[
        Path | None, typer.Option("--policy", help="a fleet file, or one with only `policies:`; absent: as recorded")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="show also what is the same")] = False,
    export: Annotated[Path | None, typer.Option("--export", help="write the decisions there as JSON lines")] = None,
    as_json: AsJson = False,
) -> None:
    """Plan recorded decisions again with today's policy and show what would differ, and why."""
    if journal is not None and ledger is not None:
        raise typer.BadParameter("give --journal or --ledger, not both", param_hint="--journal")
    numbers = None if policy is None else _policy(policy)
    try:
        decided, wording = _source(path, journal, ledger, since)
        if export is not None:
            decided = _exported(decided, export)
        judged = [(one, _judge(one, numbers, wording)) for one in decided]
    except LedgerError as e:
        fail(PROBLEM, str(e))
    if as_json:
        print_json(_as_json(judged))
    else:
        render.console().print(_table(judged, everything))


# -- where it comes from -----------------------------------------------------------------------------------------------


def _source(
    path: Path, journal: Path | None, ledger: str | None, since: str | None
) -> tuple[Iterator[Decided], Wording]:
    if journal is not None and not _is_sqlite(journal):
        return _lines(journal), Wording({})
    if journal is not None:
        ledger = f"sqlite:///{journal.resolve()}"
    reader = LedgerReader(ledger or _own_ledger(path))
    labels = {gpu.id: f"GPU {gpu.index}" for gpu in reader.gpus()}
    return reader.decisions(since), Wording(labels)


def _own_ledger(path: Path) -> str:
    try:
        return ledger_url(config.load(path))
    except ConfigError as e:
        fail(PROBLEM, *e.problems, "give the journal itself with --journal or --ledger")


def _is_sqlite(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(_SQLITE)) == _SQLITE
    except OSError as e:
        fail(USAGE, f"{path}: cannot be read ({e.strerror}): give a ledger's file, or what --export wrote")


def _lines(path: Path) -> Iterator[Decided]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield Decided(**json.loads(line))
            except (ValueError, TypeError):
                fail(USAGE, f"{path}: line {number} is no decision: give what `rotator replay --export` wrote")


def _exported(decided: Iterator[Decided], path: Path) -> Iterator[Decided]:
    try:
        with path.open("w", encoding="utf-8") as file:
            for one in decided:
                file.write(json.dumps(asdict(one)) + "\n")
                yield one
    except OSError as e:
        fail(USAGE, f"{path}: cannot be written ({e.strerror})")


def _policy(path: Path) -> Policy:
    """The numbers of a fleet file, or of one that holds only ``policies:``."""
    try:
        data = read_mapping(path.read_text(encoding="utf-8"))
        section = data.get("policies") or {}
        return PoliciesConfig.model_validate(section).core()
    except OSError as e:
        fail(USAGE, f"{path}: cannot be read ({e.strerror})")
    except (TextProblem, UnicodeDecodeError) as e:
        fail(USAGE, f"{path}: {e}")
    except ValidationError as e:
        fail(USAGE, *(f"{path}: policies: {line}" for line in problem_lines(e, section, PoliciesConfig)))


# -- what would differ -----------------------------------------------------------------------------------------------


def _judge(one: Decided, policy: Policy | None, wording: Wording) -> Verdict | None:
    """None where what it was decided from was not kept, or cannot be read."""
    if one.snapshot is None:
        return None
    try:
        verdict = compare(one.plan, unpack(one.snapshot), policy)
    except (SnapshotError, KeyError, TypeError):
        return None
    return Verdict(verdict.kind, verdict.was, verdict.now, verdict.why_was, wording.text(verdict.why_now))


def _counts(judged: list[Judged]) -> dict[str, int]:
    known = [verdict for _, verdict in judged if verdict is not None]
    same = sum(1 for verdict in known if verdict.is_same)
    return {"decisions": len(judged), "same": same, "different": len(known) - same, "unknown": len(judged) - len(known)}


def _as_json(judged: list[Judged]) -> dict[str, Any]:
    known = [verdict for _, verdict in judged if verdict is not None]
    return {**_counts(judged), "kinds": summary(known), "swaps": [_row(one, verdict) for one, verdict in judged]}


def _row(one: Decided, verdict: Verdict | None) -> Mapping[str, Any]:
    row = {"swap_id": one.swap_id, "at_wall_s": one.at_wall_s, "results": one.results}
    if verdict is None:
        return {**row, "kind": "unknown"}
    return {**row, **asdict(verdict)}


def _table(judged: list[Judged], everything: bool) -> Group:
    counts = _counts(judged)
    shown = [(one, v) for one, v in judged if v is not None and (everything or not v.is_same)]
    parts: list[Any] = [Text(line) for one, verdict in shown for line in _said(one, verdict)]
    known = [verdict for _, verdict in judged if verdict is not None]
    kinds = ", ".join(f"{kind} {n}" for kind, n in summary(known).items() if kind != "same")
    line = f"{counts['decisions']} decisions: {counts['same']} the same, {counts['different']} different"
    line += f" ({kinds})" if kinds else ""
    line += f", {counts['unknown']} not recorded whole" if counts["unknown"] else ""
    return Group(*parts, Text(line, style="bold"))


def _said(one: Decided, verdict: Verdict) -> list[str]:
    at = datetime.fromtimestamp(one.at_wall_s).strftime("%m-%d %H:%M:%S")
    if verdict.is_same:
        return [f"{at} {one.swap_id} same: {', '.join(verdict.was)}"]
    return [
        f"{at} {one.swap_id} {verdict.kind}",
        f"  then: {', '.join(verdict.was)}: {verdict.why_was}",
        f"  now:  {', '.join(verdict.now) or 'nothing'}: {verdict.why_now}",
    ]
