"""Commands that change something in a running service."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer

from rotator.cli import progress, render
from rotator.cli.client import Client, engine_path
from rotator.cli.complete import engine_names
from rotator.cli.options import (
    DEADLINE_DEFAULT_S,
    URL_DEFAULT,
    AsJson,
    Deadline,
    DryRun,
    Force,
    Key,
    Level,
    Url,
    Wait,
    client,
    print_json,
)

Model = Annotated[str, typer.Argument(help="an engine's name or alias", autocompletion=engine_names)]


def wake(
    context: typer.Context,
    model: Model,
    wait: Wait = True,
    deadline_s: Deadline = DEADLINE_DEFAULT_S,
    dry_run: DryRun = False,
    force: Force = False,
    url: Url = URL_DEFAULT,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Give a model its turn; whoever is in the way yields as the plan says."""
    body = {"model": model, "wait": wait, "deadline_s": deadline_s, "dry_run": dry_run, "force": force}
    _carry_out(client(context, url, key), "/wake", body, as_json)


def sleep(
    context: typer.Context,
    model: Model,
    level: Level = None,
    wait: Wait = True,
    deadline_s: Deadline = DEADLINE_DEFAULT_S,
    dry_run: DryRun = False,
    force: Force = False,
    url: Url = URL_DEFAULT,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Send a model to sleep; requests in flight finish, or freeze until its next wake."""
    body = {"model": model, "level": level, "wait": wait, "deadline_s": deadline_s, "dry_run": dry_run, "force": force}
    _carry_out(client(context, url, key), "/sleep", body, as_json)


def swap(
    context: typer.Context,
    model: Model,
    out: Annotated[list[str] | None, typer.Option("--sleep", help="who must yield; may be repeated")] = None,
    level: Level = None,
    wait: Wait = True,
    deadline_s: Deadline = DEADLINE_DEFAULT_S,
    dry_run: DryRun = False,
    force: Force = False,
    url: Url = URL_DEFAULT,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Send some models to sleep and wake another, in one plan."""
    body = {
        "wake": model,
        "sleep": out or None,
        "level": level,
        "wait": wait,
        "deadline_s": deadline_s,
        "dry_run": dry_run,
        "force": force,
    }
    _carry_out(client(context, url, key), "/swap", body, as_json)


def engine_command(action: str, help_text: str) -> Callable[..., None]:
    """start, stop and restart differ in nothing but their names."""

    def command(
        context: typer.Context,
        model: Model,
        wait: Wait = True,
        deadline_s: Deadline = DEADLINE_DEFAULT_S,
        dry_run: DryRun = False,
        url: Url = URL_DEFAULT,
        key: Key = None,
        as_json: AsJson = False,
    ) -> None:
        body = {"wait": wait, "deadline_s": deadline_s, "dry_run": dry_run}
        _carry_out(client(context, url, key), engine_path(model, action), body, as_json)

    command.__doc__ = help_text
    return command


def engine_setting(action: str, help_text: str) -> Callable[..., None]:
    """pin, unpin and release: done at once, answered with the engine."""

    def command(
        context: typer.Context, model: Model, url: Url = URL_DEFAULT, key: Key = None, as_json: AsJson = False
    ) -> None:
        view = client(context, url, key).post(engine_path(model, action))
        _say(view, as_json, f"{view['name']}: {view['state']}{', pinned' if view['pinned'] else ''}")

    command.__doc__ = help_text
    return command


def reserve(
    context: typer.Context,
    models: Annotated[list[str], typer.Argument(help="engines' names or aliases, awake together")],
    start: Annotated[str | None, typer.Option("--start", help="e.g. 2026-11-22T09:00; absent: now")] = None,
    end: Annotated[str | None, typer.Option("--end", help="like --start")] = None,
    hours: Annotated[float | None, typer.Option("--hours", min=0.001, max=744, help="instead of --end")] = None,
    priority: Annotated[int, typer.Option("--priority", min=-100, max=100, help="lower windows yield to it")] = 0,
    note: Annotated[str, typer.Option("--note", help="shown wherever the reservation is")] = "",
    url: Url = URL_DEFAULT,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Keep models awake once. Times without a zone are in the calendar's."""
    if (end is None) == (hours is None):
        raise typer.BadParameter("give one of --end and --hours", param_hint="--end")
    body = {
        "engines": models,
        "start": start,
        "end": end,
        "duration_s": None if hours is None else hours * 3600,
        "priority": priority,
        "note": note,
    }
    view = client(context, url, key).post("/reservations", body)
    _say(view, as_json, f"reservation {view['id']}: {_span(view)}")


def unreserve(
    context: typer.Context,
    id: Annotated[int, typer.Argument(help="its number, as `rotator reservations` shows it")],
    url: Url = URL_DEFAULT,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Take a reservation back."""
    view = client(context, url, key).delete(f"/reservations/{id}")
    _say(view, as_json, f"reservation {view['id']} is dropped: {_span(view)}")


def _span(view: Any) -> str:
    return f"{', '.join(view['engines'])} from {view['begins']} until {view['ends']}"


def cordon(
    context: typer.Context,
    gpu: Annotated[str, typer.Argument(help="an index or a UUID; of another node: node/0")],
    reason: Annotated[str, typer.Option("--reason", help="shown wherever the GPU is")] = "",
    undo: Annotated[bool, typer.Option("--undo", help="let work on it again")] = False,
    url: Url = URL_DEFAULT,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Keep new work off a GPU: engines there may sleep and stop, none wakes or starts."""
    path, body = (f"/gpus/{gpu}/uncordon", None) if undo else (f"/gpus/{gpu}/cordon", {"reason": reason})
    view = client(context, url, key).post(path, body)
    _say(view, as_json, f"GPU {render.gpu_name(view['id'], view['index'])}: {view['health']}")


def reload(context: typer.Context, url: Url = URL_DEFAULT, key: Key = None, as_json: AsJson = False) -> None:
    """Let the service read its configuration file again."""
    answer = client(context, url, key).post("/config/reload")
    _say(answer, as_json, "\n".join(answer["changes"]) or "nothing changed")


def _carry_out(service: Client, path: str, body: Mapping[str, Any], as_json: bool) -> None:
    """Post a command and say what came of it; bars are drawn while a terminal waits."""

    def ask() -> Any:
        return service.post(path, body, deadline_s=body["deadline_s"])

    waits = body["wait"] and not body["dry_run"] and not as_json
    answer = progress.shown(service, render.console(stderr=True), ask) if waits else ask()
    _say(answer, as_json, render.result(answer))


def _say(answer: Any, as_json: bool, line: str) -> None:
    if as_json:
        print_json(answer)
    else:
        typer.echo(line)
