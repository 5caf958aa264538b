"""The stub's language model: every token is a function of weights, prompt and position, of nothing else.

A chain of hashes plays the part of the network. Weights come in twice: their digest starts the chain, and each step
reads a few bytes of them again, so that lost or altered weights change what is said. Weights that read as zero say
what a network full of NaNs says: token 0, "!", for ever.
"""

import hashlib
import math
import zlib
from dataclasses import dataclass

VOCABULARY = 4096
GARBAGE = 0
EOS = 1
STATE_BYTES = 16
SAMPLE_BYTES = 8
_EOS_ODDS = 96
_CANDIDATES_MAX = 20
_ONSETS = ["b", "d", "f", "g", "h", "j", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z"]
_RIMES = ("a", "e", "i", "o")
_SYLLABLES = tuple(onset + rime for onset in _ONSETS for rime in _RIMES)


@dataclass(frozen=True, slots=True)
class Candidate:
    token_id: int
    logprob: float


def tokenize(text: str) -> list[int]:
    """One id a word: enough of a tokenizer for prompts, which are only ever hashed and counted."""
    return [zlib.crc32(word.encode()) % (VOCABULARY - 2) + 2 for word in text.split()] or [2]


def token_text(token_id: int) -> str:
    if token_id == GARBAGE:
        return "!"
    if token_id == EOS:
        return ""
    return f" {_SYLLABLES[token_id // 64 % 64]}{_SYLLABLES[token_id % 64]}"


def first_state(weights_digest: bytes, prompt_ids: list[int]) -> bytes:
    return _hash(weights_digest, repr(prompt_ids).encode())


def next_state(state: bytes, token_id: int) -> bytes:
    return _hash(state, token_id.to_bytes(4, "little"))


def weights_offset(state: bytes, weights_bytes: int) -> int:
    """Which bytes of the weights this step reads."""
    return int.from_bytes(state[:6], "little") % max(1, weights_bytes - SAMPLE_BYTES)


def candidates(state: bytes, weights_sample: bytes, *, allow_eos: bool) -> tuple[Candidate, ...]:
    """The distribution of the next token, most likely first; the probabilities halve from the second on."""
    if not any(weights_sample) or not any(state):
        return tuple(Candidate(GARBAGE + i, -math.log(VOCABULARY)) for i in range(_CANDIDATES_MAX))
    bits = _hash(state, weights_sample, size=64)
    ends = allow_eos and bits[0] % _EOS_ODDS == 0
    peak = 0.45 + 0.5 * int.from_bytes(bits[1:3], "little") / 0xFFFF
    found: dict[int, float] = {EOS: peak} if ends else {}
    for i in range(3, 61, 2):
        if len(found) == _CANDIDATES_MAX:
            break
        token_id = int.from_bytes(bits[i : i + 2], "little") % (VOCABULARY - 2) + 2
        found.setdefault(token_id, (1 - peak) * 0.5 ** len(found) if found else peak)
    return tuple(Candidate(token_id, math.log(p)) for token_id, p in found.items())


def choose(options: tuple[Candidate, ...], temperature: float, seed: int, position: int) -> Candidate:
    """The greedy choice at temperature 0, else a draw that seed and position alone decide."""
    if temperature <= 0:
        return options[0]
    weights = [math.exp(option.logprob / temperature) for option in options]
    draw = int.from_bytes(_hash(f"{seed}/{position}".encode())[:7], "little") / (1 << 56) * sum(weights)
    for option, weight in zip(options, weights, strict=True):
        draw -= weight
        if draw < 0:
            return option
    return options[-1]


def vector(state: bytes, weights_sample: bytes, dimensions: int) -> list[float]:
    """An embedding of unit length. Zero weights embed as zeros."""
    if not any(weights_sample):
        return [0.0] * dimensions
    raw = hashlib.shake_128(state + weights_sample).digest(2 * dimensions)
    values = [int.from_bytes(raw[i : i + 2], "little", signed=True) / 32768 for i in range(0, len(raw), 2)]
    norm = math.sqrt(sum(v * v for v in values))
    return [v / norm for v in values]


def _hash(*parts: bytes, size: int = STATE_BYTES) -> bytes:
    digest = hashlib.blake2b(digest_size=size)
    for part in parts:
        digest.update(part)
    return digest.digest()
