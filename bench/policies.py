"""How good rotation policies are on traces: ``python -m bench.policies STUDY [--trace FILE] [--policy NAME ...]``.

Studies: ``field`` (a public trace, given by --trace), ``shipped`` (examples/traces/day.csv) and ``pair`` (two heavy
engines whose requests come in chains, planner then coder; made on the spot). All on examples/traces/box.yaml.

Every study takes the second half of the requests, its gaps scaled so that the load is 10 to 95 % of saturation.
Saturation is the load at which the clairvoyant planner delays requests by ten times their service on the mean: beyond
it its queue only grows. Where a baseline has a number to set (a slice's length, an idle timeout), the first half at the
same load chooses it, by mean delay.

Results are kept in docs/policies/STUDY.json, with machine, date and commit, and drawn beside it as SVG. With --policy
only the named are measured anew and the others stay as they were. ``report`` prints the tables of docs/policies.md.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.planner import machine as where
from rotator import config
from rotator.config import FleetConfig
from rotator.sim.generate import Shape, generate
from rotator.sim.machine import Machine, machine_of
from rotator.sim.plot import Chart, Line, svg
from rotator.sim.policies import make, replay
from rotator.sim.report import Result
from rotator.sim.trace import Trace, read
from rotator.sim.workload import Workload, assign, at_load, load

BOX = Path("examples/traces/box.yaml")
SHIPPED = Path("examples/traces/day.csv")
OUT = Path("docs/policies")
SHARES = (0.5, 0.1, 0.25, 0.75, 0.9, 0.95)
CHOICES = {
    "ours": ("ours",),
    "first-come": ("first-come", "first-come:60", "first-come:300"),
    "lru": ("lru",),
    "slices": ("slices:15", "slices:30", "slices:60", "slices:120", "slices:240"),
    "histogram": ("histogram",),
    "most-served": ("most-served",),
    "clairvoyant": ("clairvoyant",),
}
BASELINES = ("first-come", "lru", "slices", "histogram")
SATURATED_TIMES = 10.0  # mean delay over mean service
PAIR = Shape(
    duration_s=2 * 86_400, rate_per_s=0.06, models=2, skew=0.5, burst=3, gap_s=40, service_s=20, spread=0.7,
    chain=0.7, day=0.6, seed=11,
)  # fmt: skip


class Study:
    """One data set on one machine, from 10 to 95 % of its saturation."""

    def __init__(self, name: str, trace: Trace, fleet: FleetConfig) -> None:
        self.name = name
        self.fleet = fleet
        self.machine: Machine = machine_of(fleet)
        whole = assign(trace, self.machine)
        self.left_out = whole.left_out
        self.first, self.second = whole.halves()

    def run(self, policy: str, work: Workload, scale: float) -> Result:
        chosen = make(policy, self.machine, self.fleet.policies, time_scale=scale)
        return replay(policy, chosen, self.machine, work)

    def scaled(self, half: Workload, capacity: float) -> tuple[Workload, float]:
        """The half at that share of the slots' capacity, and by what its time was scaled."""
        work = at_load(half, self.machine, capacity)
        return work, load(half, self.machine) / capacity

    def saturation(self) -> float:
        """Share of the slots' capacity at which the clairvoyant planner saturates, to 5 %.

        Where its own rule saturates is found first: that is quick, and the planner is never much better.
        """
        rule = self._saturates("most-served", 0.02, 2.0)
        return self._saturates("clairvoyant", rule / 1.05, rule * 1.5)

    def _saturates(self, policy: str, low: float, high: float) -> float:
        """By halving: it does not saturate at ``low``, and does at ``high``."""
        service_s = sum(self.second.service_s) / len(self.second)
        while high / low > 1.05:
            middle = (low * high) ** 0.5
            work, scale = self.scaled(self.second, middle)
            delay_s = self.run(policy, work, scale).delay_mean_s
            print(f"{self.name} {policy}: {middle:.3f} of the slots: delayed by {delay_s:.0f} s", file=sys.stderr)
            low, high = (low, middle) if delay_s > SATURATED_TIMES * service_s else (middle, high)
        return float((low * high) ** 0.5)

    def measure(self, policy: str, share: float, saturation: float) -> Result:
        """The policy at a share of saturation, its number chosen on the first half."""
        names = CHOICES[policy]
        if len(names) > 1:
            tuning, scale = self.scaled(self.first, share * saturation)
            names = (min(names, key=lambda name: self.run(name, tuning, scale).delay_mean_s),)
        work, scale = self.scaled(self.second, share * saturation)
        return self.run(names[0], work, scale)


def study(name: str, trace: Path | None) -> Study:
    fleet = config.load(BOX)
    if name == "pair":
        heavy = tuple(e for e in fleet.engines if len(e.gpus) > 1)[:2]
        return Study(name, generate(PAIR), fleet.model_copy(update={"engines": heavy}))
    if name == "field" and trace is None:
        raise SystemExit("field needs --trace FILE: see docs/policies.md for where it comes from")
    return Study(name, read(trace or SHIPPED), fleet)


# -- measuring and keeping ---------------------------------------------------------------------------------------------


def measure(one: Study, policies: Sequence[str], shares: Sequence[float], again: bool) -> dict[str, Any]:
    """Measure what is asked for; all else stays as the file has it."""
    path = OUT / f"{one.name}.json"
    kept: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    if again or "saturation" not in kept:
        kept["saturation"] = {"of_slots": one.saturation(), **_now()}
    kept["requests"] = {"reported": len(one.second), "tuned": len(one.first), "left_out": one.left_out}
    saturation = kept["saturation"]["of_slots"]
    for share in shares:
        for policy in policies:
            found = one.measure(policy, share, saturation)
            print(f"{one.name} {share:.0%} {found.policy}: delay {found.delay_mean_s:.1f} s", file=sys.stderr)
            row = {key: _round(value) for key, value in found.as_json().items()}
            kept["rows"].setdefault(policy, {})[f"{share:g}"] = {**row, **_now()}
            path.write_text(json.dumps(kept, indent=1) + "\n")
    return kept


def _round(value: Any) -> Any:
    if isinstance(value, tuple):
        return [round(v, 2) for v in value]
    return round(value, 4) if isinstance(value, float) else value


def _now() -> dict[str, str]:
    about = where()
    return {"date": about["date"][:10], "commit": about["commit"][:10], "machine": about["machine"]}


# -- showing -----------------------------------------------------------------------------------------------------------


def draw(name: str, kept: Mapping[str, Any]) -> None:
    """Mean delay over load, and the distribution at half of saturation."""
    lines = [
        Line(
            policy,
            [(100 * float(share), max(row["delay_mean_s"], 0.1)) for share, row in _rows(kept, policy)],
            policy == "ours",
        )
        for policy in _measured(kept)
    ]
    chart = Chart(f"{name}: mean delay", "load, % of saturation", "mean delay, s", lines, log_y=True)
    (OUT / f"{name}-load.svg").write_text(svg(chart))
    halves = {policy: kept["rows"][policy]["0.5"]["delays_s"] for policy in _measured(kept, "0.5")}
    lines = [
        Line(policy, [(max(s, 0.1), float(i)) for i, s in enumerate(delays)], policy == "ours")
        for policy, delays in halves.items()
    ]
    chart = Chart(f"{name}: delay of requests at half of saturation", "delay, s", "% of requests", lines, log_x=True)
    (OUT / f"{name}-half.svg").write_text(svg(chart))


def _measured(kept: Mapping[str, Any], share: str | None = None) -> list[str]:
    """The policies that were measured (at that share), in one order everywhere."""
    rows = kept["rows"]
    return [policy for policy in CHOICES if policy in rows and (share is None or share in rows[policy])]


def _rows(kept: Mapping[str, Any], policy: str) -> list[tuple[str, Any]]:
    return sorted(kept["rows"][policy].items(), key=lambda item: float(item[0]))


def tables(name: str, kept: Mapping[str, Any]) -> Iterator[str]:
    """Markdown: all policies at half of saturation, then mean delays over the load, then what was aimed at."""
    yield f"### {name}: at half of saturation\n"
    columns = "wait mean | p50 | p95 | p99 | max | stall mean | max | delay mean | p99 | < 60 s | swaps/h | GiB/h"
    yield f"| policy | {columns} | lost | fair |"
    yield "|---|" + "---:|" * 14
    for policy in _measured(kept, "0.5"):
        yield _line(policy, kept["rows"][policy]["0.5"])
    shares = sorted({share for rows in kept["rows"].values() for share in rows}, key=float)
    yield f"\n### {name}: mean delay in seconds (99th percentile) over the load, in % of saturation\n"
    yield "| policy | " + " | ".join(f"{float(s):.0%}" for s in shares) + " |"
    yield "|---|" + "---:|" * len(shares)
    for policy in _measured(kept):
        rows = kept["rows"][policy]
        cells = [f"{rows[s]['delay_mean_s']:.0f} ({rows[s]['delay_p99_s']:.0f})" if s in rows else "" for s in shares]
        yield f"| {policy} | " + " | ".join(cells) + " |"
    yield ""
    yield from _aims(kept)


def _line(policy: str, row: Mapping[str, Any]) -> str:
    seconds = ("wait_mean_s", "wait_p50_s", "wait_p95_s", "wait_p99_s", "wait_max_s", "stall_mean_s", "stall_max_s")
    cells = [f"{row[key]:.1f}" for key in (*seconds, "delay_mean_s", "delay_p99_s")]
    rest = (f"{row['within_deadline']:.1%}", f"{row['swaps_per_h']:.1f}", f"{row['moved_gib_per_h']:.0f}")
    name = row["policy"] if row["policy"] != policy else policy
    return f"| {name} | " + " | ".join((*cells, *rest, f"{row['lost']:.2%}", f"{row['fairness']:.2f}")) + " |"


def _aims(kept: Mapping[str, Any]) -> Iterator[str]:
    """Ours over the best baseline at half of saturation, and over the clairvoyant planner."""
    rows = kept["rows"]
    half = {policy: rows[policy]["0.5"] for policy in _measured(kept, "0.5")}
    baselines = [p for p in BASELINES if p in half]
    if "ours" not in half or not baselines:
        return
    best = min(baselines, key=lambda p: half[p]["delay_mean_s"])
    ours, other = half["ours"], half[best]
    yield f"| ours at half of saturation | aim | over {other['policy']} | over clairvoyant |"
    yield "|---|---|---:|---:|"
    clear = half.get("clairvoyant")
    for text, aim, key in (
        ("wait, p99", "≤ 0.5", "wait_p99_s"),
        ("wait, mean", "≤ 0.7; ≤ 1.25", "wait_mean_s"),
        ("delay (wait + stall), mean", "≤ 0.7; ≤ 1.25", "delay_mean_s"),
        ("delay, p99", "", "delay_p99_s"),
        ("swaps", "≤ 1", "swaps_per_h"),
    ):
        against = f"{ours[key] / clear[key]:.2f}" if clear and clear[key] else ""
        yield f"| {text} | {aim} | {ours[key] / max(other[key], 1e-9):.2f} | {against} |"
    longest_s = max(row["gate_max_s"] for row in rows["ours"].values())
    yield f"\nThe longest that ours let anybody wait for an engine to open, at any of these loads: {longest_s:.0f} s."


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.policies", description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=("field", "shipped", "pair", "report"))
    parser.add_argument("--trace", type=Path, help="the field study's CSV")
    parser.add_argument("--policy", action="append", choices=tuple(CHOICES), help="measure only these anew")
    parser.add_argument("--share", action="append", type=float, help="of saturation; all if absent")
    parser.add_argument("--saturation", action="store_true", help="find the saturation anew")
    args = parser.parse_args(argv)
    OUT.mkdir(exist_ok=True)
    if args.study == "report":
        for path in sorted(OUT.glob("*.json")):
            kept = json.loads(path.read_text())
            draw(path.stem, kept)
            print("\n".join(tables(path.stem, kept)), end="\n\n")
        return 0
    one = study(args.study, args.trace)
    kept = measure(one, args.policy or tuple(CHOICES), args.share or SHARES, args.saturation)
    draw(args.study, kept)
    print("\n".join(tables(args.study, kept)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
