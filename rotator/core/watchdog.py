"""Whether an engine that says it is well is well: what it did between two looks, against bounds and its own past.

An engine that hangs in a collective goes on answering /health. What it cannot do is move: no token, no step, no block
of its KV cache. So life is anything that moves, and standing still is only judged while somebody waits for it to move.

Why each bound is what it is:
  * Standing still alone condemns nobody. A prompt of many tokens in one chunk, a kernel or graph compiled at the first
    batch of its shape, a client's idle session: all of them hold every counter. So half the bound leads to a probe
    (one short generation); whoever answers it lives. Only who stood the whole bound and left a probe unanswered is
    wedged.
  * An engine that was launched lately compiles most: it has the longer bound.
  * Broadcast warnings of its workers (one a minute, while a rank does not take its turn) are a second witness: the
    bound is shorter with them. Alone they prove nothing, for a compilation causes them too.
  * An engine that sleeps, drains, wakes or starts is not looked at: its counters stand because they must. What it does
    then has deadlines of its own.
  * Throughput and acceptance are judged over windows, several in a row, against the median of its own earlier windows
    with about as many requests: a single odd window is traffic.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import pairwise
from math import log2
from statistics import median

SAMPLES_MAX = 64  # windows remembered of each load
_LOADS_MAX = 12  # loads are told apart by powers of two: up to 2048 requests at once


class Kind(StrEnum):
    WELL = "well"
    PROBE = "probe"  # ask it something: it may be wedged, or has not been heard for long
    WEDGED = "wedged"
    ACCEPTANCE = "acceptance"  # its draft tokens are hardly accepted any more
    SLOW = "slow"  # far below its own throughput


@dataclass(frozen=True, slots=True)
class Bounds:
    """See ``config_watchdog`` for what each means to an operator."""

    stall_s: float = 120.0
    stall_young_s: float = 300.0
    young_s: float = 600.0
    stall_warned_s: float = 60.0
    warnings_min: int = 1
    probe_every_s: float | None = 300.0
    window_s: float = 30.0
    windows: int = 6
    baseline_windows: int = 10
    throughput_share_min: float | None = 0.2
    acceptance_min: float | None = 0.02
    drafts_min: int = 200


@dataclass(frozen=True, slots=True)
class Vitals:
    """One look. Counters count since the launch; those that the engine does not tell stay 0. ``in_flight`` is what the
    gateway has sent there, ``running`` and ``waiting`` are the engine's own word, ``warnings`` are lines in its log."""

    at_s: float
    in_flight: int = 0
    running: int = 0
    waiting: int = 0
    generated: float = 0.0
    prompted: float = 0.0
    steps: float = 0.0
    kv_share: float = 0.0
    drafts: float = 0.0
    accepted: tuple[float, ...] = ()  # draft tokens accepted, by position
    warnings: int = 0

    @property
    def pulse(self) -> tuple[float, ...]:
        """Changes whenever its scheduler got anything done."""
        return self.generated, self.prompted, self.steps, self.kv_share


@dataclass(frozen=True, slots=True)
class Learned:
    """What is usual for this engine, over all its launches: tokens a second by load, accepted share by position."""

    rates: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    acceptance: tuple[float, ...] = ()  # median-like: moved a tenth of the way by each good window


@dataclass(frozen=True, slots=True)
class Track:
    """What is remembered of one engine between looks. A new one for each launch, ``resumed`` for each wake."""

    launched_at_s: float
    learned: Learned = field(default_factory=Learned)
    last: Vitals | None = None
    mark: Vitals | None = None  # where the window began
    still_since_s: float = 0.0
    heard_at_s: float = 0.0
    warnings_at_rest: int = 0  # when it last moved
    probes_failed: int = 0  # since it last moved
    slow_windows: int = 0
    poor_windows: int = 0

    def resumed(self, at_s: float, launched_at_s: float | None = None) -> "Track":
        """The same engine after a pause in which it was not looked at: clocks begin anew, what was learned stays."""
        began_s = self.launched_at_s if launched_at_s is None else launched_at_s
        return Track(began_s, self.learned, still_since_s=at_s, heard_at_s=at_s)

    def probed(self, at_s: float, answered: bool) -> "Track":
        """A probe ended. One that was answered is life, whatever the counters say (or do not)."""
        if answered:
            return replace(self, probes_failed=0, still_since_s=at_s, heard_at_s=at_s)
        return replace(self, probes_failed=self.probes_failed + 1)


@dataclass(frozen=True, slots=True)
class Verdict:
    kind: Kind
    reason: str = ""


WELL = Verdict(Kind.WELL)


def observe(track: Track, now: Vitals, bounds: Bounds) -> tuple[Track, Verdict]:
    """Take one look at an awake engine into account. The worst that is found is the verdict."""
    track = _pulse_taken(track, now)
    stall = _stall(track, now, bounds)
    if stall.kind is Kind.WEDGED:
        return track, stall
    track, window = _window(track, now, bounds)
    return track, stall if window.kind is Kind.WELL else window


def noticed_within_s(bounds: Bounds, *, every_s: float, probe_deadline_s: float, young: bool = False) -> float:
    """The longest that a wedge under work can go unnoticed: what tests and operators may rely on."""
    bound_s = bounds.stall_young_s if young else bounds.stall_s
    return max(bound_s, bound_s / 2 + every_s + probe_deadline_s) + 2 * every_s


# -- standing still ----------------------------------------------------------------------------------------------------


def _pulse_taken(track: Track, now: Vitals) -> Track:
    """Anything that moved is life; who has nothing to do and owes no answer cannot stand still."""
    moved = track.last is None or now.pulse != track.last.pulse
    idle = not (now.in_flight or now.running or now.waiting) and not track.probes_failed
    if moved:
        track = replace(track, heard_at_s=now.at_s, probes_failed=0)
    if moved or idle:
        track = replace(track, still_since_s=now.at_s, warnings_at_rest=now.warnings)
    reset = track.last is not None and now.generated < track.last.generated
    return replace(track, last=now, mark=None if reset else track.mark)


def _stall(track: Track, now: Vitals, bounds: Bounds) -> Verdict:
    stood_s, bound_s = now.at_s - track.still_since_s, _bound_s(track, now, bounds)
    warned = now.warnings - track.warnings_at_rest
    if stood_s >= bound_s and track.probes_failed:
        busy = max(now.in_flight, now.running, now.waiting)
        words = f"/health says 200, but no token, step or KV block moved for {stood_s:.0f} s with {busy} requests there"
        witness = f", its workers warned {warned} times that a rank does not take its turn" if warned else ""
        return Verdict(
            Kind.WEDGED, f"{words}, and {_probes(track.probes_failed)} unanswered{witness}; /health says 200"
        )
    if stood_s >= bound_s / 2:
        return Verdict(Kind.PROBE, f"nothing has moved for {stood_s:.0f} s")
    if bounds.probe_every_s is not None and now.at_s - track.heard_at_s >= bounds.probe_every_s:
        return Verdict(Kind.PROBE, f"nothing was heard of it for {now.at_s - track.heard_at_s:.0f} s")
    return WELL


def _probes(count: int) -> str:
    return "a probe went" if count == 1 else f"{count} probes went"


def _bound_s(track: Track, now: Vitals, bounds: Bounds) -> float:
    young = now.at_s - track.launched_at_s < bounds.young_s
    if now.warnings - track.warnings_at_rest >= bounds.warnings_min and not young:
        return min(bounds.stall_s, bounds.stall_warned_s)
    return bounds.stall_young_s if young else bounds.stall_s


# -- windows -----------------------------------------------------------------------------------------------------------


def _window(track: Track, now: Vitals, bounds: Bounds) -> tuple[Track, Verdict]:
    mark = track.mark
    if mark is None:
        return replace(track, mark=now), WELL
    if now.at_s - mark.at_s < bounds.window_s:
        return track, WELL
    track = replace(track, mark=now)
    track, poor = _acceptance(track, mark, now, bounds)
    track, slow = _throughput(track, mark, now, bounds)
    return track, poor if poor.kind is not Kind.WELL else slow


def _acceptance(track: Track, mark: Vitals, now: Vitals, bounds: Bounds) -> tuple[Track, Verdict]:
    """Draft weights that a wake did not bring back propose noise: the first position's acceptance falls to about 0."""
    drafts = now.drafts - mark.drafts
    if bounds.acceptance_min is None or drafts < bounds.drafts_min or not now.accepted:
        return track, WELL
    before = (*mark.accepted, *(0.0 for _ in now.accepted))
    shares = tuple((new - old) / drafts for new, old in zip(now.accepted, before, strict=False))
    if shares[0] >= bounds.acceptance_min:
        known = track.learned.acceptance or shares
        blended = tuple(old + 0.1 * (new - old) for old, new in zip(known, shares, strict=False))
        return replace(track, learned=replace(track.learned, acceptance=blended), poor_windows=0), WELL
    track = replace(track, poor_windows=track.poor_windows + 1)
    if track.poor_windows < bounds.windows:
        return track, WELL
    told = ", ".join(f"{share:.1%}" for share in shares)
    usual = ", ".join(f"{share:.1%}" for share in track.learned.acceptance) or "never seen well"
    reason = f"its draft tokens are accepted at {told} by position (usual: {usual}) for {track.poor_windows} windows"
    return track, Verdict(Kind.ACCEPTANCE, reason)


def _throughput(track: Track, mark: Vitals, now: Vitals, bounds: Bounds) -> tuple[Track, Verdict]:
    """Tokens a second against its own median at about this load. A slow window is not learned from."""
    load = _load(mark, now)
    if bounds.throughput_share_min is None or load is None:
        return replace(track, slow_windows=0), WELL
    rate = (now.generated - mark.generated + now.prompted - mark.prompted) / (now.at_s - mark.at_s)
    samples = track.learned.rates.get(load, ())
    usual = median(samples) if len(samples) >= bounds.baseline_windows else None
    if usual is None or rate >= bounds.throughput_share_min * usual:
        rates = {**track.learned.rates, load: (*samples, rate)[-SAMPLES_MAX:]}
        return replace(track, learned=replace(track.learned, rates=rates), slow_windows=0), WELL
    track = replace(track, slow_windows=track.slow_windows + 1)
    if track.slow_windows < bounds.windows:
        return track, WELL
    reason = f"{rate:.0f} tokens/s for {track.slow_windows} windows, usual at this load are {usual:.0f}"
    return track, Verdict(Kind.SLOW, reason)


def _load(mark: Vitals, now: Vitals) -> int | None:
    """Its load as a power of two; None where it was idle at either end or the load changed much in between."""
    least, most = sorted((mark.running, now.running))
    if least < 1 or most > 2 * least:
        return None
    return min(int(log2(most)), _LOADS_MAX - 1)


# -- residue -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ResidueBounds:
    growth_bytes: int = 4 << 30
    cycles_min: int = 2


def residue_growth(residues: tuple[int, ...], bounds: ResidueBounds) -> str:
    """Why an engine should be restarted for what it leaves behind asleep, '' where it need not. ``residues`` are bytes
    on its fullest GPU after each sleep since its launch, oldest first.

    Each cycle that leaves more than the one before takes room from whoever is awake meanwhile; seen in the field: 13
    to 69 GiB in four cycles (vLLM #21336), then garbage behind 200s. One jump may be a workspace that came to stay:
    growth must go on."""
    if len(residues) < bounds.cycles_min + 1:
        return ""
    least = min(residues[:-1])
    grown, rising = residues[-1] - least, sum(b > a for a, b in pairwise(residues))
    if grown < bounds.growth_bytes or rising < bounds.cycles_min:
        return ""
    cycles = len(residues) - 1
    return f"what it keeps asleep grew from {_gib(least)} to {_gib(residues[-1])} on a GPU in {cycles} cycles"


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB"
