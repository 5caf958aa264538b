"""A stub's way to find a needle: a code that stands in a long prompt, asked for at its end.

The stub's own words are hashes and hold no code, so what it finds is its whole answer. ``Recaller`` counts how many are
asked for at once: an engine may be told to forget only then, as was seen in the field.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

_ASKED = re.compile(r"What is the code of (\w+ \w+)\?")


def find(prompt: str) -> str | None:
    """The code that the prompt asks for and tells; None where it asks for none."""
    asked = _ASKED.findall(prompt)
    told = re.search(rf"The code of {re.escape(asked[-1])} is (\w+)\.", prompt) if asked else None
    return told[1] if told else None


@dataclass(slots=True)
class Ask:
    """One search. ``peak`` is how many were under way at once at the most while it was."""

    code: str
    peak: int = 0


@dataclass(slots=True)
class Recaller:
    _under_way: list[Ask] = field(default_factory=list)

    @contextmanager
    def asked(self, code: str) -> Iterator[Ask]:
        ask = Ask(code)
        self._under_way.append(ask)
        for other in self._under_way:
            other.peak = max(other.peak, len(self._under_way))
        try:
            yield ask
        finally:
            self._under_way.remove(ask)
