"""``rotator incidents``: what went wrong, what was found, and the evidence."""

from datetime import datetime
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer

from rotator.cli import render
from rotator.cli.errors import USAGE, fail
from rotator.cli.options import URL_DEFAULT, AsJson, Key, Url, client, print_json

app = typer.Typer(help="What went wrong: list, show, and take the evidence.", no_args_is_help=False)


@app.callback(invoke_without_command=True)
def incidents(
    context: typer.Context,
    only_open: Annotated[bool, typer.Option("--open", help="only those that are not over")] = False,
    engine: Annotated[str | None, typer.Option("--engine", help="only of this one")] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, max=1000, help="the newest so many")] = 20,
    url: Url = URL_DEFAULT,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """What went wrong, newest first."""
    if context.invoked_subcommand is not None:
        return
    found = client(context, url, key).get("/incidents", open=only_open, engine=engine, limit=limit)
    if as_json:
        print_json(found)
    elif not found:
        typer.echo("no incidents")
    else:
        columns = ("id", "kind", "state", "reason", "what to do")
        render.console().print(render.table("incidents", columns, [_row(i) for i in found]))


@app.command()
def show(
    context: typer.Context,
    id: Annotated[str, typer.Argument(help="as `rotator incidents` shows it")],
    url: Url = URL_DEFAULT,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """All about one: what was seen, what the service did, what you must do, and what its bundle holds."""
    told = client(context, url, key).get(f"/incidents/{quote(id, safe='')}")
    if as_json:
        print_json(told)
        return
    incident = told["incident"]
    facts = [(name, _shown(name, value)) for name, value in incident.items() if value not in (None, "")]
    out = render.console()
    out.print(render.table(incident["id"], ("what", "value"), facts))
    if told["items"]:
        out.print(render.table("bundle", ("file", "bytes"), [(i["name"], f"{i['bytes']:,}") for i in told["items"]]))
    for lacking in told["missing"]:
        out.print(f"missing: {lacking['what']}: {lacking['why']}", markup=False)


@app.command()
def bundle(
    context: typer.Context,
    id: Annotated[str, typer.Argument(help="as `rotator incidents` shows it")],
    to: Annotated[Path | None, typer.Option("-o", "--output", help="the file to write; ID.tar.gz if absent")] = None,
    url: Url = URL_DEFAULT,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Save one's evidence as a tar.gz file. Needs a key of scope admin."""
    path = to or Path(f"{id}.tar.gz")
    if path.exists():
        fail(USAGE, f"{path} exists: give another name with -o")
    size = client(context, url, key).save(f"/incidents/{quote(id, safe='')}/bundle", path)
    if as_json:
        print_json({"path": str(path), "bytes": size})
    else:
        typer.echo(f"{path}: {size:,} bytes")


def _row(incident: dict[str, Any]) -> tuple[str, ...]:
    state = "open" if incident["closed_wall_s"] is None else "over"
    times = f" ({incident['count']} times)" if incident["count"] > 1 else ""
    return incident["id"], incident["kind"], state, incident["reason"] + times, incident["advice"] or "–"


def _shown(name: str, value: Any) -> str:
    if name.endswith("_wall_s"):
        return datetime.fromtimestamp(value).astimezone().isoformat(timespec="seconds")
    return f"{value:,}" if name == "bundle_bytes" else str(value)
