"""``rotator ledger-backup`` and ``ledger-restore``: the ledger's file, copied while in use, and put back."""

from pathlib import Path
from typing import Annotated

import typer

from rotator import config
from rotator.cli.errors import PROBLEM, REFUSED, USAGE, fail
from rotator.cli.local import CONFIG_DEFAULT, ConfigPath
from rotator.cli.options import AsJson, Yes, print_json
from rotator.config import ConfigError
from rotator.ports import LedgerError

File = Annotated[Path, typer.Argument(help="the backup's file")]


def ledger_backup(file: File, path: ConfigPath = CONFIG_DEFAULT, as_json: AsJson = False) -> None:
    """Copy the ledger while the service runs, and verify the copy."""
    from rotator.adapters import ledger_file

    source = _ledger(path)
    try:
        made = ledger_file.backup(source, file)
    except LedgerError as e:
        fail(PROBLEM, str(e))
    if as_json:
        print_json({"file": str(file), "bytes": made.bytes, "schema": made.schema, "transitions": made.rows})
    else:
        typer.echo(f"{file}: {made.bytes} bytes, schema {made.schema}, {made.rows} transitions, verified")


def ledger_restore(file: File, path: ConfigPath = CONFIG_DEFAULT, yes: Yes = False, as_json: AsJson = False) -> None:
    """Put a backup in the ledger's place; what was there is kept beside it. Refused while a service holds it."""
    from rotator.adapters import ledger_file

    target = _ledger(path)
    if (pid := ledger_file.holder(target)) is not None:
        fail(REFUSED, f"the ledger {target} is held by process {pid or '?'}: stop the service first")
    if not yes and target.exists() and not typer.confirm(f"replace {target} by {file}?", err=True):
        fail(REFUSED, "nothing was restored")
    try:
        former = ledger_file.restore(file, target)
    except ledger_file.LedgerHeld as e:
        fail(REFUSED, str(e))
    except LedgerError as e:
        fail(PROBLEM, str(e))
    if as_json:
        print_json({"ledger": str(target), "from": str(file), "former": str(former) if former else None})
    else:
        kept = f"; the former one is {former}" if former else ""
        typer.echo(f"{target} is restored from {file}{kept}")


def _ledger(path: Path) -> Path:
    """The SQLite file of this fleet's ledger."""
    from rotator.adapters.ledger_file import sqlite_path
    from rotator.check.planned import ledger_url

    try:
        fleet = config.load(path)
        found = sqlite_path(ledger_url(fleet))
    except ConfigError as e:
        fail(PROBLEM, *e.problems)
    except LedgerError as e:
        fail(PROBLEM, str(e))
    if found is None:
        fail(USAGE, "ledger.url names another database than SQLite: use that database's own backup and restore")
    return found
