"""Options that commands share, and the client that they make."""

import json
from typing import Annotated, Any

import typer

from rotator.cli.client import Client, HttpTransport

Url = Annotated[str, typer.Option("--url", envvar="ROTATOR_URL", help="where the service is")]
Key = Annotated[str | None, typer.Option("--key", envvar="ROTATOR_KEY", help="a key of its configuration")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]
Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="return when it is done, or when it is begun")]
Deadline = Annotated[float, typer.Option("--deadline", min=0.001, max=86400, help="wait at most so many seconds")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="only show the plan and its reasons")]
Force = Annotated[bool, typer.Option("--force", help="abort requests in flight instead of freezing them")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="do not ask")]
Level = Annotated[int | None, typer.Option("--level", min=1, max=2, help="1 keeps the weights in host RAM, 2 does not")]

URL_DEFAULT = "http://127.0.0.1:8400"
DEADLINE_DEFAULT_S = 600.0


def client(context: typer.Context, url: str, key: str | None) -> Client:
    """The context's object, where there is one, carries the requests: tests put it there."""
    return Client(url, key, context.obj or HttpTransport())


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))
