"""Commands that look at a running service: status, engines, gpus, queue, plan, ledger, events."""

import json
from typing import Annotated, Any

import typer

from rotator.cli import render
from rotator.cli.client import Client
from rotator.cli.errors import ENDED, OK, PROBLEM, UNREACHABLE, CliError, fail
from rotator.cli.options import URL_DEFAULT, AsJson, Key, Url, client, print_json


def status(context: typer.Context, url: Url = URL_DEFAULT, key: Key = None, as_json: AsJson = False) -> None:
    """Engines, GPUs and queue at a glance. Exit code 1 if the service is not ready."""
    service = client(context, url, key)
    ready, reasons = _readiness(service)
    seen = {name: service.get(f"/{name}") for name in ("engines", "gpus", "queue", "calendar")}
    if as_json:
        print_json({"ready": ready, "reasons": reasons, **seen})
    else:
        out = render.console()
        out.print("ready" if ready else "NOT READY", style="green" if ready else "bold red")
        for reason in reasons:
            out.print(f"  {reason}")
        out.print(render.engines(seen["engines"]), render.gpus(seen["gpus"]))
        if seen["queue"]:
            out.print(render.queue(seen["queue"]))
        if shown := render.calendar(seen["calendar"]):
            out.print(shown)
    raise typer.Exit(OK if ready else PROBLEM)


def _readiness(service: Client) -> tuple[bool, list[str]]:
    try:
        return True, service.get("/readyz")["reasons"]
    except CliError as e:
        if e.code != PROBLEM:
            raise
        return False, [str(e)]


def engines(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(help="only this one, by name or alias")] = None,
    url: Url = URL_DEFAULT,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Every engine and its state, or all about one."""
    service = client(context, url, key)
    if name is None:
        _show(service.get("/engines"), as_json, render.engines)
    else:
        from rotator.cli.client import engine_path

        view = service.get(engine_path(name))
        _show(
            view, as_json, lambda v: render.table(v["name"], ("what", "value"), [(k, _brief(x)) for k, x in v.items()])
        )


def _all_about(view: dict[str, Any]) -> Any:
    return render.table(view["name"], ("what", "value"), [(k, _brief(v)) for k, v in view.items()])


def _brief(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else "–" if value is None else str(value)


def gpus(context: typer.Context, url: Url = URL_DEFAULT, key: Key = None, as_json: AsJson = False) -> None:
    """Every GPU and who holds its bytes."""
    _show(client(context, url, key).get("/gpus"), as_json, render.gpus)


def queue(context: typer.Context, url: Url = URL_DEFAULT, key: Key = None, as_json: AsJson = False) -> None:
    """Requests that wait for their model."""
    _show(client(context, url, key).get("/queue"), as_json, render.queue)


def reservations(context: typer.Context, url: Url = URL_DEFAULT, key: Key = None, as_json: AsJson = False) -> None:
    """Windows, reservations and default engines: what the calendar keeps awake, now and next."""
    service = client(context, url, key)
    if as_json:
        print_json(service.get("/reservations"))
        return
    shown = render.calendar(service.get("/calendar"))
    render.console().print(shown or "the calendar is empty")


def plan(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(help="as if you asked to wake it; absent: as things are")] = None,
    url: Url = URL_DEFAULT,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """What would be done now, and why everything else waits."""
    _show(client(context, url, key).get("/plan", model=model), as_json, render.plan)


def ledger(
    context: typer.Context,
    table: Annotated[str, typer.Argument(help="transitions, engines, gpus, residencies, leases, ...")] = "transitions",
    where: Annotated[list[str] | None, typer.Option("--where", help="column=value; may be repeated")] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, max=1000, help="rows a page")] = 20,
    cursor: Annotated[str | None, typer.Option("--cursor", help="of the page before")] = None,
    check: Annotated[bool, typer.Option("--check", help="compare the ledger with the GPUs instead")] = False,
    url: Url = URL_DEFAULT,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Rows of the ledger, newest first; with --check whether ledger and GPUs agree (exit code 1 if not)."""
    service = client(context, url, key)
    if check:
        found = service.get("/ledger/check")
        lines = ["ledger = devices"] if found["matches"] else found["differences"]
        _show(found, as_json, lambda _: "\n".join(lines))
        raise typer.Exit(OK if found["matches"] else PROBLEM)
    filters = dict(_filter(word) for word in where or ())
    page = service.get("/ledger", table=table, limit=limit, cursor=cursor, **filters)
    _show(page, as_json, lambda p: render.rows(table, p["rows"]))
    if page["next_cursor"] and not as_json:
        typer.echo(f"more: --cursor {page['next_cursor']}")


def _filter(word: str) -> tuple[str, str]:
    name, equals, value = word.partition("=")
    if not equals or name in ("table", "limit", "cursor"):
        raise typer.BadParameter(f"'{word}' is no column=value", param_hint="--where")
    return name, value


def events(
    context: typer.Context,
    kind: Annotated[list[str] | None, typer.Option("--kind", help="e.g. swap, engine.awake; may be repeated")] = None,
    engine: Annotated[list[str] | None, typer.Option("--engine", help="only of this one; may be repeated")] = None,
    after: Annotated[int | None, typer.Option("--after", min=0, help="after this id; 0: all that is kept")] = None,
    count: Annotated[int | None, typer.Option("--count", min=1, help="end after so many")] = None,
    url: Url = URL_DEFAULT,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """What happens, line by line, until you stop it; with --json one object a line."""
    service = client(context, url, key)
    event: dict[str, Any] = {}
    for seen, event in enumerate(service.events(kind=kind, engine=engine, after=after), start=1):
        typer.echo(json.dumps(event, ensure_ascii=False) if as_json else render.event(event))
        if seen == count:
            return
    if event.get("kind") != "service.stopping":
        fail(UNREACHABLE, f"no more events come: {ENDED}")


def _show(value: Any, as_json: bool, show: Any) -> None:
    if as_json:
        print_json(value)
    else:
        render.console().print(show(value))
