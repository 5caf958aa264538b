"""Whether an engine that was woken is still the one that was launched: it must answer as it did then.

At launch a golden record is taken: one greedy probe and seeded sampled ones, each asked twice, since only what an
engine repeats by itself can be asked of it later. After a wake the greedy probe and one sampled probe must answer the
same: token ids equal, log-probabilities within the tolerance.

Two honest engines may still differ in a token. Streams that were frozen resume together with the canary, the batch is
another one, and sums are rounded in another order:

- greedy: where the golden record's runner-up was within the tolerance, either token is right, and what follows hangs
  on it. The comparison ends there, passed.
- sampled: a draw near a boundary may fall to the other side. Where the distribution there still peaks as it did, that
  is no proof against the engine, but none for it: a spare probe with another seed decides.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rotator.config import CanaryConfig
from rotator.ports import EngineControl, EngineRefused, Generation, Probe

GOLDEN_FORM = 1
SEEDS = (20_011, 20_021, 20_023)  # the first is asked after each wake, the others are spares
SAMPLED_TEMPERATURE = 0.8
_GARBAGE_TOKEN = 0  # "!" in many vocabularies, and what the argmax of NaNs is


@dataclass(frozen=True, slots=True)
class Verdict:
    """``reason`` is in words, also of a pass that needs one (a near-tie, a spare probe)."""

    ok: bool
    reason: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """``differs_at`` is the first position whose token differs, None where none does."""

    ok: bool
    reason: str = ""
    differs_at: int | None = None


Ask = Callable[[Mapping[str, Any]], Awaitable[Comparison]]


async def record(control: EngineControl, url: str, model: str, config: CanaryConfig) -> dict[str, Any]:
    """Take the golden record of a launch, as JSON values. Every generation has ``config.deadline_s``.
    Raises EngineRefused where the engine answers garbage at its very launch, EngineTimeout, EngineUnreachable."""
    probes = [_probe(config, None), *(_probe(config, seed) for seed in SEEDS)]
    entries: list[dict[str, Any]] = []
    for probe in probes:
        first = await control.generate(url, model, probe, deadline_s=config.deadline_s)
        if why := garbage(first):
            raise EngineRefused(f"the engine at {url} answers garbage from its launch on: {why}", 200)
        again = await control.generate(url, model, probe, deadline_s=config.deadline_s)
        entries.append(_entry(probe, first, again, config.logprob_tolerance))
    return {
        "form": GOLDEN_FORM,
        "model": model,
        "prompt": config.prompt,
        "tokens": config.tokens,
        "greedy": entries[0],
        "sampled": entries[1:],
        "repeatable": all(entry["repeats"] == len(entry["token_ids"]) for entry in entries),
    }


def needs_recording(golden: Mapping[str, Any] | None, model: str, config: CanaryConfig) -> bool:
    """Whether there is no golden record that fits model and settings (the tolerance may change without a new one)."""
    wanted = {"form": GOLDEN_FORM, "model": model, "prompt": config.prompt, "tokens": config.tokens}
    return golden is None or any(golden.get(key) != value for key, value in wanted.items())


async def check(
    control: EngineControl, url: str, model: str, golden: Mapping[str, Any], config: CanaryConfig
) -> Verdict:
    """Judge a woken engine within ``config.deadline_s`` in all. An answer that is refused as unfit (NaN, an error
    status) is a verdict; no answer is not: raises EngineTimeout, EngineUnreachable."""
    began_s = asyncio.get_running_loop().time()

    async def ask(entry: Mapping[str, Any]) -> Comparison:
        spent_s = asyncio.get_running_loop().time() - began_s
        probe = _probe(config, entry["seed"])
        left_s = max(0.0, config.deadline_s - spent_s)
        return compare(entry, await control.generate(url, model, probe, deadline_s=left_s), config.logprob_tolerance)

    try:
        outcome = await ask(golden["greedy"])
        if outcome.ok:
            outcome = await _check_sampled(ask, golden["sampled"], outcome)
    except EngineRefused as e:
        outcome = Comparison(False, str(e))
    return Verdict(outcome.ok, outcome.reason, asyncio.get_running_loop().time() - began_s)


async def _check_sampled(ask: Ask, entries: Sequence[Mapping[str, Any]], so_far: Comparison) -> Comparison:
    """One sampled probe; its spares are asked only while each differs in a way that an honest engine may."""
    drawn = 0
    for entry in entries:
        if entry["repeats"] == 0:
            continue
        outcome: Comparison = await ask(entry)
        if not outcome.ok or outcome.differs_at is None:
            return outcome if not outcome.ok or outcome.reason else so_far
        drawn += 1
    if drawn == 0:
        return so_far
    return Comparison(False, f"{drawn} seeded sampled probes all drew other tokens than at launch", 0)


def compare(entry: Mapping[str, Any], now: Generation, tolerance: float) -> Comparison:
    """Compare an answer with one entry of the golden record, as far as the engine repeated itself at launch."""
    if why := garbage(now):
        return Comparison(False, f"it answers garbage: {why}")
    ids, logprobs, runners_up = entry["token_ids"], entry["logprobs"], entry["runner_up_logprobs"]
    if len(now.token_ids) != len(ids):
        return Comparison(False, f"{len(now.token_ids)} tokens instead of {len(ids)}")
    for at in range(entry["repeats"]):
        if now.token_ids[at] != ids[at]:
            return _differing(entry, now, at, tolerance)
        drift = abs(now.logprobs[at] - logprobs[at])
        if drift > tolerance:
            return Comparison(False, f"log-probability of token {at} is off by {drift:.3f} (allowed: {tolerance:g})")
    if entry["repeats"] == 0:
        return _same_peak(now, logprobs[0], runners_up[0], 0, tolerance)
    return Comparison(True)


def _differing(entry: Mapping[str, Any], now: Generation, at: int, tolerance: float) -> Comparison:
    golden_id, golden_logprob, runner_up = (
        entry["token_ids"][at],
        entry["logprobs"][at],
        entry["runner_up_logprobs"][at],
    )
    if entry["seed"] is not None:
        return _same_peak(now, golden_logprob, runner_up, at, tolerance)
    near_tie = runner_up is not None and golden_logprob - runner_up <= tolerance
    if near_tie and abs(now.logprobs[at] - golden_logprob) <= 2 * tolerance:
        return Comparison(True, f"token {at} was a near-tie at launch and fell to the other side", at)
    return Comparison(False, f"token {at} is {now.token_ids[at]} instead of {golden_id}", at)


def _same_peak(now: Generation, golden: float, golden_runner_up: float | None, at: int, tolerance: float) -> Comparison:
    """Whether the most likely token is as likely as it was, whichever token was drawn."""
    drift = abs(_peak(now.logprobs[at], now.runner_up_logprobs[at]) - _peak(golden, golden_runner_up))
    if drift > tolerance:
        return Comparison(False, f"the distribution of token {at} peaks otherwise, by {drift:.3f}", at)
    return Comparison(True, f"token {at} was drawn otherwise from the same distribution", at)


def _peak(logprob: float, runner_up: float | None) -> float:
    return logprob if runner_up is None else max(logprob, runner_up)


def garbage(generation: Generation) -> str:
    """Why an answer is garbage whatever was expected, '' where it is not."""
    if not generation.token_ids:
        return "no tokens"
    values = (*generation.logprobs, *(r for r in generation.runner_up_logprobs if r is not None))
    if any(value != value or value in (float("inf"), float("-inf")) for value in values):
        return "log-probabilities that are not finite"
    text = generation.text.strip()
    if text and not text.strip("!"):
        return f"text of nothing but '!' ({text[:16]!r})"
    if len(generation.token_ids) > 1 and set(generation.token_ids) == {_GARBAGE_TOKEN}:
        return "token id 0 again and again"
    return ""


def _probe(config: CanaryConfig, seed: int | None) -> Probe:
    temperature = 0.0 if seed is None else SAMPLED_TEMPERATURE
    return Probe(prompt=config.prompt, max_tokens=config.tokens, temperature=temperature, seed=seed)


def _entry(probe: Probe, first: Generation, again: Generation, tolerance: float) -> dict[str, Any]:
    return {
        "seed": probe.seed,
        "token_ids": list(first.token_ids),
        "logprobs": list(first.logprobs),
        "runner_up_logprobs": list(first.runner_up_logprobs),
        "text": first.text,
        "repeats": _repeats(first, again, tolerance),
    }


def _repeats(first: Generation, again: Generation, tolerance: float) -> int:
    """How many leading tokens an undisturbed engine gave twice."""
    same = 0
    steps = zip(first.token_ids, again.token_ids, first.logprobs, again.logprobs, strict=False)
    for id_first, id_again, logprob_first, logprob_again in steps:
        if id_first != id_again or abs(logprob_first - logprob_again) > tolerance:
            break
        same += 1
    return same
