"""``rotator simulate`` and ``rotator trace``: policies against traces, without a GPU or a service."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group

from rotator import config
from rotator.cli import render
from rotator.cli.errors import PROBLEM, USAGE, fail
from rotator.cli.options import AsJson, print_json
from rotator.config import ConfigError, FleetConfig
from rotator.sim.generate import Shape, generate
from rotator.sim.machine import GPU_GIB_DEFAULT, MASTERS, STOCK, Machine, MachineError, machine_of
from rotator.sim.plot import Chart, Line, svg
from rotator.sim.policies import USUAL, PolicyError, make, replay
from rotator.sim.report import DEADLINE_S, Result
from rotator.sim.trace import TokenRates, Trace, TraceError, read, write
from rotator.sim.workload import Workload, assign, at_load, load, spread

TracePath = Annotated[Path, typer.Option("--trace", help="CSV: time, model, service seconds or tokens")]
FleetPath = Annotated[Path, typer.Option("--fleet", "-c", help="the fleet file")]
Policies = Annotated[
    list[str] | None, typer.Option("--policy", help=f"may be given again; {', '.join(USUAL)} if absent; or clairvoyant")
]
Places = Annotated[list[str] | None, typer.Option("--map", help="MODEL=ENGINE, may be given again; else by popularity")]
COSTS = {"stock": STOCK, "masters": MASTERS}


def simulate(
    trace: TracePath,
    fleet: FleetPath = Path("fleet.yaml"),
    policy: Policies = None,
    load_share: Annotated[
        float | None, typer.Option("--load", min=1e-6, max=100, help="scale time to this share of the slots' capacity")
    ] = None,
    half: Annotated[str, typer.Option("--half", help="first, second or all: which part of the trace")] = "all",
    deadline: Annotated[float, typer.Option("--deadline", min=0, help="seconds of delay that count as in time")] = (
        DEADLINE_S
    ),
    place: Places = None,
    fold: Annotated[bool, typer.Option("--fold", help="deal models beyond the last engine round")] = False,
    models: Annotated[int, typer.Option("--models", min=1, help="deal a trace of one model to so many")] = 1,
    skew: Annotated[float, typer.Option("--skew", min=0, help="by a Zipf law of this exponent")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="of that deal")] = 1,
    prefill: Annotated[float, typer.Option("--prefill", min=1e-3, help="prompt tokens a second")] = 8000.0,
    decode: Annotated[float, typer.Option("--decode", min=1e-3, help="generated tokens a second, one stream")] = 40.0,
    gpu_gib: Annotated[float, typer.Option("--gpu-gib", min=1, help="memory of each GPU")] = GPU_GIB_DEFAULT,
    costs: Annotated[str, typer.Option("--costs", help="stock, or masters: sleeps copy nothing")] = "stock",
    plot: Annotated[Path | None, typer.Option("--plot", help="write the delays' distribution as SVG")] = None,
    as_json: AsJson = False,
) -> None:
    """Replay a trace under this fleet's policy and others, and compare them."""
    try:
        loaded = config.load(fleet)
        machine = _machine(loaded, gpu_gib, costs)
        known = read(trace, TokenRates(prefill, decode))
        if models > 1:
            known = spread(known, models, skew, seed)
        work, scale = _work(known, machine, place or (), fold, half, load_share)
        names = policy or list(USUAL)
        chosen = [(name, make(name, machine, loaded.policies, time_scale=scale)) for name in names]
    except ConfigError as e:
        fail(PROBLEM, *e.problems)
    except (TraceError, MachineError) as e:
        fail(PROBLEM, str(e))
    except PolicyError as e:
        fail(USAGE, str(e))
    results = [replay(name, decider, machine, work, deadline_s=deadline) for name, decider in chosen]
    if plot is not None:
        _write(plot, svg(distribution(results)))
    if as_json:
        about = {"requests": len(work), "left_out": work.left_out, "failed": known.failed, "load": load(work, machine)}
        print_json({"trace": about, "policies": [r.as_json() for r in results]})
        return
    left = f", {work.left_out} for models without an engine left out" if work.left_out else ""
    typer.echo(
        f"{len(work)} requests{left}; {work.at_s[-1] / 3600:.1f} h of arrivals, "
        f"{100 * load(work, machine):.1f} % of what all slots could serve"
    )
    render.console().print(tables(results))


def trace(
    out: Annotated[Path, typer.Argument(help="the CSV to write")],
    duration: Annotated[float, typer.Option("--duration", help="hours")] = 24.0,
    rate: Annotated[float, typer.Option("--rate", help="requests a second, on the mean")] = 0.1,
    models: Annotated[int, typer.Option("--models", help="how many")] = 8,
    skew: Annotated[float, typer.Option("--skew", help="Zipf's exponent; 0: all models alike")] = 1.0,
    burst: Annotated[float, typer.Option("--burst", help="requests of a session, on the mean")] = 1.0,
    gap: Annotated[float, typer.Option("--gap", help="seconds between them")] = 10.0,
    service: Annotated[float, typer.Option("--service", help="median service seconds")] = 10.0,
    spread_: Annotated[float, typer.Option("--spread", help="sigma of their log-normal law; 0: all alike")] = 0.8,
    chain: Annotated[float, typer.Option("--chain", help="share of planners' requests that a coder's follows")] = 0.0,
    day: Annotated[float, typer.Option("--day", help="0 to 1: how much quieter the night is")] = 0.0,
    seed: Annotated[int, typer.Option("--seed", help="of all that is random in it")] = 1,
) -> None:
    """Make a synthetic trace."""
    shape = Shape(duration * 3600, rate, models, skew, burst, gap, service, spread_, chain, day, seed)
    try:
        made = generate(shape)
        write(made, out)
    except TraceError as e:
        fail(USAGE, str(e))
    typer.echo(f"{out}: {len(made)} requests for {len(made.models)} models over {made.span_s / 3600:.1f} h")


def _machine(loaded: FleetConfig, gpu_gib: float, costs: str) -> Machine:
    if costs not in COSTS:
        raise typer.BadParameter("is stock or masters", param_hint="--costs")
    return machine_of(loaded, gpu_gib=gpu_gib, costs=COSTS[costs])


def _work(
    known: Trace, machine: Machine, places: Sequence[str], fold: bool, half: str, share: float | None
) -> tuple[Workload, float]:
    """The workload, and by what its time was scaled."""
    if half not in ("first", "second", "all"):
        raise typer.BadParameter("is first, second or all", param_hint="--half")
    names = {}
    for pair in places:
        model, equals, engine = pair.partition("=")
        if not equals or engine not in machine.index() or model not in known.models:
            raise typer.BadParameter(f"'{pair}' is not MODEL=ENGINE of this trace and fleet", param_hint="--map")
        names[model] = engine
    work = assign(known, machine, names=names, fold=fold)
    if half != "all":
        work = work.halves()[half == "second"]
    if share is None:
        return work, 1.0
    scaled = at_load(work, machine, share)
    return scaled, scaled.at_s[-1] / max(work.at_s[-1], 1e-9)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as e:
        fail(PROBLEM, f"{path}: cannot be written ({e.strerror}): choose another path")


def tables(results: Sequence[Result]) -> Group:
    """The results side by side, for people: what requests saw, and what it cost."""
    late = f"<{results[0].deadline_s:g} s %#" if results else "in time %#"
    times = ("wait s", "p50 s", "p95 s", "p99 s", "max s", "gate s", "stall s", "delay s", "p99 s")
    costs = (late, "swaps/h#", "moved GiB", "lost %#", "freezes#", "fair#", "left#")
    seen = render.table("wait, stall (frozen) and delay (both) of requests", ("policy", *times), map(_times, results))
    paid = render.table("what it cost, per hour, and whom", ("policy", *costs), map(_costs, results))
    return Group(seen, "", paid)


def _times(r: Result) -> tuple[str, ...]:
    waits = (r.wait_mean_s, r.wait_p50_s, r.wait_p95_s, r.wait_p99_s, r.wait_max_s, r.gate_max_s)
    return (r.policy, *(f"{s:.1f}" for s in (*waits, r.stall_mean_s, r.delay_mean_s, r.delay_p99_s)))


def _costs(r: Result) -> tuple[str, ...]:
    shares = (f"{r.swaps_per_h:.1f}", f"{r.moved_gib_per_h:.0f}", f"{100 * r.lost:.2f}", str(r.freezes))
    return (r.policy, f"{100 * r.within_deadline:.1f}", *shares, f"{r.fairness:.2f}", str(r.unserved))


def distribution(results: Sequence[Result]) -> Chart:
    """How long requests are delayed: which share is delayed no longer."""
    lines = [
        Line(r.policy, [(max(s, 0.1), 100 * i / (len(r.delays_s) - 1)) for i, s in enumerate(r.delays_s)], i == 0)
        for i, r in enumerate(results)
    ]
    return Chart("Delay of requests: waiting and standing still", "delay, s", "% of requests", lines, log_x=True)
