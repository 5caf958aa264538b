"""What the demo found out, as a table for people and one JSON object for programs."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from rotator.demo.client import Outcome

_GIB = 1 << 30


def summarize(
    outcomes: Sequence[Outcome],
    engines: Sequence[Mapping[str, Any]],
    check: Mapping[str, Any],
    counts: Mapping[str, int],
    problems: Sequence[str],
) -> dict[str, Any]:
    """The JSON object. ``counts`` has swaps, canaries_passed and canaries_failed, as the event stream told them."""
    names = {alias: e["name"] for e in engines for alias in (e["name"], *e["aliases"])}
    by_engine: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        by_engine[names[outcome.model]].append(outcome)
    return {
        "requests": len(outcomes),
        "failed": sum(o.failed is not None for o in outcomes),
        "lost": sum(o.lost is not None or not o.done for o in outcomes),
        "swaps": counts["swaps"],
        "wakes": sum(e["wakes"] for e in engines),
        "sleeps": sum(e["sleeps"] for e in engines),
        "ledger_matches_devices": bool(check["matches"]),
        "canaries_passed": counts["canaries_passed"],
        "canaries_failed": counts["canaries_failed"],
        "problems": [*problems, *check["differences"], *_errors(outcomes)],
        "engines": [_engine(e, by_engine[e["name"]]) for e in engines],
    }


def is_good(result: Mapping[str, Any]) -> bool:
    return not (result["failed"] or result["lost"] or result["canaries_failed"] or result["problems"])


def _errors(outcomes: Sequence[Outcome]) -> list[str]:
    return [f"{o.model}: {o.failed or o.lost}" for o in outcomes if o.failed or o.lost]


def _engine(engine: Mapping[str, Any], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    waits = sorted(o.waited_s for o in outcomes)
    return {
        "name": engine["name"],
        "gpus": list(engine["gpu_indices"]),
        "state": engine["state"],
        "requests": len(outcomes),
        "waited_p50_s": round(_quantile(waits, 0.50), 3),
        "waited_p99_s": round(_quantile(waits, 0.99), 3),
        "wakes": engine["wakes"],
        "sleeps": engine["sleeps"],
        "bytes_moved": engine["bytes_moved"],
        "canary": engine["canary"],
    }


def _quantile(ordered: Sequence[float], q: float) -> float:
    """Nearest rank; 0 where there is nothing."""
    return ordered[min(len(ordered) - 1, round(q * (len(ordered) - 1)))] if ordered else 0.0


def show(result: Mapping[str, Any], console: Console) -> None:
    table = Table(title="What each model got", title_justify="left", box=None, padding=(0, 1, 0, 0))
    table.add_column("model", no_wrap=True)
    table.add_column("GPUs", no_wrap=True)
    for name in ("asked", "wait p50", "wait p99", "wakes", "moved", "canary", "now"):
        table.add_column(name, justify="right", no_wrap=True)
    for engine in result["engines"]:
        table.add_row(
            engine["name"],
            _span(engine["gpus"]),
            str(engine["requests"]),
            f"{engine['waited_p50_s']:.2f} s",
            f"{engine['waited_p99_s']:.2f} s",
            str(engine["wakes"]),
            _size(engine["bytes_moved"]),
            engine["canary"],
            engine["state"],
        )
    console.print(table)
    _verdict(result, console)


def _span(gpus: Sequence[int]) -> str:
    whole = list(gpus) == list(range(gpus[0], gpus[-1] + 1))
    return f"{gpus[0]}-{gpus[-1]}" if whole and len(gpus) > 1 else ",".join(map(str, gpus))


def _size(size: int) -> str:
    return f"{size / _GIB:.0f} GiB" if size < 1000 * _GIB else f"{size / (1024 * _GIB):.1f} TiB"


def _verdict(result: Mapping[str, Any], console: Console) -> None:
    console.print(
        f"{result['requests']} requests, {result['swaps']} swaps, {result['wakes']} wakes, {result['sleeps']} sleeps, "
        f"{result['canaries_passed']} canaries passed, {result['canaries_failed']} failed"
    )
    equal = "=" if result["ledger_matches_devices"] else "≠"
    style = "bold green" if is_good(result) else "bold red"
    console.print(f"ledger {equal} devices, requests lost = {result['lost']}", style=style)
    for problem in result["problems"]:
        console.print(f"  {problem}", style="red")
