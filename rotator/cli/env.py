"""``rotator env``: archives of installed Python environments, for engines that run without images."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from rotator.adapters.env_manifest import Manifest
from rotator.cli.errors import PROBLEM, fail
from rotator.cli.options import AsJson, print_json
from rotator.ports import ArchiveError

env_app = typer.Typer(help="Archive and restore the Python environments that engines run in.", rich_markup_mode=None)

Archives = Annotated[Path, typer.Option(help="folder that holds the archives")]
ARCHIVES_DEFAULT = Path("/var/lib/rotator/environments")


@env_app.command()
def archive(
    environment: Annotated[Path, typer.Argument(help="the environment's prefix, as /opt/vllm")],
    name: Annotated[str, typer.Option(help="of the archive; by its vLLM and the time if absent")] = "",
    archives: Archives = ARCHIVES_DEFAULT,
    as_json: AsJson = False,
) -> None:
    """Archive an environment, files and entry points: before an upgrade."""
    from rotator.adapters.env_archive import archive as make

    with _progress() as shown:
        task = shown.add_task("archiving", total=_size_bytes(environment))
        try:
            made = make(environment, archives, name, progress=lambda done: shown.update(task, completed=done))
        except ArchiveError as e:
            fail(PROBLEM, str(e))
    if as_json:
        print_json({"name": made.name, **_told(made)})
        return
    typer.echo(f"{archives / made.name}: {_line(made)}")
    typer.echo(f"to put it back: rotator env restore {made.name} --archives {archives}")


@env_app.command()
def restore(
    name: Annotated[str, typer.Argument(help="of the archive, as `rotator env list` shows it")],
    archives: Archives = ARCHIVES_DEFAULT,
    even_in_use: Annotated[bool, typer.Option("--even-in-use", help="also while processes run from it")] = False,
    as_json: AsJson = False,
) -> None:
    """Put an archived environment back where it was, whole, in one step."""
    from rotator.adapters.env_manifest import read_manifest
    from rotator.adapters.env_restore import restore as put_back

    with _progress() as shown:
        try:
            total = read_manifest(archives / name).size_bytes if (archives / name).is_dir() else None
            task = shown.add_task("restoring", total=total)
            made = put_back(
                archives, name, even_in_use=even_in_use, progress=lambda done: shown.update(task, completed=done)
            )
        except ArchiveError as e:
            fail(PROBLEM, str(e))
    if as_json:
        print_json({"name": made.name, **_told(made)})
        return
    typer.echo(f"{made.prefix}: restored from {made.name}: {_line(made)}")


@env_app.command("list")
def list_(
    archives: Archives = ARCHIVES_DEFAULT,
    verify: Annotated[bool, typer.Option("--verify", help="read every archive back and compare its bytes")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the archives. Exit code 1 if one of them is damaged."""
    from rotator.adapters.env_archive import list_archives
    from rotator.adapters.env_archive import verify as read_back

    rows: list[dict[str, object]] = []
    for name, found in list_archives(archives):
        problem = found if isinstance(found, str) else ""
        if verify and not problem:
            try:
                read_back(archives / name)
            except ArchiveError as e:
                problem = str(e)
        rows.append({"name": name, "problem": problem, **(_told(found) if isinstance(found, Manifest) else {})})
    if as_json:
        print_json(rows)
    else:
        _print(rows)
    raise typer.Exit(PROBLEM if any(row["problem"] for row in rows) else 0)


def _told(made: Manifest) -> dict[str, object]:
    return {
        "prefix": made.prefix,
        "created_at": made.created_at,
        "python": made.python,
        "vllm": made.packages.get("vllm"),
        "torch": made.packages.get("torch"),
        "packages": len(made.packages),
        "size_bytes": made.size_bytes,
        "packed_bytes": made.packed_bytes,
    }


def _print(rows: list[dict[str, object]]) -> None:
    table = Table("archive", "made", "environment", "python", "vllm", "torch", "MiB", "packed", box=None)
    for row in rows:
        if row["problem"]:
            typer.echo(str(row["problem"]), err=True)
        sizes = [f"{int(str(row.get(key, 0))) >> 20}" for key in ("size_bytes", "packed_bytes")]
        shown = [str(row.get(key) or "-") for key in ("created_at", "prefix", "python", "vllm", "torch")]
        table.add_row(str(row["name"]), *shown, *sizes)
    Console().print(table if rows else "no archives")


def _line(made: Manifest) -> str:
    vllm = made.packages.get("vllm", "none")
    return (
        f"Python {made.python}, vLLM {vllm}, {len(made.packages)} packages, {len(made.scripts)} programs, "
        f"{made.size_bytes >> 20} MiB ({made.packed_bytes >> 20} packed)"
    )


def _size_bytes(environment: Path) -> int | None:
    if not environment.is_dir():
        return None
    return sum(path.lstat().st_size for path in environment.rglob("*") if path.is_file())


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)
