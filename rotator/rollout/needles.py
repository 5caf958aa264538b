"""Prompts with a needle each: long, all different, the same every time. What was asked for is to be in the answer.

Wrong answers were seen in the field only where 8 to 16 long prompts were computed at once; one at a time, the same
model answered right. So what counts is that all of a batch come back.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_SUBJECTS = (
    "The harbour master",
    "A travelling surveyor",
    "The night ferry",
    "An old cartographer",
    "The granary keeper",
    "A retired signalman",
    "The upper mill",
    "A visiting botanist",
)
_VERBS = ("recorded", "repaired", "measured", "painted", "described", "counted", "inspected", "carried")
_OBJECTS = (
    "the copper lamps",
    "seven crates of oranges",
    "a broken sundial",
    "the western bridge",
    "a ledger of tides",
    "the stone staircase",
    "three brass compasses",
    "a coil of tarred rope",
)
_PLACES = (
    "beside the canal",
    "after the autumn rain",
    "before the market opened",
    "under a clear sky",
    "near the chapel",
    "in the second week of March",
    "on the road to the coast",
    "while the bells rang",
)
_WORDS_A_SENTENCE = 11  # about: what the sentences above come to
_SEPARATORS = re.compile(r"[\s,._'\u2009\u202f-]")


@dataclass(frozen=True, slots=True)
class Needle:
    """``key`` names the vault that ``prompt`` asks for, ``code`` is the answer."""

    key: str
    code: str
    prompt: str


@dataclass(frozen=True, slots=True)
class Recall:
    """Of one batch: how many were asked at once, which numbers did not come back, and the start of such an answer."""

    asked: int
    missed: tuple[int, ...] = ()
    example: str = ""

    def as_dict(self) -> dict[str, Any]:
        return {"asked": self.asked, "missed": list(self.missed), "example": self.example}


def batch(count: int, words: int, seed: int = 1) -> tuple[Needle, ...]:
    """``count`` prompts of about ``words`` words, their needles at depths spread over the whole length."""
    return tuple(_needle(number, count, words, seed) for number in range(count))


def _needle(number: int, count: int, words: int, seed: int) -> Needle:
    # No secret is drawn here: the same batch every time is what makes versions comparable.
    chance = random.Random(f"{seed}/{count}/{number}")
    key = f"{chance.choice('ABCDEFGHKLMNPRSTUVWXYZ')}{chance.randrange(10, 99)}"
    code = str(chance.randrange(1_000_000, 10_000_000))
    lines = [_sentence(chance) for _ in range(max(2, words // _WORDS_A_SENTENCE))]
    depth = (number + 0.5) / count
    lines.insert(round(depth * len(lines)), f"The code of vault {key} is {code}.")
    question = (
        f"Everything above is a chronicle. It tells the code of vault {key}. "
        f"What is the code of vault {key}? Answer with the seven digits only."
    )
    return Needle(key, code, f"Chronicle {number} of {count}. {' '.join(lines)}\n\n{question}")


def _sentence(chance: random.Random) -> str:
    parts = (_SUBJECTS, _VERBS, _OBJECTS, _PLACES)
    return f"{' '.join(chance.choice(words) for words in parts)}, page {chance.randrange(1, 999)}."


def judge(needles: Sequence[Needle], answers: Sequence[str]) -> Recall:
    """A code counts as found however its digits are grouped."""
    missed = tuple(
        number
        for number, (needle, answer) in enumerate(zip(needles, answers, strict=True))
        if needle.code not in _SEPARATORS.sub("", answer)
    )
    example = f"needle {missed[0]}: '{' '.join(answers[missed[0]].split())[:160]}'" if missed else ""
    return Recall(len(needles), missed, example)
