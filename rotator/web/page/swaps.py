"""Swaps as people see them: the journal's rows of each, together with what the stream of events told."""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

KEPT_MAX = 40
_ADMITS = ("wake", "start")
PHASES = ("drain", "sleep", "verify", "start", "wake", "canary")
_BAD_FIRST = ("failed", "abandoned", "open")


@dataclass(slots=True)
class SwapLine:
    id: str
    begun_wall_s: float
    ended_wall_s: float | None = None
    admit: str = ""
    admit_action: str = ""
    evicts: list[tuple[str, str]] = field(default_factory=list)  # (engine, what it does)
    reason: str = ""
    result: str = "open"
    error: str = ""
    phases_s: dict[str, float] = field(default_factory=dict)
    freed_bytes: int = 0
    taken_bytes: int = 0

    @property
    def total_s(self) -> float | None:
        if "total" in self.phases_s:
            return self.phases_s["total"]
        return None if self.ended_wall_s is None else self.ended_wall_s - self.begun_wall_s


def from_rows(rows: Iterable[Mapping[str, Any]], ended: Mapping[str, Mapping[str, Any]]) -> list[SwapLine]:
    """Newest first. ``rows`` are of the journal; ``ended`` is what ``swap.ended`` said, by the swap's id."""
    lines: OrderedDict[str, SwapLine] = OrderedDict()
    results: dict[str, list[str]] = {}
    for row in rows:
        if row["action"] == "adopt" or not row["swap_id"]:
            continue
        line = lines.setdefault(row["swap_id"], SwapLine(row["swap_id"], row["opened_at_wall_s"]))
        results.setdefault(line.id, []).append(row["result"])
        _take(line, row)
    for line in lines.values():
        _conclude(line, results[line.id], ended.get(line.id))
    return sorted(lines.values(), key=lambda s: -s.begun_wall_s)[:KEPT_MAX]


def _take(line: SwapLine, row: Mapping[str, Any]) -> None:
    line.begun_wall_s = min(line.begun_wall_s, row["opened_at_wall_s"])
    if row["closed_at_wall_s"] is not None:
        line.ended_wall_s = max(line.ended_wall_s or 0.0, row["closed_at_wall_s"])
    line.error = line.error or row["error"] or ""
    line.reason = line.reason or (row["plan"] or {}).get("reason") or row["reason"]
    for name, value in (row["phases_s"] or {}).items():
        line.phases_s[name] = max(value, line.phases_s.get(name, 0.0))
    if row["action"] in _ADMITS:
        line.admit, line.admit_action = row["engine"], row["action"]
        if row["result"] == "ok":
            line.taken_bytes += max(0, sum(((row["plan"] or {}).get("admit") or {}).get("bytes_per_gpu", {}).values()))
    else:
        line.evicts.append((row["engine"], row["action"]))
        before, after = row["bytes_before"] or {}, row["bytes_after"] or {}
        line.freed_bytes += sum(max(0, size - after[gpu]) for gpu, size in before.items() if gpu in after)


def _conclude(line: SwapLine, results: list[str], told: Mapping[str, Any] | None) -> None:
    line.result = next((bad for bad in _BAD_FIRST if bad in results), "ok")
    if told:
        line.phases_s = {**told["phases_s"], **line.phases_s}
        line.error = line.error or told["error"] or ""
    if line.result == "open":
        line.ended_wall_s = None
