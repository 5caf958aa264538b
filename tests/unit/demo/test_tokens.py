"""The stub's language model is a function of weights, prompt and position."""

import math

import pytest

from rotator.demo import tokens
from rotator.demo.memory import (
    KV,
    WEIGHTS,
    DeviceFault,
    PlainMemory,
    load_weights,
    spoil_weights,
    weights_digest,
)
from rotator.demo.misbehave import Misbehaviour

SAMPLE = b"12345678"


def loaded(seed: str = "m", ranks: int = 2) -> list[PlainMemory]:
    made = [PlainMemory() for _ in range(ranks)]
    load_weights(made, seed)
    return made


def test_probabilities_are_a_distribution_with_the_most_likely_first() -> None:
    state = tokens.first_state(b"weights", [1, 2, 3])
    options = tokens.candidates(state, SAMPLE, allow_eos=False)
    probabilities = [math.exp(option.logprob) for option in options]
    assert sum(probabilities) <= 1 + 1e-9
    assert probabilities == sorted(probabilities, reverse=True)
    assert len({option.token_id for option in options}) == len(options)


def test_another_prompt_other_weights_or_another_sample_say_something_else() -> None:
    def greedy(digest: bytes, prompt: list[int], sample: bytes) -> list[int]:
        state, said = tokens.first_state(digest, prompt), []
        for _ in range(4):
            said.append(tokens.candidates(state, sample, allow_eos=False)[0].token_id)
            state = tokens.next_state(state, said[-1])
        return said

    base = greedy(b"w", [1], SAMPLE)
    assert greedy(b"w", [1], SAMPLE) == base
    assert greedy(b"w", [2], SAMPLE) != base
    assert greedy(b"v", [1], SAMPLE) != base
    assert greedy(b"w", [1], b"87654321") != base


@pytest.mark.parametrize(("state", "sample"), [(bytes(16), SAMPLE), (b"x" * 16, bytes(8))])
def test_weights_or_caches_that_read_as_zero_say_exclamation_marks(state: bytes, sample: bytes) -> None:
    said = tokens.candidates(state, sample, allow_eos=True)[0]
    assert tokens.token_text(said.token_id) == "!"


def test_a_draw_hangs_on_seed_and_position_and_greedy_on_neither() -> None:
    options = tokens.candidates(tokens.first_state(b"w", [1]), SAMPLE, allow_eos=False)
    draws = {seed: tokens.choose(options, 1.0, seed, 0).token_id for seed in range(200)}
    assert draws == {seed: tokens.choose(options, 1.0, seed, 0).token_id for seed in range(200)}
    assert len(set(draws.values())) > 1
    assert {tokens.choose(options, 0.0, seed, 0) for seed in range(50)} == {options[0]}


def test_every_token_but_the_end_has_a_text_of_its_own() -> None:
    texts = {tokens.token_text(token_id) for token_id in range(2, tokens.VOCABULARY)}
    assert len(texts) == tokens.VOCABULARY - 2
    assert tokens.token_text(tokens.EOS) == ""


def test_weights_come_from_the_seed_and_the_rank_alone() -> None:
    assert weights_digest(loaded("a")) == weights_digest(loaded("a"))
    assert weights_digest(loaded("a")) != weights_digest(loaded("b"))
    first, second = loaded("a")
    assert first.read(WEIGHTS, 0, 64) != second.read(WEIGHTS, 0, 64)


@pytest.mark.parametrize("zero", [True, False])
def test_spoilt_weights_have_another_digest(zero: bool) -> None:
    ranks = loaded()
    before = weights_digest(ranks)
    spoil_weights(ranks, zero=zero)
    assert weights_digest(ranks) != before


def test_level_1_keeps_weights_level_2_loses_them_and_both_lose_the_cache() -> None:
    ranks = loaded(ranks=1)
    rank, before = ranks[0], weights_digest(ranks)
    rank.write(KV, 0, b"state")
    rank.sleep(1)
    with pytest.raises(DeviceFault, match="illegal memory access"):
        rank.read(WEIGHTS, 0, 1)
    rank.wake(frozenset({WEIGHTS}))
    assert rank.asleep() == {KV}
    rank.wake(frozenset({KV}))
    assert weights_digest(ranks) == before
    assert rank.read(KV, 0, 5) == bytes(5)
    rank.sleep(2)
    rank.wake(frozenset({WEIGHTS, KV}))
    assert not any(rank.read(WEIGHTS, 0, 1 << 16))


def test_a_misbehaviour_happens_always_or_once() -> None:
    always, once = Misbehaviour(lie_sleep=True), Misbehaviour(lie_sleep=True, once=True)
    assert [always.take("lie_sleep"), always.take("lie_sleep")] == [True, True]
    assert [once.take("lie_sleep"), once.take("lie_sleep")] == [True, False]
    assert not Misbehaviour().die("sleep")
    assert not Misbehaviour(die_at="wake").die("sleep")
