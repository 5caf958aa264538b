"""What the stub's scheduler deals in."""

import asyncio
from dataclasses import dataclass, field

from rotator.demo import tokens


class CoreError(Exception):
    """The engine core cannot do it: HTTP 500."""


class BadArgument(Exception):
    """The caller asked for nonsense: HTTP 400."""


@dataclass(frozen=True, slots=True)
class Step:
    """One generated token with the distribution that it came from."""

    token_id: int
    logprob: float
    top: tuple[tokens.Candidate, ...]


@dataclass(frozen=True, slots=True)
class Finish:
    """stop, length, abort, or error (the core died)."""

    reason: str


@dataclass(slots=True)
class Sampling:
    max_tokens: int = 16
    temperature: float = 1.0
    seed: int | None = None
    ignore_eos: bool = False


@dataclass(slots=True)
class Stream:
    """One sequence. ``out`` is bounded by its own max_tokens."""

    id: int
    prompt_ids: list[int]
    sampling: Sampling
    seed: int
    out: "asyncio.Queue[Step | Finish]" = field(default_factory=asyncio.Queue)
    produced: list[int] = field(default_factory=list)
    slot: int = -1
    ready_at_s: float = 0.0
    computed: bool = False  # its state stands in the KV cache
    sample: bytes = b""  # the weights' bytes that it reads now


@dataclass(slots=True)
class Counters:
    prompt_tokens: int = 0
    generation_tokens: int = 0
    steps: int = 0
    drafts: int = 0  # of speculative decoding: one a token, where the stub is told how many are accepted
    accepted: float = 0.0
    requests: int = 0
    sleeps: int = 0
    wakes: int = 0
    sleep_s: float = 0.0
    wake_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Speed:
    tokens_per_s: float = 200.0  # of each stream
    prefill_tokens_per_s: float = 20_000.0
    running_max: int = 256
