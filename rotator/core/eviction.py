"""Who yields: the options an engine has for making room, what each costs, and the cheapest set that frees enough."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import gt

from rotator.core.costs import depth_of, wake_s
from rotator.core.hostram import HostBytes, clipped, fits, most, spread, total
from rotator.core.values import Action, Demand, Depth, Engine, GpuId, Level, Policy, State

EXACT_MAX = 12
"""Up to this many candidates the cheapest set is found by exact search; above, greedily: a search could take long."""


@dataclass(frozen=True, slots=True)
class Option:
    """One way in which one engine makes room. ``frees`` is in bytes, ``cost_s`` in seconds of waiting it causes."""

    engine: Engine
    action: Action
    level: Level | None
    frees: Mapping[GpuId, int]
    cost_s: float
    host_bytes: HostBytes = 0
    depth: Depth | None = None  # where the level does not say how deep it sleeps


def sleep_options(
    engine: Engine,
    charged: tuple[int, ...],
    policy: Policy,
    *,
    preferred_only: bool = False,
    wanted: Mapping[GpuId, int] | None = None,
) -> list[Option]:
    """An awake engine's ways to sleep, the preferred level first. No later one costs less than an earlier one.

    ``wanted`` are the bytes that somebody lacks: an engine that can free by bytes is first asked for no more than that.
    """
    lined_up = zip(engine.gpus, charged, engine.residue_bytes, strict=True)
    frees = {gpu: now - rest if now > rest else 0 for gpu, now, rest in lined_up}
    back, own = wanted_back(engine.demand), engine.sleep_cost_s + _interruption_s(engine, policy)
    options: list[Option] = []
    cost_s = 0.0
    if wanted and engine.elastic and policy.elastic and (least := _elastic(engine, charged, wanted, own, back)):
        options.append(least)
        cost_s = least.cost_s
    for level in engine.levels:
        if level is Level.PAUSE:
            continue  # frees nothing
        depth, host_bytes = None, engine.host_bytes if level is Level.HOST else 0
        if level is Level.HOST and engine.unified and (engine.has_disk or engine.can_stop):
            if not engine.has_disk:
                continue  # masters in the same memory would free nothing: it can only stop
            depth, host_bytes = Depth.DISK, 0
        cost_s = max(cost_s, own + back * wake_s(engine, depth or depth_of(level)))
        options.append(
            Option(
                engine,
                Action.SLEEP,
                level,
                frees,
                cost_s,
                spread(engine, max(0, host_bytes - engine.masters_bytes)),
                depth,
            )
        )
        if preferred_only:
            break
    return options


def deepen_option(
    engine: Engine, charged: tuple[int, ...], policy: Policy, wanted: Mapping[GpuId, int]
) -> Option | None:
    """A sleeper that kept its weights in VRAM frees some of them too; None where it cannot."""
    if not (engine.elastic and policy.elastic) or engine.state is not State.ASLEEP:
        return None
    size = _asked(engine, charged, wanted)
    if size <= 0:
        return None
    frees = _freed(engine, charged, size)
    moved = sum(frees.values())
    back = wanted_back(engine.demand)
    cost_s = back * _moved_share(engine, charged, moved) * wake_s(engine, Depth.HOST)
    return Option(engine, Action.SINK, None, frees, cost_s, spread(engine, moved), Depth.KV)


def _elastic(
    engine: Engine, charged: tuple[int, ...], wanted: Mapping[GpuId, int], own_s: float, back: float
) -> Option | None:
    """Freeing only what is wanted, KV cache first. The weights among it go to host RAM."""
    size = _asked(engine, charged, wanted)
    if size <= 0:
        return None
    frees = _freed(engine, charged, size)
    kv_bytes = engine.kv_bytes or (0,) * len(charged)
    moved = sum([max(0, out - kv) for out, kv in zip(frees.values(), kv_bytes, strict=True)])
    cost_s = own_s + back * (
        wake_s(engine, Depth.KV) + _moved_share(engine, charged, moved) * wake_s(engine, Depth.HOST)
    )
    return Option(engine, Action.SLEEP, Level.PAUSE, frees, cost_s, spread(engine, moved), Depth.KV)


def _asked(engine: Engine, charged: tuple[int, ...], wanted: Mapping[GpuId, int]) -> int:
    """Bytes a GPU to ask for: every rank frees the same, so the tightest GPU decides. 0 where a whole sleep is the
    better word for it."""
    size = max(wanted.get(gpu, 0) for gpu in engine.gpus)
    most = min(now - rest for now, rest in zip(charged, engine.residue_bytes, strict=True))
    return size if size < most else 0


def _freed(engine: Engine, charged: tuple[int, ...], size: int) -> dict[GpuId, int]:
    return {gpu: min(size, now) for gpu, now in zip(engine.gpus, charged, strict=True)}


def _moved_share(engine: Engine, charged: tuple[int, ...], moved_bytes: int) -> float:
    """Which part of its weights that is."""
    weights = engine.host_bytes or sum(charged)
    return min(1.0, moved_bytes / weights) if weights else 0.0


def stop_option(engine: Engine, charged: tuple[int, ...], policy: Policy, at_least_s: float = 0.0) -> Option:
    """Stopping it: frees all that it is charged with, and never costs less than ``at_least_s``.

    How long a stop takes is not measured apart: a sleep's time stands for it.
    """
    own = engine.sleep_cost_s + _interruption_s(engine, policy)
    cost_s = max(at_least_s, own + wanted_back(engine.demand) * engine.start_cost_s)
    return Option(engine, Action.STOP, None, dict(zip(engine.gpus, charged, strict=True)), cost_s)


def wanted_back(demand: Demand) -> float:
    """Chance that its clients will want it back soon."""
    return 1.0 if demand.waiting or demand.in_flight or demand.frozen else demand.likely_wanted


def _interruption_s(engine: Engine, policy: Policy) -> float:
    """What its streams lose: the drain, then each stands still at least until the engine's next wake."""
    if engine.state is not State.AWAKE or not engine.demand.in_flight:
        return 0.0
    return policy.drain_bound_s + engine.demand.in_flight * engine.wake_cost_s


def cheapest(
    deficits: Mapping[GpuId, int], offers: Sequence[Sequence[Option]], host_free_bytes: HostBytes
) -> tuple[Option, ...] | None:
    """The cheapest set of options, at most one a candidate, that frees every deficit within the host RAM; None if none.

    ``offers`` has one sequence of options a candidate, preferred first. Exact up to EXACT_MAX useful candidates. The
    result never holds an option that could be left out.
    """
    gpus = tuple(deficits)
    table = _table(gpus, offers, host_free_bytes)
    spare = [-deficits[gpu] for gpu in gpus]  # what all of them would free beyond what is wanted: who frees more must
    for rows in table:
        spare = [s + most for s, most in zip(spare, _most(rows), strict=True)]
    if min(spare) < 0:
        return None
    sure: list[_Row] = []
    open_: list[list[_Row]] = []
    for rows in table:
        if len(rows) == 1 and any(map(gt, rows[0].frees, spare)):
            sure.append(rows[0])
        else:
            open_.append(rows)
    host_free_bytes = clipped(host_free_bytes) - sum([row.option.host_bytes for row in sure])
    if not fits(0, host_free_bytes):
        return None
    wanted = tuple([deficits[gpu] - sum([row.frees[i] for row in sure]) for i, gpu in enumerate(gpus)])
    if max(wanted) <= 0:
        return tuple([row.option for row in sure])
    chosen = _greedy(wanted, open_, host_free_bytes)
    if len(open_) <= EXACT_MAX:
        chosen = _Search(wanted, open_, host_free_bytes).best(chosen)
    elif chosen is None:  # spend as little host RAM as possible instead
        sparing = [sorted(r, key=lambda row: total(row.option.host_bytes)) for r in open_]
        chosen = _greedy(wanted, sparing, host_free_bytes)
    return None if chosen is None else tuple(row.option for row in (*sure, *_needed(wanted, chosen)))


def _table(
    gpus: tuple[GpuId, ...], offers: Sequence[Sequence[Option]], host_free_bytes: HostBytes
) -> list[list["_Row"]]:
    """The options lined up with the deficits, without candidates that free nothing there.

    Where host RAM is plenty, an option is left out if an earlier, never dearer one of its engine frees as much.
    """
    table = [[_Row(tuple([o.frees.get(gpu, 0) for gpu in gpus]), o) for o in options] for options in offers]
    table = [rows for rows in table if any(any(row.frees) for row in rows)]
    if not fits(_host_bytes(table), host_free_bytes):
        return table
    return [[r for i, r in enumerate(rows) if i == 0 or r.frees != rows[i - 1].frees] for rows in table]


def _most(rows: list["_Row"]) -> tuple[int, ...]:
    """What a candidate frees at most on each GPU."""
    return rows[0].frees if len(rows) == 1 else tuple(map(max, *[row.frees for row in rows]))


def _host_bytes(table: list[list["_Row"]]) -> HostBytes:
    """Host RAM that the candidates take at most."""
    return sum([most([row.option.host_bytes for row in rows]) for rows in table])


@dataclass(frozen=True, slots=True)
class _Row:
    """An option with its bytes lined up with the deficits."""

    frees: tuple[int, ...]
    option: Option


def _greedy(wanted: tuple[int, ...], table: list[list[_Row]], host_free: HostBytes) -> list[_Row] | None:
    """Take what frees most of the rest for its cost, until nothing is wanted. None if it gets stuck."""
    rest, left, chosen = list(wanted), list(table), list[_Row]()
    while any(r > 0 for r in rest):
        best: tuple[float, int, _Row] | None = None
        for index, rows in enumerate(left):
            row = next((r for r in rows if r.option.host_bytes <= host_free), None)
            if row is None:
                continue
            useful = sum(min(r, f) for r, f in zip(rest, row.frees, strict=True) if r > 0)
            worth = useful / (row.option.cost_s + 1e-9)
            if useful > 0 and (best is None or worth > best[0]):
                best = (worth, index, row)
        if best is None:
            return None
        _, index, row = best
        del left[index]
        chosen.append(row)
        host_free -= row.option.host_bytes
        rest = [r - f for r, f in zip(rest, row.frees, strict=True)]
    return chosen


def _needed(wanted: tuple[int, ...], chosen: list[_Row]) -> list[_Row]:
    """Leave out, dearest first, whatever the others make superfluous."""
    kept = list(chosen)
    for row in sorted(chosen, key=lambda row: -row.option.cost_s):
        others = [r for r in kept if r is not row]
        if all(sum(r.frees[i] for r in others) >= size for i, size in enumerate(wanted)):
            kept = others
    return kept


class _Search:
    """Depth-first branch and bound over the candidates: take one of its options, or none."""

    def __init__(self, wanted: tuple[int, ...], table: list[list[_Row]], host_free: HostBytes) -> None:
        self._wanted = wanted
        self._table = sorted(table, key=lambda rows: rows[0].option.cost_s)
        self._host_free = host_free
        self._best: list[_Row] | None = None
        self._best_cost_s = float("inf")
        self._reach, self._rates = self._bounds()

    def _bounds(self) -> tuple[list[list[int]], list[list[float]]]:
        """For every suffix of the candidates and every deficit: the bytes it can free at most, and at what least cost
        a byte. The first says when to give up, the second what the rest must cost at least."""
        reach = [[0] * len(self._wanted)]
        rates = [[float("inf")] * len(self._wanted)]
        for rows in reversed(self._table):
            most = [max(row.frees[i] for row in rows) for i in range(len(self._wanted))]
            rate = [
                min((row.option.cost_s / row.frees[i] for row in rows if row.frees[i]), default=float("inf"))
                for i in range(len(self._wanted))
            ]
            reach.append([a + b for a, b in zip(reach[-1], most, strict=True)])
            rates.append([min(a, b) for a, b in zip(rates[-1], rate, strict=True)])
        return reach[::-1], rates[::-1]

    def best(self, known: list[_Row] | None) -> list[_Row] | None:
        """The cheapest cover; ``known`` is a cover to beat."""
        if known is not None:
            self._best, self._best_cost_s = known, sum(row.option.cost_s for row in known)
        self._visit(0, self._wanted, [], 0.0, self._host_free)
        return self._best

    def _visit(self, index: int, rest: tuple[int, ...], taken: list[_Row], cost_s: float, host_free: HostBytes) -> None:
        if cost_s >= self._best_cost_s - 1e-9:
            return
        if max(rest, default=0) <= 0:
            self._best, self._best_cost_s = list(taken), cost_s
            return
        bound = 0.0
        for r, reach, rate in zip(rest, self._reach[index], self._rates[index], strict=True):
            if r > reach:
                return
            if r > 0:
                bound = max(bound, r * rate)
        if cost_s + bound >= self._best_cost_s - 1e-9:
            return
        for row in self._table[index]:
            if row.option.host_bytes <= host_free:
                left = tuple([r - f for r, f in zip(rest, row.frees, strict=True)])
                taken.append(row)
                self._visit(index + 1, left, taken, cost_s + row.option.cost_s, host_free - row.option.host_bytes)
                taken.pop()
        self._visit(index + 1, rest, taken, cost_s, host_free)
