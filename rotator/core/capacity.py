"""What fits on a box, by footprints alone: who can be awake together, who never can, whose weights can stay.

An engine asleep keeps its residue; one that may be stopped can give that back too. Weights are all that an engine needs
awake but its KV cache. Where a KV cache's size is not known, it is taken as what is left of the awake bytes beside the
residue and an even share of the masters in host RAM.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from rotator.core.values import Engine, EngineName, Gpu, GpuId

SETS_MAX = 100  # more sets than that help nobody
_VISITS_MAX = 50_000
KV_LEAST_BYTES = 1 << 30  # a smaller KV cache serves nobody


@dataclass(frozen=True, slots=True)
class Size:
    """One engine's bytes: tuples run parallel to ``gpus``. ``kv_known`` is False where the KV cache is an estimate."""

    engine: EngineName
    gpus: tuple[GpuId, ...]
    awake_bytes: tuple[int, ...]
    weights_bytes: tuple[int, ...]
    kv_bytes: tuple[int, ...]
    residue_bytes: tuple[int, ...]
    host_bytes: int
    kv_known: bool


@dataclass(frozen=True, slots=True)
class Together:
    """Engines that are awake together and leave no room for a further one. ``free_bytes`` is what is left on each GPU
    they use beside the residues of all others; negative: so much of those must be stopped."""

    engines: tuple[EngineName, ...]
    free_bytes: Mapping[GpuId, int]


@dataclass(frozen=True, slots=True)
class Never:
    """Two engines (or one alone, where ``other`` is None) that can never be awake together, and what is lacking."""

    engine: EngineName
    other: EngineName | None
    gpu: GpuId
    lacking_bytes: int


@dataclass(frozen=True, slots=True)
class Elastic:
    """Engines that cannot be awake together, but whose weights fit together with one KV cache at a time of up to
    ``kv_max_bytes`` a GPU: so they swap without moving weights. ``kv_now_bytes`` is the largest they have now."""

    engines: tuple[EngineName, ...]
    kv_max_bytes: int
    kv_now_bytes: int

    @property
    def fits_now(self) -> bool:
        return self.kv_now_bytes <= self.kv_max_bytes


@dataclass(frozen=True, slots=True)
class Capacity:
    """``is_cut`` where there are more sets than are listed. ``masters_bytes`` is what all masters need at once."""

    sizes: tuple[Size, ...]
    together: tuple[Together, ...]
    never: tuple[Never, ...]
    elastic: tuple[Elastic, ...]
    masters_bytes: int
    host_budget_bytes: int
    is_cut: bool


def capacity(gpus: Mapping[GpuId, Gpu], engines: Sequence[Engine], host_budget_bytes: int) -> Capacity:
    """All of it, for engines that name only known GPUs. Foreign bytes count as taken."""
    room = {id: gpu.total_bytes - gpu.reserve_bytes - gpu.foreign_bytes for id, gpu in gpus.items()}
    ordered = sorted(engines, key=lambda e: e.name)
    sizes = tuple(size_of(e) for e in ordered)
    never = tuple(_never(room, ordered))
    alone = {n.engine for n in never if n.other is None}
    able = [e for e in ordered if e.name not in alone]
    by_name = {s.engine: s for s in sizes}
    visits = _Visits()
    together = [
        Together(names, _left(room, ordered, names))
        for group in _linked(able)
        for names in _largest([e.name for e in group], lambda names: _fit(room, able, names), visits)
    ]
    elastic = [made for group in _linked(able) for made in _elastic(room, group, by_name, visits)]
    masters = sum(e.host_bytes for e in ordered)
    cut = visits.is_cut or len(together) > SETS_MAX or len(elastic) > SETS_MAX
    return Capacity(
        sizes, tuple(together[:SETS_MAX]), never, tuple(elastic[:SETS_MAX]), masters, host_budget_bytes, cut
    )


def size_of(engine: Engine) -> Size:
    known = bool(engine.kv_bytes)
    share = engine.host_bytes // len(engine.gpus)
    lined_up = zip(engine.awake_bytes, engine.residue_bytes, strict=True)
    kv = engine.kv_bytes or tuple(max(0, awake - residue - share) if share else 0 for awake, residue in lined_up)
    weights = tuple(awake - cache for awake, cache in zip(engine.awake_bytes, kv, strict=True))
    return Size(
        engine.name, engine.gpus, engine.awake_bytes, weights, kv, engine.residue_bytes, engine.host_bytes, known
    )


# -- awake together --------------------------------------------------------------------------------------------------


def _fit(room: Mapping[GpuId, int], engines: Sequence[Engine], names: frozenset[EngineName]) -> bool:
    """Whether these can be awake together when whoever may be stopped is stopped."""
    return all(left >= 0 for left in _rest(room, engines, names, lambda e: not e.can_stop).values())


def _left(room: Mapping[GpuId, int], engines: Sequence[Engine], names: tuple[EngineName, ...]) -> dict[GpuId, int]:
    """What is left on the GPUs that they use, with everyone else asleep there."""
    used = {gpu for e in engines if e.name in names for gpu in e.gpus}
    rest = _rest(room, engines, frozenset(names), lambda _: True)
    return {gpu: rest[gpu] for gpu in sorted(used)}


def _rest(
    room: Mapping[GpuId, int],
    engines: Iterable[Engine],
    awake: frozenset[EngineName],
    stays: Callable[[Engine], bool],
) -> dict[GpuId, int]:
    rest = dict(room)
    for engine in engines:
        sizes = engine.awake_bytes if engine.name in awake else engine.residue_bytes if stays(engine) else ()
        for gpu, size in zip(engine.gpus, sizes, strict=False):  # nobody's sizes are empty
            rest[gpu] -= size
    return rest


def _never(room: Mapping[GpuId, int], engines: Sequence[Engine]) -> Iterator[Never]:
    """Engines that are too large by themselves, then pairs of the others."""
    alone: set[EngineName] = set()
    for engine in engines:
        if (lack := _lack(room, engines, engine, None)) is not None:
            alone.add(engine.name)
            yield lack
    able = [e for e in engines if e.name not in alone]
    for i, engine in enumerate(able):
        for other in able[i + 1 :]:
            if (lack := _lack(room, engines, engine, other)) is not None:
                yield lack


def _lack(room: Mapping[GpuId, int], engines: Sequence[Engine], engine: Engine, other: Engine | None) -> Never | None:
    pair = frozenset(e.name for e in (engine, other) if e is not None)
    if other is not None and frozenset(engine.gpus).isdisjoint(other.gpus):
        return None
    rest = _rest(room, engines, pair, lambda e: not e.can_stop)
    gpu = min(engine.gpus, key=lambda gpu: rest[gpu])
    return Never(engine.name, other.name if other else None, gpu, -rest[gpu]) if rest[gpu] < 0 else None


# -- weights together ------------------------------------------------------------------------------------------------


def _elastic(
    room: Mapping[GpuId, int], group: Sequence[Engine], sizes: Mapping[EngineName, Size], visits: "_Visits"
) -> Iterator[Elastic]:
    def kv_room(names: frozenset[EngineName]) -> int:
        """What is left for one KV cache beside all weights, on the tightest of their GPUs."""
        rest = {gpu: room[gpu] for name in names for gpu in sizes[name].gpus}
        for engine in group:
            size = sizes[engine.name]
            kept = size.weights_bytes if engine.name in names else () if engine.can_stop else size.residue_bytes
            for gpu, taken in zip(size.gpus, kept, strict=False):
                if gpu in rest:
                    rest[gpu] -= taken
        return min(rest.values(), default=0)

    for names in _largest([e.name for e in group], lambda names: kv_room(names) >= KV_LEAST_BYTES, visits):
        if len(names) < 2 or _fit(room, group, frozenset(names)):
            continue  # they need not swap at all
        now = max(max(sizes[name].kv_bytes, default=0) for name in names)
        yield Elastic(names, kv_room(frozenset(names)), now)


# -- sets ------------------------------------------------------------------------------------------------------------


_Fits = Callable[[frozenset[EngineName]], bool]


class _Visits:
    """Bounds the search: sets grow with two to the number of engines."""

    def __init__(self) -> None:
        self.left = _VISITS_MAX

    @property
    def is_cut(self) -> bool:
        return self.left <= 0


def _largest(names: Sequence[EngineName], fits: _Fits, visits: _Visits) -> list[tuple[EngineName, ...]]:
    """Every set that fits and that no further engine could join, larger ones first. ``fits`` holds for parts of a set
    that it holds for."""
    found: list[tuple[EngineName, ...]] = []

    def visit(index: int, chosen: frozenset[EngineName]) -> None:
        visits.left -= 1
        if visits.is_cut or len(found) > SETS_MAX:
            return
        if index == len(names):
            if chosen and not any(fits(chosen | {n}) for n in names if n not in chosen):
                found.append(tuple(sorted(chosen)))
            return
        wider = chosen | {names[index]}
        if fits(wider):
            visit(index + 1, wider)
        visit(index + 1, chosen)

    visit(0, frozenset())
    return sorted(found, key=lambda made: (-len(made), made))


def _linked(engines: Sequence[Engine]) -> list[list[Engine]]:
    """Groups that share no GPU with one another: each is judged by itself."""
    groups: list[tuple[set[GpuId], list[Engine]]] = []
    for engine in engines:
        mine = [g for g in groups if not g[0].isdisjoint(engine.gpus)]
        joined = (set(engine.gpus).union(*(g[0] for g in mine)), [*(e for g in mine for e in g[1]), engine])
        groups = [*(g for g in groups if g not in mine), joined]
    return [sorted(members, key=lambda e: e.name) for _, members in groups]
