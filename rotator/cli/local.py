"""Commands that need no running service: serve, check, schema, key, demo."""

import asyncio
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from rotator import config
from rotator.cli import command_docs, config_docs
from rotator.cli.errors import OK, PROBLEM, fail
from rotator.cli.options import AsJson, print_json
from rotator.config import ConfigError
from rotator.ports import RotatorError
from rotator.service.keys import new_key

ConfigPath = Annotated[Path, typer.Option("--config", "-c", help="the fleet file")]
CONFIG_DEFAULT = Path("fleet.yaml")


def serve(path: ConfigPath = CONFIG_DEFAULT) -> None:
    """Run the service until SIGTERM. SIGHUP applies a changed configuration file."""
    from rotator.app import serve as run  # imports every part: the other commands start quicker without

    try:
        code = run(path)
    except ConfigError as e:
        fail(PROBLEM, *e.problems)
    except RotatorError as e:
        fail(PROBLEM, str(e))
    raise typer.Exit(code)


def check(path: ConfigPath = CONFIG_DEFAULT, as_json: AsJson = False) -> None:
    """Check the fleet file and the machine around it. Exit code 1 if anything cannot work."""
    from rotator.adapters.fleet_devices import looked_through
    from rotator.check import Finding, check_fleet
    from rotator.cli.surroundings import Machine

    try:
        fleet = config.load(path)
        found = asyncio.run(looked_through(fleet, lambda devices: check_fleet(fleet, devices, Machine())))
    except ConfigError as e:
        found = tuple(Finding(line) for line in e.problems)
    errors = [f for f in found if f.is_error]
    if as_json:
        findings = [{"level": f.level, "line": f.line} for f in found]
        print_json({"ok": not errors, "findings": findings})
    else:
        for finding in found:
            typer.echo(f"{finding.level}: {finding.line}")
        typer.echo(f"{path}: {len(errors)} errors, {sum(f.level == 'warning' for f in found)} warnings")
    raise typer.Exit(PROBLEM if errors else OK)


def schema(
    context: typer.Context,
    markdown: Annotated[
        bool, typer.Option("--markdown/--no-markdown", help="the reference for people instead")
    ] = False,
    commands: Annotated[bool, typer.Option("--commands", help="the reference of the command line instead")] = False,
    metrics: Annotated[bool, typer.Option("--metrics", help="the reference of the metrics instead")] = False,
    rest: Annotated[bool, typer.Option("--rest", help="the reference of the operators' REST instead")] = False,
) -> None:
    """Print the JSON Schema of the fleet file, for editors."""
    if rest:
        from rotator.cli import rest_docs  # imports the service, as below

        typer.echo(rest_docs.markdown(), nl=False)
    elif metrics:
        from rotator.cli import metric_docs  # imports the service: the other commands start quicker without

        typer.echo(metric_docs.markdown(), nl=False)
    elif commands:
        typer.echo(command_docs.markdown(context.find_root().command), nl=False)
    else:
        typer.echo(config_docs.markdown() if markdown else config_docs.json_schema(), nl=False)


def key(
    name: Annotated[str, typer.Argument(help="whose it is")] = "new",
    scope: Annotated[str, typer.Option("--scope", help="infer, operate or admin")] = "infer",
    as_json: AsJson = False,
) -> None:
    """Make a key: the secret for its holder, the entry for the fleet file."""
    if scope not in ("infer", "operate", "admin"):
        raise typer.BadParameter("is infer, operate or admin", param_hint="--scope")
    made = new_key()
    if as_json:
        print_json({"name": name, "key": made.secret, "sha256": made.sha256, "scopes": [scope]})
        return
    typer.echo(f"key, shown only now: {made.secret}\n\nfor the fleet file:\nkeys:")
    typer.echo(f"  - name: {json.dumps(name)}\n    sha256: {made.sha256}\n    scopes: [{scope}]")


def demo(
    keep: Annotated[bool, typer.Option("--keep", help="leave it running and show what to try")] = False,
    as_json: AsJson = False,
) -> None:
    """Watch models take turns on simulated GPUs. The exit code tells whether all went well."""
    from rotator.demo.run import main  # nothing else may need the demo

    sys.stdout.flush()
    raise typer.Exit(main(keep, as_json))
