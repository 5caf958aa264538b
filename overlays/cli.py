"""The commands, and how each one ends: 0 done, 1 something is wrong with a patch, bundle or mount, 2 wrong arguments,
3 the vLLM to be patched could not be found or read."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from packaging.version import InvalidVersion, Version
from rich.console import Console
from rich.table import Column, Table

from overlays import attest, bundle, matrix, registry
from overlays.build import Outcome, Result, apply_all
from overlays.errors import OverlayError, PatchDeclined, SourceError
from overlays.index import Index
from overlays.manifest import Manifest
from overlays.patch import Patch
from overlays.sources import Source, Tree, open_wheel

PROBLEM, USAGE, UNREADABLE = 1, 2, 3
STRANGE = "do not mount this bundle over that vLLM: build one for it with `python -m overlays build`"
UNLIKE = "mount the bundle where these workers keep vLLM (`status --root`), and restart the engine"
EPILOG = "Exit codes: 0 done; 1 a patch, bundle or mount is wrong; 2 wrong arguments; 3 no vLLM that can be read."

app = typer.Typer(
    name="overlays",
    help="Patched vLLM files for read-only mounts, built beside an installation.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
err = Console(stderr=True, highlight=False, soft_wrap=True)
out = Console(highlight=False, soft_wrap=True)

Json = Annotated[bool, typer.Option("--json", help="print one JSON object")]
From = Annotated[
    Path | None, typer.Option("--from", help="a folder with vLLM: site-packages, an image's extracted tree, a checkout")
]
Wheel = Annotated[Path | None, typer.Option("--wheel", help="a wheel file")]
Release = Annotated[str, typer.Option("--release", help="a released version, read from the package index")]
Url = Annotated[str, typer.Option("--index-url", help="package index; default: pip's, else pypi.org")]
Arch = Annotated[str, typer.Option("--arch", help="x86_64 or aarch64: of released wheels")]
Cache = Annotated[Path | None, typer.Option("--cache", help="where fetched files are kept; default: the user's cache")]
Only = Annotated[list[str] | None, typer.Option("--only", help="only this patch; may be repeated")]
Without = Annotated[list[str] | None, typer.Option("--without", help="not this patch; may be repeated")]
With = Annotated[list[str] | None, typer.Option("--with", help="also this patch, which is off unless named")]
Root = Annotated[Path, typer.Option("--out", help="the folder of bundles")]


@app.command()
def build(
    root: Root,
    source: From = None,
    wheel: Wheel = None,
    release: Release = "",
    index_url: Url = "",
    arch: Arch = "x86_64",
    cache: Cache = None,
    only: Only = None,
    without: Without = None,
    also: With = None,
    strict: Annotated[bool, typer.Option("--strict", help="no bundle if any patch failed, required or not")] = False,
    current: Annotated[bool, typer.Option(help="mark the bundle as the current one of its build")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what each patch would do")] = False,
    as_json: Json = False,
) -> None:
    """Build a bundle for one vLLM: --from FOLDER, --wheel FILE or --release VERSION."""
    with _told(), _source(source, wheel, release, index_url, arch, cache) as given:
        patches = _patches(only, without, also)
        if dry_run:
            outcomes = apply_all(given, patches).outcomes
            _outcomes(f"{given.name} ({given.version or 'no version'})", outcomes, as_json)
            if any(outcome.result is Result.FAILED and (strict or outcome.required) for outcome in outcomes):
                raise typer.Exit(PROBLEM)
            return
        built = bundle.build(given, patches, root, strict=strict, current=current)
        _built(built, as_json)


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(help="a bundle: ROOT/<hash>")],
    attested: Annotated[
        str, typer.Option("--attested", help="an engine's address, or a file with what its workers answered")
    ] = "",
    source: From = None,
    wheel: Wheel = None,
    release: Release = "",
    index_url: Url = "",
    arch: Arch = "x86_64",
    cache: Cache = None,
    as_json: Json = False,
) -> None:
    """Check that a bundle is whole; with a source, that it is for that vLLM; with --attested, that workers run it."""
    with _told():
        facts = bundle.check(path)
        wrong: list[str] = []
        advice: list[str] = []
        if source or wheel or release:
            with _source(source, wheel, release, index_url, arch, cache) as given:
                wrong += bundle.strangers(facts, given)
            advice += [STRANGE] if wrong else []
        if attested and (unlike := attest.differences(facts, attest.fetch(attested, facts))):
            wrong += unlike
            advice.append(UNLIKE)
        if as_json:
            _print_json({"bundle": facts.bundle, "build": facts.build.version, "wrong": wrong})
        elif not wrong:
            out.print(f"bundle {facts.bundle} for vLLM {facts.build.version or 'of no version'} is whole", markup=False)
        if wrong:
            _fail("\n".join([*wrong, *advice]), PROBLEM, quiet=as_json)


@app.command("matrix")
def matrix_command(
    first: Annotated[str, typer.Option(help="the first release")] = matrix.FIRST,
    last: Annotated[str, typer.Option(help="the last release")] = matrix.LAST,
    index_url: Url = "",
    arch: Arch = "x86_64",
    cache: Cache = None,
    only: Only = None,
    markdown: Annotated[Path | None, typer.Option("--markdown", help="write the page here")] = None,
    as_json: Json = False,
) -> None:
    """Try every patch on every released vLLM and say what became of it; ends with 1 if any failed."""
    for option, given in (("--first", first), ("--last", last)):
        _check_version(option, given)
    with _told(), Index(index_url, cache, arch) as index:
        patches = registry.chosen(registry.all_patches(), only or (), ())
        versions = [str(version) for version in index.releases(first, last)]
        if not versions:
            raise SourceError(f"{index.name} has no release of vLLM from {first} to {last} for {arch}")
        columns = matrix.run(index, patches, versions, lambda version: err.print(f"vLLM {version}", style="dim"))
    if markdown is not None:
        machine = f"Linux {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
        today = datetime.datetime.now(datetime.UTC).date()
        with _told():
            _write_text(markdown, matrix.markdown(columns, patches, today, machine))
    if as_json:
        _print_json({"releases": matrix.as_json(columns), "failed": matrix.failures(columns)})
    else:
        _matrix_table(columns, patches)
    if failed := matrix.failures(columns):
        _fail("\n".join(failed), PROBLEM, quiet=as_json)


@app.command()
def status(root: Root, package: Annotated[str, typer.Option("--root", help="the folder in the container that holds "
           "the package vllm: prints the mounts of current bundles")] = "", as_json: Json = False) -> None:  # fmt: skip
    """List the bundles of a folder, say which are whole and which is current for each build."""
    with _told():
        current = bundle.current_of(root)
        rows = [_bundle_row(path, current, package) for path in bundle.bundles(root)]
    if as_json:
        _print_json({"bundles": rows})
    else:
        _status_table(rows)
    if any(row["wrong"] for row in rows):
        raise typer.Exit(PROBLEM)


@app.command()
def use(path: Annotated[Path, typer.Argument(help="a bundle: ROOT/<hash>")]) -> None:
    """Mark a bundle as the current one of its build: the way back to an earlier one."""
    with _told():
        chosen = path.resolve()
        bundle.make_current(chosen.parent, chosen)
        out.print(f"current: {chosen.name}", markup=False)


@app.command()
def patches(as_json: Json = False) -> None:
    """List the patches: why each is there and when it may go."""
    with _told():
        found = registry.all_patches()
    if as_json:
        _print_json({"patches": [_patch_row(patch) for patch in found]})
        return
    table = Table("patch", "", "releases", "why", "may go when")
    for patch in found:
        kind = "required" if patch.required else "on request" if patch.opt_in else "optional"
        table.add_row(patch.name, kind, patch.releases, patch.why, patch.drop_when)
    out.print(table)


def _patches(only: list[str] | None, without: list[str] | None, also: list[str] | None) -> tuple[Patch, ...]:
    known = registry.all_patches()
    named = registry.chosen(known, [*(only or []), *(also or [])], ())
    asked = {patch.name for patch in named} if only or also else set()
    chosen = registry.chosen(known, only or (), without or ())
    extra = [patch for patch in known if patch.name in asked]
    kept = {patch.name for patch in chosen if not patch.opt_in} | {patch.name for patch in extra}
    return tuple(patch for patch in known if patch.name in kept - set(without or ()))


@contextlib.contextmanager
def _source(
    folder: Path | None, wheel: Path | None, release: str, index_url: str, arch: str, cache: Path | None
) -> Iterator[Source]:
    if sum(bool(given) for given in (folder, wheel, release)) != 1:
        _fail("name one vLLM: --from FOLDER, --wheel FILE or --release VERSION", USAGE)
    if folder is not None:
        yield Tree(folder)
    elif wheel is not None:
        with contextlib.closing(open_wheel(wheel)) as opened:
            yield opened
    else:
        with Index(index_url, cache, arch) as index, contextlib.closing(index.open(release)) as fetched:
            yield fetched


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Errors of ours end the command with a line and a code."""
    try:
        yield
    except SourceError as error:
        _fail(str(error), UNREADABLE)
    except PatchDeclined as error:
        _fail(str(error), USAGE)
    except OverlayError as error:
        _fail(str(error), PROBLEM)


def _check_version(option: str, given: str) -> None:
    try:
        Version(given)
    except InvalidVersion:
        _fail(f"{option}: {given!r} is no version: give one as {matrix.LAST}", USAGE)


def _fail(text: str, code: int, *, quiet: bool = False) -> NoReturn:
    if not quiet:
        err.print(text, markup=False)
    raise typer.Exit(code)


def _built(built: bundle.Built, as_json: bool) -> None:
    if as_json:
        _print_json(
            {"path": str(built.path), "existed": built.existed, "manifest": built.manifest.model_dump(mode="json")}
        )
        return
    facts = built.manifest
    table = Table(
        Column("patch", no_wrap=True), "result", "reason", title=f"vLLM {facts.build.version or 'of no version'}"
    )
    for patch in facts.patches:
        table.add_row(patch.name, _coloured(patch.result), patch.reason)
    out.print(table)
    out.print(f"{built.path}{' (was there)' if built.existed else ''}", markup=False)


def _outcomes(title: str, outcomes: list[Outcome], as_json: bool) -> None:
    if as_json:
        rows = [
            {"patch": o.patch, "required": o.required, "result": o.result.value, "reason": o.reason} for o in outcomes
        ]
        _print_json({"build": title, "patches": rows})
        return
    table = Table(Column("patch", no_wrap=True), "result", "reason", title=title)
    for outcome in outcomes:
        table.add_row(outcome.patch, _coloured(outcome.result.value), outcome.reason)
    out.print(table)


def _matrix_table(columns: list[matrix.Column], chosen: tuple[Patch, ...]) -> None:
    """A letter a cell, a number a patch, so that it fits any terminal."""
    letters = {"applied": "[green]A[/]", "upstream": "[cyan]U[/]", "not applicable": "[dim]–[/]", "failed": "[red]F[/]"}
    table = Table("release", *(str(number) for number, _ in enumerate(chosen, 1)))
    for column in columns:
        table.add_row(column.version, *(letters[outcome.result.value] for outcome in column.outcomes))
    out.print(table)
    for number, patch in enumerate(chosen, 1):
        out.print(f"{number:3} {patch.name}", markup=False)
    out.print("A applied, U upstream, – not applicable, F failed", markup=False)


def _status_table(rows: list[dict[str, Any]]) -> None:
    table = Table(Column("bundle", no_wrap=True), "vLLM", "current", Column("applied", overflow="fold"), "state")
    for row in rows:
        table.add_row(row["bundle"], row["version"], "yes" if row["current"] else "", ", ".join(row["applied"]),
                      row["wrong"] or "whole")  # fmt: skip
    out.print(table)
    for row in rows:
        for host, inside in row["mounts"].items():
            out.print(f"{host}:{inside}:ro", markup=False)


def _bundle_row(path: Path, current: dict[str, str], package: str) -> dict[str, Any]:
    facts: Manifest | None = None
    wrong = ""
    try:
        facts = bundle.check(path)
    except OverlayError as error:
        wrong = str(error)
    is_current = path.name in current.values()
    mounts = bundle.mounts(path.absolute(), facts, package) if facts and package and is_current else {}
    return {
        "bundle": path.name,
        "path": str(path.absolute()),
        "version": facts.build.version if facts else "",
        "build": bundle.build_name(facts) if facts else "",
        "current": is_current,
        "applied": [patch.name for patch in facts.patches if patch.result == Result.APPLIED.value] if facts else [],
        "wrong": wrong,
        "mounts": mounts,
        "overlay": {  # as a site file of jobs has it
            "root": str(path.absolute()),
            "files": {str(Path(host).relative_to(path.absolute())): inside for host, inside in mounts.items()},
        },
    }


def _patch_row(patch: Patch) -> dict[str, Any]:
    return {
        "name": patch.name,
        "required": patch.required,
        "opt_in": patch.opt_in,
        "releases": patch.releases,
        "why": patch.why,
        "drop_when": patch.drop_when,
        "upstream": patch.upstream,
        "targets": {name: list(target.paths) for name, target in patch.targets.items()},
    }


def _coloured(result: str) -> str:
    colour = {"applied": "green", "upstream": "cyan", "failed": "red"}.get(result, "dim")
    return f"[{colour}]{result}[/]"


def _print_json(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def _write_text(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise OverlayError(f"cannot write {path}: {error.strerror}") from None


def main() -> None:
    app()
