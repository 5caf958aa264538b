"""Whether a new version is as good as the old one: judgements over numbers, in words where it is not."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

TTFT_SLACK_S = 0.05  # what scheduling alone changes in a short time to first token
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Version:
    """What an engine is: the parts of it that make answers and speed what they are."""

    model: str
    vllm: str
    bundle: str
    image: str
    profile: str
    spec_hash: str

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    @property
    def words(self) -> str:
        named = (("vLLM", self.vllm), ("bundle", self.bundle), ("image", self.image), ("profile", self.profile))
        return ", ".join(f"{name} {value}" for name, value in named if value) or f"spec {self.spec_hash}"


@dataclass(frozen=True, slots=True)
class Speed:
    """Medians through the gateway: tokens a second after the first, and seconds to the first."""

    tokens_per_s: float
    ttft_s: float
    samples: int

    @classmethod
    def of(cls, samples: Sequence[tuple[float, float]]) -> "Speed":
        """From (tokens a second, seconds to the first token) of each answer; at least one."""
        return cls(median(s[0] for s in samples), median(s[1] for s in samples), len(samples))

    @classmethod
    def known(cls, facts: Mapping[str, Any]) -> "Speed":
        return cls(float(facts["tokens_per_s"]), float(facts["ttft_s"]), int(facts["samples"]))


def slower(old: Speed, new: Speed, tolerance: float) -> str:
    """Why the new version is slower than the old one allows, '' where it is not. ``tolerance`` is a share."""
    if new.tokens_per_s < old.tokens_per_s * (1 - tolerance):
        return f"{new.tokens_per_s:.1f} tokens/s, and the version before made {old.tokens_per_s:.1f}"
    if new.ttft_s > old.ttft_s * (1 + tolerance) + TTFT_SLACK_S:
        return f"{new.ttft_s:.3f} s to the first token, and the version before took {old.ttft_s:.3f} s"
    return ""


def forgets(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]], *, as_before: bool) -> str:
    """Why a version's recall is not good enough. With ``as_before`` it may miss as many as the old one at that size."""
    allowed = {int(one["asked"]): len(one["missed"]) if as_before else 0 for one in old}
    for one in new:
        missed = len(one["missed"])
        if missed > allowed.get(int(one["asked"]), 0):
            before = next((len(o["missed"]) for o in old if o["asked"] == one["asked"]), None)
            beside = f" (the version before missed {before})" if before is not None else ""
            return f"{missed} of {one['asked']} concurrent needles did not come back{beside}; {one['example']}"
    return ""


def grows(residues: Sequence[Sequence[int]], tolerance_gib: float) -> str:
    """Why what stays on a GPU over sleeps is not stable. One list of bytes a GPU for each cycle."""
    for gpu, values in enumerate(zip(*residues, strict=False)):
        growth = max(values) - values[0]
        if growth > tolerance_gib * GIB:
            cycle = values.index(max(values)) + 1
            return (
                f"asleep, {growth / GIB:.2f} GiB more stayed on its GPU {gpu} in cycle {cycle} than in the first "
                f"({values[0] / GIB:.2f} GiB)"
            )
    return ""
