"""``rotator doctor``: what is wrong, from the lowest layer up."""

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from rotator import config
from rotator.cli import render
from rotator.cli.errors import OK, PROBLEM, fail
from rotator.cli.local import CONFIG_DEFAULT, ConfigPath
from rotator.cli.options import AsJson, Yes, print_json
from rotator.config import ConfigError, FleetConfig
from rotator.doctor import Examination, Finding, Repair, Severity, examine
from rotator.doctor.layers import LAYERS, NAMES, Layer
from rotator.doctor.machine import MachineProbes
from rotator.doctor.repairs import carry_out, repairs_in

_STYLES = {Severity.BROKEN: "bold red", Severity.RISK: "yellow", Severity.NOTE: "dim"}

Layers = list[str] | None


def doctor(
    path: ConfigPath = CONFIG_DEFAULT,
    fix: Annotated[bool, typer.Option("--fix", help="carry out the safe repairs, and say which")] = False,
    yes: Yes = False,
    every: Annotated[bool, typer.Option("--all", help="go on above a layer that is broken")] = False,
    only: Annotated[Layers, typer.Option("--only", help="only this layer; may be repeated")] = None,
    skip: Annotated[Layers, typer.Option("--skip", help="not this layer; may be repeated")] = None,
    root: Annotated[Path, typer.Option("--root", help="examine the machine whose files lie below this folder")] = Path(
        "/"
    ),
    deadline_s: Annotated[float, typer.Option("--deadline", min=0.1, max=600, help="for each thing looked at")] = 20.0,
    as_json: AsJson = False,
) -> None:
    """Look for what is wrong, from the kernel up; stop to explain at the first layer that is broken.

    Exit code 0: nothing, or notes only. 1: something is broken, or will break.
    """
    _known(only, "--only")
    _known(skip, "--skip")
    if not root.is_dir():
        raise typer.BadParameter(f"{root} is no folder", param_hint="--root")
    if fix and root != Path("/"):
        raise typer.BadParameter(
            "a machine that was written down cannot be repaired: leave --root out", param_hint="--fix"
        )
    fleet = _fleet(path)
    probes = MachineProbes(fleet, root)
    found = asyncio.run(examine(probes, fleet, only=only or (), skip=skip or (), go_on=every, deadline_s=deadline_s))
    done = _repair(found, fleet, yes, as_json) if fix else []
    if as_json:
        print_json(as_dict(found, done))
    else:
        _print(found, fleet, path, fix)
    raise typer.Exit(OK if found.is_well else PROBLEM)


def _known(names: Layers, option: str) -> None:
    for name in names or ():
        if name not in NAMES:
            raise typer.BadParameter(f"'{name}' is no layer: there are {', '.join(NAMES)}", param_hint=option)


def _fleet(path: Path) -> FleetConfig | None:
    """None without a fleet file: then the machine alone is looked at. A wrong file is an error."""
    if path == CONFIG_DEFAULT and not path.exists():
        return None
    try:
        return config.load(path)
    except ConfigError as e:
        fail(PROBLEM, *e.problems)


# -- repairs -----------------------------------------------------------------------------------------------------------


def _repair(found: Examination, fleet: FleetConfig | None, yes: bool, as_json: bool) -> list[tuple[Repair, str | None]]:
    """What was done, each with what stood in the way (None: it is done)."""
    wanted = repairs_in(found.findings)
    done = []
    for repair in wanted:
        if not yes and not typer.confirm(f"{repair.says}?", err=True, default=False):
            continue
        trouble = carry_out(repair, fleet)
        done.append((repair, trouble))
        if not as_json:
            typer.echo(f"fixed: {repair.says}" if trouble is None else f"not fixed: {repair.says}: {trouble}")
    if not as_json and not wanted:
        typer.echo("nothing here has a safe repair: the commands below are yours to run")
    return done


# -- showing -----------------------------------------------------------------------------------------------------------


def as_dict(found: Examination, done: Sequence[tuple[Repair, str | None]] = ()) -> dict[str, Any]:
    return {
        "ok": found.is_well,
        "stopped_at": found.stopped_at,
        "looked_at": list(found.looked_at),
        "skipped": list(found.skipped),
        "findings": [_finding(f) for f in found.findings],
        "repairs": [{"kind": r.kind, "target": r.target, "done": why is None, "trouble": why} for r, why in done],
    }


def _finding(f: Finding) -> dict[str, Any]:
    return {
        "layer": f.layer,
        "code": f.code,
        "severity": f.severity,
        "what": f.what,
        "evidence": f.evidence,
        "fix": f.fix,
        "engine": f.engine,
        "repair": f.repair.kind if f.repair else None,
        "stops_launch": f.stops_launch,
    }


def _print(found: Examination, fleet: FleetConfig | None, path: Path, fix: bool) -> None:
    out = render.console()
    for layer in LAYERS:
        if layer.name in found.looked_at:
            findings = [f for f in found.findings if f.layer == layer.name]
            for line in _lines(layer, findings, layer.name in found.empty):
                out.print(line, soft_wrap=True)  # a command that is folded cannot be copied
    if fleet is None:
        out.print(Text(f"there is no {path}: only the machine was looked at (-c names a fleet file)", style="dim"))
    if found.stopped_at:
        rest = ", ".join(n for n in found.skipped if NAMES.index(n) > NAMES.index(found.stopped_at))
        out.print(
            f"stopped at {found.stopped_at}: mend it first. Not looked at: {rest or 'nothing'} (--all)", soft_wrap=True
        )
    counts = {s: sum(f.severity is s for f in found.findings) for s in Severity}
    out.print(f"{counts[Severity.BROKEN]} broken, {counts[Severity.RISK]} risks, {counts[Severity.NOTE]} notes")
    safe = len(repairs_in(found.findings))
    if safe and not fix:
        out.print(f"{safe} of them can be mended safely: `rotator doctor --fix`")


def _lines(layer: Layer, findings: Sequence[Finding], is_empty: bool) -> Iterator[Text]:
    worst = min((list(Severity).index(f.severity) for f in findings), default=len(Severity))
    mark = (("✗", "red"), ("!", "yellow"), ("✓", "green"), ("–", "dim") if is_empty else ("✓", "green"))[worst]
    yield Text.assemble(
        mark, " ", (layer.name, "bold"), (f"  {layer.says}{': nothing to look at' if is_empty else ''}", "dim")
    )
    for f in findings:
        yield Text.assemble("    ", (f"{f.severity}: ", _STYLES[f.severity]), f.what)
        yield Text(f"      evidence: {f.evidence}", "dim")
        yield Text(f"      fix: {f.fix}")
