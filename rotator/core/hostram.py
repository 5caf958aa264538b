"""Host RAM of one machine as a plain number, of several by machine: masters lie where their engine's GPUs are.

With one machine all of this is arithmetic on ints. With more, a number stands for "so much on every machine", and
comparisons hold only if they hold on each of them.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from rotator.core.values import Engine, Snapshot


@dataclass(frozen=True, slots=True, eq=False)
class NodeBytes:
    """Bytes by machine; ``rest`` on every machine that is not named."""

    by: Mapping[str, int] = field(default_factory=dict)
    rest: int = 0

    def on(self, node: str) -> int:
        return self.by.get(node, self.rest)

    def __add__(self, other: "HostBytes") -> "NodeBytes":
        return _zipped(self, other, lambda a, b: a + b)

    __radd__ = __add__

    def __sub__(self, other: "HostBytes") -> "NodeBytes":
        return _zipped(self, other, lambda a, b: a - b)

    def __rsub__(self, other: "HostBytes") -> "NodeBytes":
        return _zipped(other, self, lambda a, b: a - b)

    def __neg__(self) -> "NodeBytes":
        return NodeBytes({node: -size for node, size in self.by.items()}, -self.rest)

    def __le__(self, other: "HostBytes") -> bool:
        return fits(self, other)

    def __ge__(self, other: "HostBytes") -> bool:
        return fits(other, self)


HostBytes = int | NodeBytes


def spread(engine: Engine, size: int) -> HostBytes:
    """Bytes of an engine's masters by machine: every rank has as many, in the RAM of its GPU's machine."""
    if not engine.nodes or not size:
        return size
    share, more = divmod(size, len(engine.nodes))
    by: dict[str, int] = {}
    for index, node in enumerate(engine.nodes):
        by[node] = by.get(node, 0) + share + (more if index == 0 else 0)
    return NodeBytes(by)


def free_of(snapshot: Snapshot) -> HostBytes:
    """What is left of the budgets for masters."""
    here = snapshot.host_budget_bytes - snapshot.host_used_bytes
    if not snapshot.node_budgets:
        return here
    used = snapshot.node_used
    return NodeBytes({"": here, **{n: size - used.get(n, 0) for n, size in snapshot.node_budgets.items()}})


def fits(size: HostBytes, room: HostBytes) -> bool:
    """Whether it is at most ``room`` on every machine."""
    if isinstance(size, int) and isinstance(room, int):
        return size <= room
    return all(a <= b for a, b in _pairs(size, room))


def clipped(size: HostBytes) -> HostBytes:
    """Nothing where it is less than nothing."""
    return max(0, size) if isinstance(size, int) else _zipped(size, 0, max)


def least(one: HostBytes, other: HostBytes) -> HostBytes:
    if isinstance(one, int) and isinstance(other, int):
        return min(one, other)
    return _zipped(one, other, min)


def most(sizes: Iterable[HostBytes]) -> HostBytes:
    """The largest on each machine; 0 of nothing."""
    found: HostBytes = 0
    for index, size in enumerate(sizes):
        if index == 0:
            found = size
        else:
            found = max(found, size) if isinstance(found, int) and isinstance(size, int) else _zipped(found, size, max)
    return found


def total(size: HostBytes) -> int:
    """Over all machines named: for comparing one with another, and for people."""
    return size if isinstance(size, int) else sum(size.by.values())


def left_for(engine: Engine, free: HostBytes) -> int:
    """What the tightest of the engine's machines has left, times the machines: to set beside what all of it needs."""
    if isinstance(free, int):
        return free
    nodes = engine.nodes or ("",)
    return min(free.on(node) * len(nodes) // nodes.count(node) for node in nodes)


def helps(gain: HostBytes, short: HostBytes) -> bool:
    """Whether it gains anything where something is short."""
    return any(a > 0 and b > 0 for a, b in _pairs(gain, short))


def _pairs(one: HostBytes, other: HostBytes) -> Iterable[tuple[int, int]]:
    a, b = _as_nodes(one), _as_nodes(other)
    yield from ((a.on(node), b.on(node)) for node in {*a.by, *b.by})
    yield a.rest, b.rest


def _zipped(one: HostBytes, other: HostBytes, with_: Callable[[int, int], int]) -> NodeBytes:
    a, b = _as_nodes(one), _as_nodes(other)
    return NodeBytes({node: with_(a.on(node), b.on(node)) for node in {*a.by, *b.by}}, with_(a.rest, b.rest))


def _as_nodes(size: HostBytes) -> NodeBytes:
    return size if isinstance(size, NodeBytes) else NodeBytes({}, size)
