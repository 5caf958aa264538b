"""``rotator logs``: an engine's log, once or as it grows."""

import json
from typing import Annotated

import typer

from rotator.cli.act import Model
from rotator.cli.client import engine_path
from rotator.cli.options import URL_DEFAULT, AsJson, Key, Url, client

FOLLOW_S = 86400.0  # a log may be silent for as long as its engine


def logs(
    context: typer.Context,
    model: Model,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="go on with what is added, until you stop it")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, max=10_000, help="how many of the last lines")] = 200,
    url: Url = URL_DEFAULT,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """An engine's log, secrets hidden; with --json one object a line."""
    service = client(context, url, key)
    query = {"lines": lines, "follow": "true" if follow else None}
    for line in service.lines(engine_path(model, "logs"), deadline_s=FOLLOW_S if follow else 30.0, **query):
        typer.echo(json.dumps({"engine": model, "line": line}, ensure_ascii=False) if as_json else line)
