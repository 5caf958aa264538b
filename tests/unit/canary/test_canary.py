"""The canary tells an engine that came back whole from one that did not, and does not mistake one for the other."""

import json
from collections.abc import Callable
from dataclasses import replace

import pytest

from rotator.config import CanaryConfig
from rotator.ports import EngineRefused, EngineTimeout, Generation, Probe
from rotator.service import canary

CONFIG = CanaryConfig(tokens=4, logprob_tolerance=0.25)
URL, MODEL = "http://127.0.0.1:1", "m"


def generation(
    ids: tuple[int, ...],
    logprobs: tuple[float, ...] | None = None,
    runners_up: tuple[float | None, ...] | None = None,
    text: str = "words",
) -> Generation:
    return Generation(ids, logprobs or (-0.1,) * len(ids), runners_up or (-4.0,) * len(ids), text)


def whole_engine(probe: Probe) -> Generation:
    return generation((7, 8, 9, 10) if probe.seed is None else (probe.seed, 8, 9, 10))


class Engine:
    """An EngineControl of which only generate is ever asked."""

    def __init__(self, answer: Callable[[Probe], Generation] = whole_engine) -> None:
        self.answer = answer
        self.asked: list[Probe] = []

    async def generate(self, url: str, model: str, probe: Probe, *, deadline_s: float) -> Generation:
        assert deadline_s > 0
        self.asked.append(probe)
        return self.answer(probe)


async def golden_of(engine: Engine) -> dict[str, object]:
    golden = await canary.record(engine, URL, MODEL, CONFIG)  # type: ignore[arg-type]
    return json.loads(json.dumps(golden))


async def verdict_of(golden: dict[str, object], answer: Callable[[Probe], Generation]) -> tuple[canary.Verdict, Engine]:
    engine = Engine(answer)
    return await canary.check(engine, URL, MODEL, golden, CONFIG), engine  # type: ignore[arg-type]


def greedy_only(changed: Generation) -> Callable[[Probe], Generation]:
    return lambda probe: changed if probe.seed is None else whole_engine(probe)


async def test_an_unchanged_engine_passes_with_one_greedy_and_one_seeded_sampled_probe() -> None:
    verdict, engine = await verdict_of(await golden_of(Engine()), whole_engine)
    assert verdict.ok
    assert [probe.seed for probe in engine.asked] == [None, canary.SEEDS[0]]
    assert engine.asked[0].temperature == 0
    assert engine.asked[1].temperature > 0


async def test_the_golden_record_survives_json_and_asks_every_probe_twice() -> None:
    engine = Engine()
    golden = await golden_of(engine)
    assert golden["repeatable"] is True
    assert len(engine.asked) == 2 * (1 + len(canary.SEEDS))
    assert golden["greedy"]["token_ids"] == [7, 8, 9, 10]  # type: ignore[index]


async def test_another_greedy_token_fails() -> None:
    verdict, _ = await verdict_of(await golden_of(Engine()), greedy_only(generation((7, 8, 99, 10))))
    assert not verdict.ok
    assert verdict.reason == "token 2 is 99 instead of 9"


async def test_equal_tokens_with_other_log_probabilities_fail() -> None:
    drifted = generation((7, 8, 9, 10), (-0.1, -0.1, -0.5, -0.1))
    verdict, _ = await verdict_of(await golden_of(Engine()), greedy_only(drifted))
    assert not verdict.ok
    assert "log-probability of token 2 is off by 0.400" in verdict.reason


async def test_log_probabilities_within_the_tolerance_pass() -> None:
    drifted = generation((7, 8, 9, 10), (-0.3, -0.1, -0.2, -0.1))
    verdict, _ = await verdict_of(await golden_of(Engine()), greedy_only(drifted))
    assert verdict.ok


async def test_a_near_tie_at_launch_may_fall_to_the_other_side() -> None:
    tied = generation((7, 8, 9, 10), (-0.1, -0.7, -0.1, -0.1), (-4.0, -0.8, -4.0, -4.0))
    golden = await golden_of(Engine(greedy_only(tied)))
    other_side = generation((7, 5, 1, 2), (-0.1, -0.75, -3.0, -3.0))
    verdict, _ = await verdict_of(golden, greedy_only(other_side))
    assert verdict.ok
    assert "near-tie" in verdict.reason


async def test_a_near_tie_does_not_excuse_a_token_that_was_no_part_of_it() -> None:
    tied = generation((7, 8, 9, 10), (-0.1, -0.7, -0.1, -0.1), (-4.0, -0.8, -4.0, -4.0))
    golden = await golden_of(Engine(greedy_only(tied)))
    verdict, _ = await verdict_of(golden, greedy_only(generation((7, 5, 1, 2), (-0.1, -6.0, -3.0, -3.0))))
    assert not verdict.ok


@pytest.mark.parametrize(
    "garbage",
    [
        generation((0, 0, 0, 0), text="!!!!"),
        generation((0, 0, 0, 0), text=""),
        generation((4, 5, 6, 7), text="!!!!"),
        generation((7, 8, 9, 10), (float("nan"), -0.1, -0.1, -0.1)),
        generation(()),
    ],
)
async def test_garbage_fails_a_check_and_is_refused_as_a_golden_record(garbage: Generation) -> None:
    verdict, _ = await verdict_of(await golden_of(Engine()), lambda probe: garbage)
    assert not verdict.ok
    assert "garbage" in verdict.reason
    with pytest.raises(EngineRefused, match="from its launch on"):
        await golden_of(Engine(lambda probe: garbage))


async def test_a_failure_that_hides_from_greedy_decoding_is_seen_by_the_sampled_probes() -> None:
    def broken_sampler(probe: Probe) -> Generation:
        return whole_engine(probe) if probe.seed is None else generation((1, 2, 3, 4))

    verdict, engine = await verdict_of(await golden_of(Engine()), broken_sampler)
    assert not verdict.ok
    assert "sampled probes all drew other tokens" in verdict.reason
    assert len(engine.asked) == 1 + len(canary.SEEDS)


async def test_one_draw_that_fell_otherwise_is_decided_by_a_spare_probe() -> None:
    def one_flip(probe: Probe) -> Generation:
        whole = whole_engine(probe)
        return replace(whole, token_ids=(3, 3, 3, 3)) if probe.seed == canary.SEEDS[0] else whole

    verdict, engine = await verdict_of(await golden_of(Engine()), one_flip)
    assert verdict.ok
    assert [probe.seed for probe in engine.asked] == [None, *canary.SEEDS[:2]]


async def test_a_sampled_distribution_that_peaks_otherwise_fails_at_once() -> None:
    def flat(probe: Probe) -> Generation:
        return whole_engine(probe) if probe.seed is None else generation((1, 2, 3, 4), (-5.0,) * 4, (-4.9,) * 4)

    verdict, engine = await verdict_of(await golden_of(Engine()), flat)
    assert not verdict.ok
    assert "peaks otherwise" in verdict.reason
    assert len(engine.asked) == 2


async def test_an_engine_that_does_not_repeat_itself_is_held_only_to_what_it_repeats() -> None:
    calls = 0

    def wavering(probe: Probe) -> Generation:
        nonlocal calls
        calls += 1
        return generation((7, 8, 9, 100 + calls))

    golden = await golden_of(Engine(wavering))
    assert golden["repeatable"] is False
    assert golden["greedy"]["repeats"] == 3  # type: ignore[index]
    assert (await verdict_of(golden, wavering))[0].ok
    assert not (await verdict_of(golden, lambda probe: generation((7, 8, 1, 1))))[0].ok


async def test_too_few_tokens_fail() -> None:
    verdict, _ = await verdict_of(await golden_of(Engine()), lambda probe: generation((7, 8)))
    assert (verdict.ok, verdict.reason) == (False, "2 tokens instead of 4")


async def test_a_refused_answer_is_a_verdict_and_a_missing_one_is_an_error() -> None:
    golden = await golden_of(Engine())

    def refuse(probe: Probe) -> Generation:
        raise EngineRefused("NaN", 200)

    def hang(probe: Probe) -> Generation:
        raise EngineTimeout("nothing")

    assert (await verdict_of(golden, refuse))[0] == canary.Verdict(False, "NaN", pytest.approx(0, abs=1))
    with pytest.raises(EngineTimeout):
        await verdict_of(golden, hang)


async def test_another_prompt_length_or_model_needs_a_new_golden_record_another_tolerance_does_not() -> None:
    golden = await golden_of(Engine())
    assert canary.needs_recording(None, MODEL, CONFIG)
    assert not canary.needs_recording(golden, MODEL, CONFIG)
    assert not canary.needs_recording(golden, MODEL, CONFIG.model_copy(update={"logprob_tolerance": 1.0}))
    assert canary.needs_recording(golden, "other", CONFIG)
    assert canary.needs_recording(golden, MODEL, CONFIG.model_copy(update={"prompt": "?"}))
    assert canary.needs_recording(golden, MODEL, CONFIG.model_copy(update={"tokens": 5}))
