"""What fits where, in bytes.

An engine is charged, on each of its GPUs, with the larger of what its state says it needs and what it was seen to hold.
What a GPU has free is its total less its reserve, less what foreign processes hold, less these charges.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping

from rotator.core.lifecycle import is_moving
from rotator.core.values import BlockKind, Depth, Engine, EngineName, Gpu, GpuId, Snapshot, State

GIB = 1 << 30

_AWAKE_SIZED = frozenset({State.AWAKE, State.DRAINING, State.FALLING_ASLEEP, State.WAKING, State.STARTING})
_NOT_RUNNING = frozenset({State.STOPPED, State.FAILED, State.QUARANTINED})


def gib(size_bytes: int) -> str:
    """Bytes as people read them, e.g. ``88.0 GiB``."""
    return f"{size_bytes / GIB:.1f} GiB"


def charge(engine: Engine) -> tuple[int, ...]:
    """Bytes that the engine takes on each of its GPUs now, parallel to ``engine.gpus``.

    A transition is charged at its larger end. Engines without processes are charged only with what was seen to be held.
    """
    held = engine.held_bytes
    if engine.state is State.ASLEEP:
        if engine.depth is Depth.KV:  # its weights are still there: only a reading tells how much
            return engine.awake_bytes if held is None else held
        known = engine.residue_bytes
    elif engine.state in _AWAKE_SIZED:
        known = engine.awake_bytes
    else:
        return (0,) * len(engine.gpus) if held is None else held
    return known if held is None or held == known else tuple(map(max, known, held))


def need(engine: Engine, charged: tuple[int, ...]) -> tuple[int, ...]:
    """Bytes that must be free on each of its GPUs before the engine may wake or start, parallel to ``engine.gpus``.

    A wake grows from what is charged already. A start gets no such credit: what is still held belongs to old processes.
    """
    if engine.state is State.ASLEEP:
        return tuple([max(0, awake - now) for awake, now in zip(engine.awake_bytes, charged, strict=True)])
    return engine.awake_bytes


def immovable(engine: Engine, charged: tuple[int, ...]) -> tuple[int, ...]:
    """The part of the charge that no plan can take away: all of a dead engine's, the residue of one we may not stop."""
    if engine.state in _NOT_RUNNING:
        return charged
    if engine.can_stop:
        return (0,) * len(charged)
    if engine.state is State.ASLEEP:
        return charged
    return tuple(map(min, engine.residue_bytes, charged))


class Room:
    """Every GPU's bytes and residents, indexed once a plan. Nothing in it changes afterwards.

    ``most`` is what would be free if everything that a plan may move were gone. ``missing`` are GPUs that engines name
    and nobody has read; ``moving`` are engines in transition; ``awake`` are those that may be asked to sleep, or to
    sleep deeper where their weights are still in VRAM.
    """

    __slots__ = (
        "_immovable",
        "_pinned",
        "_sleepers",
        "awake",
        "capacity",
        "charged",
        "free",
        "missing",
        "most",
        "moving",
    )

    def __init__(self, gpus: Mapping[GpuId, Gpu], engines: Iterable[Engine]) -> None:
        self.capacity = {id: g.total_bytes - g.reserve_bytes - g.foreign_bytes for id, g in gpus.items()}
        self.free: dict[GpuId, int] = defaultdict(int, self.capacity)
        self.awake: dict[GpuId, list[Engine]] = defaultdict(list)
        self._sleepers: list[Engine] = []
        self.moving: list[Engine] = []
        self.charged: dict[str, tuple[int, ...]] = {}
        self._immovable = dict.fromkeys(gpus, 0)
        self._pinned = dict.fromkeys(gpus, 0)
        free, all_charged, sleepers = self.free, self.charged, self._sleepers
        for engine in engines:
            deep = engine.state is State.ASLEEP and engine.depth is not Depth.KV
            settled = deep and (engine.held_bytes is None or engine.held_bytes == engine.residue_bytes)
            all_charged[engine.name] = charged = engine.residue_bytes if settled else charge(engine)
            for gpu, taken in zip(engine.gpus, charged, strict=True):
                free[gpu] -= taken
            if not deep:
                self._place(engine, charged)
                continue
            sleepers.append(engine)  # most of a fleet: written out, not by the functions below
            if engine.pinned or not engine.can_stop:
                self._add_standing(engine, charged)
        self.missing = self.free.keys() - gpus.keys()
        self.most = {id: self.capacity[id] - self._immovable[id] - self._pinned[id] for id in gpus}

    def _place(self, engine: Engine, charged: tuple[int, ...]) -> None:
        state = engine.state
        if state is State.ASLEEP and not (engine.elastic and engine.depth is Depth.KV):
            self._sleepers.append(engine)
        elif state is State.AWAKE or state is State.ASLEEP:
            for gpu in engine.gpus:
                self.awake[gpu].append(engine)
        elif is_moving(state):
            self.moving.append(engine)
        if engine.pinned or not engine.can_stop or state in _NOT_RUNNING:
            self._add_standing(engine, charged)

    def _add_standing(self, engine: Engine, charged: tuple[int, ...]) -> None:
        fixed = immovable(engine, charged)
        for gpu, stays, taken in zip(engine.gpus, fixed, charged, strict=True):
            if gpu in self._immovable:
                self._immovable[gpu] += stays
                self._pinned[gpu] += taken - stays if engine.pinned else 0

    def asleep(self) -> dict[GpuId, list[Engine]]:
        """Sleeping engines by GPU. Built when asked: plans seldom need them, and they are most of a fleet."""
        residents: dict[GpuId, list[Engine]] = defaultdict(list)
        for engine in self._sleepers:
            for gpu in engine.gpus:
                residents[gpu].append(engine)
        return residents

    def hopeless(self, engine: Engine, index: int) -> tuple[BlockKind, int] | None:
        """Why the engine cannot have its ``index``-th GPU whoever else yields, and the bytes it could get there."""
        gpu, wanted, charged = engine.gpus[index], engine.awake_bytes[index], self.charged[engine.name]
        own_fixed = own = 0
        if engine.state is State.ASLEEP:  # what it holds now grows into what it wants
            own_fixed = immovable(engine, charged)[index]
            own = charged[index] if engine.pinned else own_fixed
        within = self.capacity[gpu] - self._immovable[gpu] + own_fixed
        if wanted > within:
            return BlockKind.NEVER_FITS, within
        within = self.most[gpu] + own
        return (BlockKind.PINNED, within) if wanted > within else None


def lacking(snapshot: Snapshot, engine: EngineName) -> str | None:
    """What the engine lacks to wake or start as things stand, in words; None where it fits."""
    room, wished = Room(snapshot.gpus, snapshot.engines.values()), snapshot.engines[engine]
    for gpu, size in zip(wished.gpus, need(wished, room.charged[engine]), strict=True):
        if size > max(0, room.free[gpu]):
            return f"{engine} needs {gib(size)} more on {gpu} and {gib(max(0, room.free[gpu]))} are free now"
    return None


def never_fits(gpus: Mapping[GpuId, Gpu], engines: Iterable[Engine]) -> tuple[str, ...]:
    """What this fleet can never do, one line each with the fix: for ``rotator check``.

    Engines are judged by their footprints alone, in whatever state they are.
    """
    fleet = tuple(engines)
    problems = [line for engine in fleet for line in _too_large(gpus, fleet, engine)]
    for id, gpu in gpus.items():
        pinned = [(e.name, e.awake_bytes[e.gpus.index(id)]) for e in fleet if e.pinned and id in e.gpus]
        total, usable = sum(size for _, size in pinned), gpu.total_bytes - gpu.reserve_bytes - gpu.foreign_bytes
        if len(pinned) > 1 and total > usable:
            names = ", ".join(name for name, _ in pinned)
            problems.append(
                f"{id}: the pinned engines {names} need {gib(total)} together and {gib(usable)} are usable: unpin one"
            )
    return tuple(problems)


def _too_large(gpus: Mapping[GpuId, Gpu], fleet: tuple[Engine, ...], engine: Engine) -> Iterable[str]:
    for index, id in enumerate(engine.gpus):
        if id not in gpus:
            yield f"engine '{engine.name}': {id} is no GPU here: name one of {', '.join(gpus)}"
            continue
        gpu, wanted = gpus[id], engine.awake_bytes[index]
        usable = gpu.total_bytes - gpu.reserve_bytes - gpu.foreign_bytes
        stuck = sum(
            e.residue_bytes[e.gpus.index(id)] for e in fleet if e is not engine and not e.can_stop and id in e.gpus
        )
        if wanted > usable - stuck:
            yield (
                f"engine '{engine.name}' needs {gib(wanted)} on {id} and can never have more than "
                f"{gib(max(0, usable - stuck))} ({gib(gpu.total_bytes)} less {gib(gpu.reserve_bytes)} reserve, "
                f"{gib(gpu.foreign_bytes)} foreign, {gib(stuck)} of attached engines asleep): "
                "lower its memory utilization or context length, or give it more GPUs"
            )
