"""``rotator bench``: swap times of chosen models, and what clients see of them through the gateway."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.text import Text

from rotator.cli import render
from rotator.cli.client import Client, engine_path
from rotator.cli.complete import engine_names
from rotator.cli.errors import OK, PROBLEM, REFUSED, CliError, fail
from rotator.cli.options import DEADLINE_DEFAULT_S, URL_DEFAULT, AsJson, Deadline, Key, Url, Yes, client, print_json

_MODELS = "engines' names or aliases, in turn; one alone sleeps in between"
PROMPT = "Write a long story about a lighthouse keeper who repairs clocks."


@dataclass(slots=True)
class Measured:
    """One model's rounds. Seconds; tokens a second are those after the first token."""

    model: str
    swap_s: list[float] = field(default_factory=list)
    phases_s: list[Mapping[str, float]] = field(default_factory=list)
    ttft_s: list[float] = field(default_factory=list)
    tokens_per_s: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        names = sorted({name for phases in self.phases_s for name in phases})
        phases = {n: _median([p[n] for p in self.phases_s if n in p]) for n in names}
        return {
            "swap_s": _median(self.swap_s),
            "phases_s": phases,
            "ttft_s": _median(self.ttft_s),
            "tokens_per_s": _median(self.tokens_per_s),
        }


_AWAY = ("stopped", "failed")  # nothing that could sleep: its first turn is a start


def _median(values: Sequence[float]) -> float | None:
    return median(values) if values else None


def bench(
    context: typer.Context,
    models: Annotated[list[str], typer.Argument(help=_MODELS, autocompletion=engine_names)],
    rounds: Annotated[int, typer.Option("--rounds", min=1, max=1000, help="how often each gets its turn")] = 3,
    tokens: Annotated[
        int, typer.Option("--tokens", min=0, max=100_000, help="to generate each time; 0: swaps alone")
    ] = 128,
    prompt: Annotated[str, typer.Option("--prompt", help="what is asked each time")] = PROMPT,
    deadline_s: Deadline = DEADLINE_DEFAULT_S,
    yes: Yes = False,
    url: Url = URL_DEFAULT,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Measure swaps, time to first token and tokens a second of a running service; medians over the rounds.

    Refused without --yes while the service has requests. Afterwards those that were awake are awake again.
    """
    service = client(context, url, key)
    before = service.get("/engines")
    names = [str(service.get(engine_path(m))["name"]) for m in models]
    if len(set(names)) < len(names):
        raise typer.BadParameter("names one engine twice", param_hint="MODELS")
    if not yes and (busy := [e["name"] for e in before if e["waiting"] or e["in_flight"]]):
        fail(REFUSED, f"{', '.join(busy)} has requests, and every turn here is taken from them: wait, or give --yes")
    found = {name: Measured(name) for name in names}
    try:
        for _ in range(rounds):
            for name in names:
                _turn(service, found[name], alone=len(names) == 1, tokens=tokens, prompt=prompt, deadline_s=deadline_s)
    finally:
        _put_back(service, before, deadline_s)
    if as_json:
        results = [{**asdict(m), "median": m.summary()} for m in found.values()]
        print_json({"rounds": rounds, "tokens": tokens, "models": results})
    else:
        render.console().print(shown(list(found.values())))
    raise typer.Exit(PROBLEM if any(m.errors for m in found.values()) else OK)


def _turn(service: Client, m: Measured, *, alone: bool, tokens: int, prompt: str, deadline_s: float) -> None:
    """Bring the model in and ask it once. What fails is noted, and the next round goes on."""
    try:
        state = service.get(engine_path(m.model))["state"]
        if alone and state not in _AWAY:
            _post(service, "/sleep", m.model, deadline_s)
        elif state == "awake":
            if tokens:  # it had nowhere to come from: there is no swap to measure
                _ask(service, m, prompt, tokens, deadline_s)
            return
        result = _post(service, "/wake", m.model, deadline_s)["results"][0]
        m.swap_s.append(float(result["seconds"]))
        m.phases_s.append(result["phases_s"])
        if tokens:
            _ask(service, m, prompt, tokens, deadline_s)
    except CliError as e:
        m.errors.append(str(e))


def _post(service: Client, path: str, model: str, deadline_s: float) -> Any:
    return service.post(path, {"model": model, "wait": True, "deadline_s": deadline_s}, deadline_s=deadline_s)


def _ask(service: Client, m: Measured, prompt: str, tokens: int, deadline_s: float) -> None:
    """One streamed answer. Raises CliError."""
    body = {
        "model": m.model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
        "stream_options": {"include_usage": True},
    }
    began_s, first_s, last_s, counted, pieces = time.monotonic(), 0.0, 0.0, 0, 0
    for chunk in service.stream("/v1/chat/completions", body, deadline_s=deadline_s):
        if "error" in chunk:
            raise CliError(PROBLEM, f"{m.model}: {chunk['error']}")
        counted = (chunk.get("usage") or {}).get("completion_tokens", counted)
        if any((c.get("delta") or {}).get(f) for c in chunk.get("choices") or () for f in _TEXT):
            last_s = time.monotonic()
            first_s = first_s or last_s
            pieces += 1
    if not pieces:
        raise CliError(PROBLEM, f"{m.model}: its answer had no tokens")
    m.ttft_s.append(first_s - began_s)
    if last_s > first_s:
        m.tokens_per_s.append(((counted or pieces) - 1) / (last_s - first_s))


_TEXT = ("content", "reasoning_content", "reasoning")


def _put_back(service: Client, before: Sequence[Mapping[str, Any]], deadline_s: float) -> None:
    """Wake again who was awake. That it cannot be is told, and hides no other error."""
    for engine in before:
        if engine["state"] != "awake":
            continue
        try:
            if service.get(engine_path(engine["name"]))["state"] != "awake":
                _post(service, "/wake", engine["name"], deadline_s)
        except CliError as e:
            typer.echo(f"rotator: {engine['name']} is not awake again: {e}", err=True)


def shown(found: Sequence[Measured]) -> Group:
    columns = ("model", "swaps#", "swap s", "phases, s", "answers#", "TTFT s", "tokens/s#")
    rows = []
    for m in found:
        s = m.summary()
        phases = ", ".join(f"{name} {took:.2f}" for name, took in s["phases_s"].items())
        pace = "–" if s["tokens_per_s"] is None else f"{s['tokens_per_s']:.1f}"
        rows.append((m.model, len(m.swap_s), _two(s["swap_s"]), phases or "–", len(m.ttft_s), _two(s["ttft_s"]), pace))
    table = render.table("medians", columns, rows)
    return Group(table, *(Text(f"  {m.model}: {e}", "red") for m in found for e in dict.fromkeys(m.errors)))


def _two(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
