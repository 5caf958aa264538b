"""What of turns and times cannot hold at once: fairness bounds, and windows that want the same bytes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from rotator.check.findings import Finding, error, warning
from rotator.check.planned import is_timed
from rotator.config import FleetConfig
from rotator.config_calendar import WindowConfig
from rotator.core.calendar import collisions
from rotator.core.fairness import contradictions
from rotator.core.values import Engine, Gpu, GpuId, Window
from rotator.crons import zone
from rotator.ports import Recovered

HORIZON_S = 62 * 86400.0  # two months: every day of a month, every weekday


def check_bounds(
    fleet: FleetConfig, engines: Sequence[Engine], gpus: Mapping[GpuId, Gpu], known: Recovered | None
) -> Iterator[Finding]:
    """Bounds that cannot be kept under full load. Warnings: the service keeps what it can."""
    guessed = not all(is_timed(e, known) for e in engines)
    note = " (swaps that were not measured yet are taken as 2 s)" if guessed else ""
    for line in contradictions(engines, fleet.policies.core(), gpus):
        yield Finding(f"policies: {line}{note}", is_error=False)


@dataclass(slots=True)
class _Clash:
    """One window's engine that is in another's way, again and again."""

    first_wall_s: float
    text: str
    meant: bool  # the priorities differ: somebody decided who wins
    times: list[float] = field(default_factory=list)


def check_calendar(
    fleet: FleetConfig, engines: Sequence[Engine], gpus: Mapping[GpuId, Gpu], now_wall_s: float
) -> Iterator[Finding]:
    """Windows that overlap and do not fit together, with the times at which they collide from now on."""
    by_name = {e.name: e for e in engines}
    configs = {f"window '{w.name}'": w for w in fleet.calendar.windows}
    found: dict[tuple[str, str, tuple[str, ...]], _Clash] = {}
    windows = list(_windows(fleet, now_wall_s))
    for at_s, window, engine, conflict in collisions(gpus, by_name, windows):
        if not conflict.others or at_s < now_wall_s:
            continue  # too large by itself: that is told elsewhere
        holders = [w for w in windows if w.begins_s <= at_s < w.ends_s and set(w.engines) & set(conflict.others)]
        meant = bool(holders) and all(w.priority > window.priority for w in holders)
        clash = found.setdefault((window.name, engine, conflict.others), _Clash(at_s, conflict.text, meant))
        clash.times.append(at_s)
    for (name, engine, _), clash in found.items():
        yield _finding(fleet, configs[name], engine, clash)


def _finding(fleet: FleetConfig, window: WindowConfig, engine: str, clash: _Clash) -> Finding:
    where = zone(window.timezone or fleet.calendar.timezone)
    first = datetime.fromtimestamp(clash.first_wall_s, where).strftime("%a %Y-%m-%d %H:%M %Z")
    again = f" and {len(clash.times) - 1} more times within two months" if len(clash.times) > 1 else ""
    place = f"calendar: window '{window.name}'"
    problem = f"{engine} cannot be kept awake from {first}{again}: {clash.text}"
    if clash.meant:
        return warning(place, problem, "fine if the higher priority is meant to win; else change the times")
    return error(place, problem, "change the times, or give one a higher priority to say who wins")


def _windows(fleet: FleetConfig, now_wall_s: float) -> Iterator[Window]:
    """Every time of every window within the horizon; of one that comes less often, its next."""
    for window, recurrence in fleet.calendar.recurrences:
        spans = list(recurrence.spans(now_wall_s, now_wall_s + HORIZON_S))
        if not spans and (following := recurrence.next_after(now_wall_s)) is not None:
            spans = [following]
        said = f"window '{window.name}'"
        for span in spans:
            yield Window(said, window.engines, span.begins_wall_s, span.ends_wall_s, window.priority)
