"""What others do, each true to its original in deciding who is awake when.

All of them use this box's own sleep and wake, not the stop and start of their originals: what is compared is the
decision, not how fast an engine moves. None of them reads service times or the future. Engines that do not fit beside
each other are told apart by bytes; the originals have groups, or no GPUs at all.
"""

from collections.abc import Callable, Iterable
from math import inf, sqrt

from rotator.core.values import Depth, Level, State
from rotator.sim.box import Box
from rotator.sim.events import Quiet, Victim

_MOVING = (State.DRAINING, State.FALLING_ASLEEP, State.WAKING, State.STARTING, State.STOPPING)


def wishes(box: Box) -> list[int]:
    """Engines that somebody waits for and that neither serve nor move, the longest wait first."""
    wanted = [e for e, state in enumerate(box.state) if state in (State.ASLEEP, State.STOPPED) and box.is_wanted(e)]
    return sorted(wanted, key=lambda e: -box.oldest_wait_s(e))


def in_the_way(box: Box, engine: int, order: Callable[[int], float]) -> list[int] | None:
    """Awake engines to make room, the first by ``order`` first and no more than needed; None while a swap is under way
    on a GPU of the engine, or of one that would have to yield."""
    spec, free, claimed = box.specs[engine], box.free_bytes(), box.claimed()
    if not claimed.isdisjoint(spec.gpus):
        return None
    asleep = box.state[engine] is State.ASLEEP
    lacking = {}
    for i, gpu in enumerate(spec.gpus):
        size = spec.awake_bytes[i] - (spec.residue_bytes[i] if asleep else 0)
        lacking[gpu] = size - free[gpu]
    chosen: list[int] = []
    awake = [e for e, s in enumerate(box.state) if s is State.AWAKE and not box.specs[e].pinned]
    for e in sorted(awake, key=order):
        other = box.specs[e]
        if any(lacking.get(gpu, 0) > 0 for gpu in other.gpus):
            chosen.append(e)
            for i, gpu in enumerate(other.gpus):
                if gpu in lacking:
                    lacking[gpu] -= other.awake_bytes[i] - other.residue_bytes[i]
    if any(size > 0 for size in lacking.values()):
        return None
    if any(not claimed.isdisjoint(box.specs[e].gpus) for e in chosen):
        return None
    return chosen


def yielding(box: Box, engines: Iterable[int], drain_s: float = inf) -> tuple[Victim, ...]:
    """Victims that sleep at level 1; the least recently used sleepers are stopped where host RAM is short."""
    victims: list[Victim] = []
    free = box.machine.host_bytes - box.host_used
    sleepers = [e for e, depth in enumerate(box.depth) if depth is Depth.HOST and box.state[e] is State.ASLEEP]
    sleepers = sorted((e for e in sleepers if not box.is_wanted(e)), key=lambda e: box.used_at[e])
    for e in engines:
        free -= box.specs[e].host_bytes
        while free < 0 and sleepers:
            dropped = sleepers.pop(0)
            free += box.specs[dropped].host_bytes
            victims.append(Victim(dropped, None))
        victims.append(Victim(e, Level.HOST if free >= 0 else Level.DISCARD, drain_s))
    return tuple(victims)


class FirstCome(Quiet):
    """Swap on demand in order of arrival, with an idle timeout: what llama-swap's FIFO scheduler does.

    Of github.com/mostlygeek/llama-swap, internal/router/scheduler/fifo.go: a request for a loaded model is served at
    once (the fast path, also past older requests for others); one for a model that is being loaded joins its load; one
    whose load would stop a busy model waits until that one has nothing in flight; the queue is walked in order whenever
    a load ends or a model runs idle. A model unused for its ``ttl`` is unloaded (llama-swap's default: never).
    """

    def __init__(self, idle_s: float | None = None) -> None:
        self._idle_s = idle_s

    def decide(self, box: Box) -> None:
        for engine in wishes(box):
            victims = in_the_way(box, engine, lambda e: box.awake_since[e])
            if victims is not None and not any(box.in_flight(e) for e in victims):
                box.swap(engine, yielding(box, victims), freeze=False)
        if self._idle_s is not None:
            self._unload_idle(box, self._idle_s)

    def _unload_idle(self, box: Box, idle_s: float) -> None:
        for e, state in enumerate(box.state):
            if state is not State.AWAKE or box.in_flight(e) or not box.claimed().isdisjoint(box.specs[e].gpus):
                continue
            due_s = max(box.used_at[e], box.awake_since[e]) + idle_s
            if due_s <= box.now:
                box.swap(None, yielding(box, [e]), freeze=False)
            else:
                box.ask_at(due_s)


class LeastRecent(Quiet):
    """A cache of models: the longest wait is served next, the least recently used engine makes room.

    Unlike first-come there is no fast path past a chosen victim: it is closed when it is chosen, and drains to its end.
    The eviction order is that of Ollama and of every LRU model cache.
    """

    def decide(self, box: Box) -> None:
        for engine in wishes(box):
            victims = in_the_way(box, engine, lambda e: box.used_at[e])
            if victims is None:
                return  # strictly in turn: nobody overtakes the longest wait
            box.swap(engine, yielding(box, victims), freeze=False)


class FixedSlices(Quiet):
    """Round robin: each wanted engine has the GPUs for a fixed slice, then the one that was served longest ago.

    The textbook's time slicing, with preemption: what is in flight at the end of a slice freezes. A slice ends early
    when its engine has nothing to do, and goes on while nobody else wants in.
    """

    def __init__(self, slice_s: float) -> None:
        self._slice_s = slice_s

    def decide(self, box: Box) -> None:
        for engine in sorted(wishes(box), key=lambda e: box.awake_since[e]):
            victims = in_the_way(box, engine, lambda e: box.awake_since[e])
            if victims is None:
                continue
            ends_s = [box.awake_since[e] + self._slice_s if box.in_flight(e) else 0.0 for e in victims]
            if max(ends_s, default=0.0) > box.now:
                box.ask_at(max(ends_s))
                continue
            box.swap(engine, yielding(box, victims, drain_s=0.0))


class KeepAlive(FirstCome):
    """Keep-alive and pre-warming by histograms of idle times.

    After M. Shahrad et al., "Serverless in the Wild", USENIX ATC 2020, section 4: for each application a histogram of
    idle times in bins of a minute up to four hours. Where it says something (enough samples, few beyond its range, and
    its bins' coefficient of variation at least 2) the application is unloaded after a use, loaded again before the
    5th percentile of the idle times (less a margin of 10 %), and kept until the 99th (plus 10 %). Where it says
    nothing the application is kept for the whole range; where most idle times lie beyond it, the next one is forecast
    and the application loaded 15 % before (the paper forecasts by ARIMA; here by the mean of the last ten).

    The paper never lacks memory. Here a request for another engine evicts, in first-come's order: those out of their
    keep-alive first, then who has longest to the end of its window. A pre-warm happens only into free room.
    """

    notes_arrivals = True
    BIN_S, BINS, SAMPLES_MIN, CV_MIN, BEYOND_MAX = 60.0, 240, 5, 2.0, 0.5
    HEAD, TAIL, MARGIN, FORECAST_MARGIN = 0.05, 0.99, 0.1, 0.15

    def __init__(self, engines: int, scale: float = 1.0) -> None:
        """``scale`` multiplies the bins: for traces whose time was scaled by the same factor."""
        super().__init__()
        self._bin_s = self.BIN_S * scale
        self._bins = [[0] * self.BINS for _ in range(engines)]
        self._beyond: list[list[float]] = [[] for _ in range(engines)]
        self._ended_s: list[float | None] = [None] * engines
        self._windows: list[tuple[float, float]] = [(0.0, self._bin_s * self.BINS)] * engines

    def arrived(self, box: Box, engine: int) -> None:
        ended_s = self._ended_s[engine]
        if ended_s is None or box.in_flight(engine) or box.waiting[engine]:
            return  # an idle time lies between the end of all work and the next request
        idle_s = box.now - ended_s
        place = int(idle_s / self._bin_s)
        if place < self.BINS:
            self._bins[engine][place] += 1
        else:
            self._beyond[engine].append(idle_s)
        self._windows[engine] = self._window(engine)

    def ended(self, box: Box, engine: int, service_s: float) -> None:
        self._ended_s[engine] = box.now

    def decide(self, box: Box) -> None:
        for engine in wishes(box):
            victims = in_the_way(box, engine, lambda e: -self._until_s(e))
            if victims is not None and not any(box.in_flight(e) for e in victims):
                box.swap(engine, yielding(box, victims), freeze=False)
        for e, ended_s in enumerate(self._ended_s):
            if ended_s is not None and box.claimed().isdisjoint(box.specs[e].gpus):
                self._keep_or_prewarm(box, e, ended_s)

    def _until_s(self, engine: int) -> float:
        ended_s = self._ended_s[engine] or 0.0
        return ended_s + self._windows[engine][1]

    def _keep_or_prewarm(self, box: Box, e: int, ended_s: float) -> None:
        state, (prewarm_s, keep_s) = box.state[e], self._windows[e]
        begins_s, until_s = ended_s + prewarm_s, ended_s + keep_s
        if state is State.AWAKE and not box.in_flight(e):
            if box.now >= until_s or (prewarm_s > 0 and ended_s >= box.awake_since[e] and box.now < begins_s):
                box.swap(None, yielding(box, [e]), freeze=False)
            box.ask_at(until_s if box.now < until_s else inf)
        elif state is State.ASLEEP and prewarm_s > 0 and not box.is_wanted(e):
            if box.now < begins_s:
                box.ask_at(begins_s)
            elif box.now < until_s and in_the_way(box, e, lambda _: 0.0) == []:
                box.swap(e, unasked=True)

    def _window(self, engine: int) -> tuple[float, float]:
        """Pre-warm and keep-alive, in seconds after the end of the last work."""
        bins, beyond, bin_s = self._bins[engine], self._beyond[engine], self._bin_s
        inside = sum(bins)
        whole = (0.0, bin_s * self.BINS)
        if inside + len(beyond) < self.SAMPLES_MIN:
            return whole
        if len(beyond) > self.BEYOND_MAX * (inside + len(beyond)):
            next_s = sum(beyond[-10:]) / len(beyond[-10:])
            return next_s * (1 - self.FORECAST_MARGIN), next_s * (1 + self.FORECAST_MARGIN)
        mean = inside / self.BINS
        spread = sqrt(sum((n - mean) ** 2 for n in bins) / self.BINS)
        if mean == 0 or spread / mean < self.CV_MIN:
            return whole
        head, tail = self._percentile(bins, inside, self.HEAD), self._percentile(bins, inside, self.TAIL)
        return head * bin_s * (1 - self.MARGIN), (tail + 1) * bin_s * (1 + self.MARGIN)

    @staticmethod
    def _percentile(bins: list[int], total: int, share: float) -> int:
        """The first bin up to which ``share`` of all lie: rounded down for the head, its end taken for the tail."""
        seen = 0
        for place, number in enumerate(bins):
            seen += number
            if seen >= share * total:
                return place
        return len(bins) - 1
