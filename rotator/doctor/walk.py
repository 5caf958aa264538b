"""From the lowest layer up: gather what a layer needs, judge it, stop at the first that is broken."""

import asyncio
import logging
from collections.abc import Awaitable, Collection
from dataclasses import dataclass, replace
from typing import Any, Protocol

from rotator.config import FleetConfig
from rotator.doctor.facts import Facts
from rotator.doctor.findings import Finding, Severity
from rotator.doctor.layers import LAYERS, judge
from rotator.ports import RotatorError

PROBE_DEADLINE_S = 20.0
_LATER = ("software", "ports")  # their probes ask what the others found: GPUs, the ledger
_log = logging.getLogger(__name__)


class Probes(Protocol):
    """Gathers parts of Facts. What it raises becomes a trouble of that part."""

    def gather(self, part: str, known: Facts) -> Awaitable[Any]:
        """The value for that field of Facts; None where there is nothing to look at. ``known`` is what is there."""
        ...


@dataclass(frozen=True, slots=True)
class Examination:
    """What was looked at and found. ``stopped_at`` is the layer that is broken; ``skipped`` were not looked at."""

    findings: tuple[Finding, ...]
    looked_at: tuple[str, ...]
    skipped: tuple[str, ...] = ()
    stopped_at: str | None = None
    empty: tuple[str, ...] = ()  # of those looked at, where there was nothing to see

    @property
    def is_well(self) -> bool:
        return all(f.severity is Severity.NOTE for f in self.findings)


async def examine(
    probes: Probes,
    fleet: FleetConfig | None,
    *,
    only: Collection[str] = (),
    skip: Collection[str] = (),
    go_on: bool = False,
    deadline_s: float = PROBE_DEADLINE_S,
) -> Examination:
    """Walk the layers. ``go_on`` looks at all of them, whatever is broken; ``deadline_s`` bounds each part."""
    facts, found = Facts(fleet), list[Finding]()
    looked_at, skipped, empty = list[str](), list[str](), list[str]()
    stopped_at = None
    for layer in LAYERS:
        if (only and layer.name not in only) or layer.name in skip or (stopped_at and not go_on):
            skipped.append(layer.name)
            continue
        facts = await gather(probes, facts, layer.parts, deadline_s)
        new = judge(layer, facts)
        looked_at.append(layer.name)
        if getattr(facts, layer.part) is None and layer.part not in facts.troubles:
            empty.append(layer.name)
        found += new
        if stopped_at is None and any(f.severity is Severity.BROKEN for f in new):
            stopped_at = layer.name
    return Examination(tuple(found), tuple(looked_at), tuple(skipped), None if go_on else stopped_at, tuple(empty))


async def gather(probes: Probes, facts: Facts, parts: Collection[str], deadline_s: float) -> Facts:
    """``facts`` with these parts, side by side, each bounded. What fails or hangs is told in ``troubles``."""
    wanted = [part for part in dict.fromkeys(parts) if getattr(facts, part) is None and part not in facts.troubles]
    for wave in ([p for p in wanted if p not in _LATER], [p for p in wanted if p in _LATER]):
        answers = await asyncio.gather(*(_one(probes, part, facts, deadline_s) for part in wave))
        values = {part: value for part, value, trouble in answers if trouble is None}
        troubles = {part: trouble for part, _, trouble in answers if trouble is not None}
        facts = replace(facts, **values, troubles={**facts.troubles, **troubles})
    return facts


async def _one(probes: Probes, part: str, facts: Facts, deadline_s: float) -> tuple[str, Any, str | None]:
    try:
        async with asyncio.timeout(deadline_s):
            return part, await probes.gather(part, facts), None
    except TimeoutError:
        return part, None, f"no answer within {deadline_s:g} s"
    except (RotatorError, OSError, ValueError) as e:
        return part, None, str(e) or type(e).__name__
    except Exception as e:  # a probe's own fault must not hide what the others found
        _log.debug("probe of %s", part, exc_info=True)
        return part, None, f"the probe itself failed: {e!r}"
