"""``rotator soak``: the whole service against everything that fails, seed after seed."""

import os
import sys
import time
from typing import Annotated, Any

import typer

from rotator.cli.errors import OK, PROBLEM
from rotator.cli.options import AsJson, print_json

SAY_EVERY_S = 5.0

Seeds = Annotated[int, typer.Option("--seeds", min=1, help="how many seeds to run")]
First = Annotated[int, typer.Option("--from", min=0, help="the first of them")]
Jobs = Annotated[int | None, typer.Option("--jobs", min=1, help="processes side by side; one a core if absent")]
Replay = Annotated[int | None, typer.Option("--replay", min=0, help="run this seed alone and show what happened")]
Shrink = Annotated[bool, typer.Option("--shrink", help="make a failing seed's script as small as it still fails")]


def soak(
    seeds: Seeds = 1000,
    first: First = 1,
    jobs: Jobs = None,
    replay: Replay = None,
    shrink: Shrink = False,
    as_json: AsJson = False,
) -> None:
    """Run the service under virtual time while everything around it fails. Exit code 1 if an invariant broke."""
    if replay is not None:
        raise typer.Exit(_replay(replay, shrink))
    from rotator.sim.faults.soak import Summary, run_many  # every part of the service: other commands start without

    summary, began_s, said_s = Summary(), time.monotonic(), time.monotonic()
    for outcome in run_many(range(first, first + seeds), jobs or os.cpu_count() or 1):
        summary.add(outcome)
        if outcome.failure is not None:
            _say_failure(outcome.seed, outcome.failure)
        if time.monotonic() - said_s >= SAY_EVERY_S:
            said_s = time.monotonic()
            rate = summary.seeds / (said_s - began_s)
            typer.echo(f"{summary.seeds} of {seeds} seeds, {rate:.1f} a second", err=True)
    took_s = time.monotonic() - began_s
    if as_json:
        print_json(_as_json(summary, took_s))
    else:
        _print(summary, took_s)
    if shrink and summary.failures:
        _shrunk(min(summary.failures))
    raise typer.Exit(PROBLEM if summary.failures else OK)


def _say_failure(seed: int, failure: tuple[str, str]) -> None:
    typer.echo(f"seed {seed} failed: {failure[0]}: {failure[1]}\n  rotator soak --replay {seed} --shrink")


def _replay(seed: int, shrink: bool) -> int:
    from rotator.sim.faults.generate import make_script
    from rotator.sim.faults.run import run_script

    script = make_script(seed)
    outcome = run_script(script)
    typer.echo("\n".join((*script.lines(), *outcome.trace)))
    if outcome.failure is None:
        typer.echo(f"seed {seed} holds every invariant (trace {outcome.digest})")
        return OK
    _say_failure(seed, outcome.failure)
    typer.echo(f"trace {outcome.digest}: the same at every replay")
    if shrink:
        _shrunk(seed)
    return PROBLEM


def _shrunk(seed: int) -> None:
    from rotator.sim.faults.generate import make_script
    from rotator.sim.faults.run import run_script
    from rotator.sim.faults.shrink import breaks
    from rotator.sim.faults.shrink import shrink as make_smaller

    script = make_script(seed)
    failure = run_script(script).failure
    if failure is None:
        return
    sys.stdout.flush()
    small = make_smaller(script, breaks(failure[0]))
    typer.echo(f"\nseed {seed}, from {len(script.events)} events down to {len(small.events)}:")
    typer.echo("\n".join(small.lines()))
    typer.echo("\n".join(run_script(small).trace))


def _as_json(summary: Any, took_s: float) -> dict[str, Any]:
    return {
        "seeds": summary.seeds,
        "seconds": round(took_s, 1),
        "virtual_seconds": round(summary.virtual_s),
        "requests": dict(summary.requests),
        "injected": dict(summary.injected),
        "checks": dict(summary.checks),
        "failures": {seed: list(failure) for seed, failure in summary.failures.items()},
    }


def _print(summary: Any, took_s: float) -> None:
    lived = f"{summary.virtual_s / 3600:.1f} h of virtual time"
    typer.echo(f"{summary.seeds} seeds in {took_s:.0f} s ({summary.seeds / took_s:.1f} a second), {lived}")
    for title, counts in (
        ("requests, by how they ended", summary.requests),
        ("faults and commands, by kind", summary.injected),
        ("invariants, by how often they were checked", summary.checks),
    ):
        typer.echo(f"\n{title}:")
        for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
            typer.echo(f"  {count:>9}  {name}")
    typer.echo(
        f"\n{len(summary.failures)} seeds failed" + (f": {sorted(summary.failures)}" if summary.failures else "")
    )
