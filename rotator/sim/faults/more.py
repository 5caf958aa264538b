"""What came to scripts after the first ten thousand: ends by SIGTERM, edits of the fleet file, engines that free by
bytes, masters on disk, the calendar.

Drawn from a stream of its own, on top of a script as it was: what an earlier seed found, it still plays first.
"""

import random
from dataclasses import replace

from rotator.sim.faults.script import Arm, Edit, Event, Reserve, Script, Term
from rotator.sim.faults.shape import EngineShape, Shape, WindowShape

# What can go wrong with each thing that our allocator's plugin is asked.
PLUGIN_HOWS = {
    "free": ("slow", "hang", "rank_fails", "lie", "lie_one_rank", "less", "lost", "late", "html", "crash",
             "frees_late", "wedge"),
    "restore": ("slow", "hang", "rank_fails", "noop", "garbage", "nan", "lost", "late", "html", "crash", "oom",
                "wedge"),
    "masters": ("slow", "hang", "error", "rank_fails", "lost", "late", "html", "crash", "wedge"),
}  # fmt: skip
EDITS = ("remove", "remove", "add", "add", "command", "command", "pin", "unpin", "priority", "levels", "calendar",
         "idle", "break")  # fmt: skip


def with_more(script: Script, *, brief: bool) -> Script:
    """The same script makes the same one, on every machine. A ``brief`` one has no time for as many ends and edits."""
    rng = random.Random(f"{script.seed} more")
    more = _More(rng, script, brief)
    shape, events, rate = script.shape, list[Event](), 0.5 if brief else 1.0
    if rng.random() < 0.35 * rate:
        shape = replace(shape, on_shutdown=rng.choice(("leave", "sleep", "stop")))
        events += more.terms()
    if rng.random() < 0.35 * rate:
        events += more.edits()
    if rng.random() < 0.4:
        shape = more.with_plugins(shape)
        events += more.arms(shape)
    if rng.random() < 0.25:
        shape = more.with_calendar(shape)
        events += more.reservations()
    if rng.random() < 0.25:
        shape = more.with_fallbacks(shape)
    events = sorted([*script.events, *events], key=lambda e: e.at_s)
    return replace(script, shape=shape, events=tuple(events))


class _More:
    def __init__(self, rng: random.Random, script: Script, brief: bool) -> None:
        self._rng = rng
        self._brief = brief
        self._end_s = script.faults_end_s
        self._names = tuple(e.name for e in script.shape.engines)

    def _at(self) -> float:
        return round(self._rng.uniform(2.0, self._end_s), 3)

    def _seconds(self, least: float, most: float) -> float:
        return round(self._rng.uniform(least, most), 2)

    def terms(self) -> list[Event]:
        """Most supervisors are patient; some kill what is in the middle of putting its engines away."""
        count = 1 if self._brief else self._rng.choice((1, 1, 2))
        patience = [self._seconds(0.5, 25.0) if self._rng.random() < 0.4 else 25.0 for _ in range(count)]
        downs_s = (0.1, 0.5) if self._brief else (0.1, 1.0, 5.0)
        return [Term(self._at(), seconds, self._rng.choice(downs_s)) for seconds in patience]

    def edits(self) -> list[Event]:
        """One out, and back in a little later, is what people do by mistake."""
        edits = [
            Edit(self._at(), self._rng.choice(self._names), self._rng.choice(EDITS))
            for _ in range(1 if self._brief else 3)
        ]
        if not self._brief and self._rng.random() < 0.5:
            name, at_s = self._rng.choice(self._names), self._at()
            edits += [Edit(at_s, name, "remove"), Edit(round(at_s + self._seconds(0.1, 15.0), 3), name, "add")]
        return list(edits)

    # -- our allocator's plugin --------------------------------------------------------------------------------------

    def with_plugins(self, shape: Shape) -> Shape:
        engines = tuple(self._plugged(e) if self._rng.random() < 0.7 else e for e in shape.engines)
        sinks_s = self._seconds(4.0, 20.0) if self._rng.random() < 0.4 else None
        return replace(shape, engines=engines, idle_sink_s=sinks_s)

    def _plugged(self, engine: EngineShape) -> EngineShape:
        kv_gib = round((engine.awake_gib - engine.residue_gib) * self._rng.uniform(0.1, 0.7), 1)
        weights_gib = (engine.awake_gib - engine.residue_gib - kv_gib) * len(engine.gpus)
        return replace(
            engine,
            elastic=self._rng.random() < 0.7,
            kv_gib=kv_gib,
            disk=self._rng.random() < 0.5,
            keeps_masters=self._rng.random() < 0.3,
            host_gib=min(engine.host_gib, round(weights_gib, 1)),  # what the budget was made for
        )

    def arms(self, shape: Shape) -> list[Event]:
        plugged = [e.name for e in shape.engines if e.elastic or e.disk or e.keeps_masters]
        return [self._arm(self._rng.choice(plugged)) for _ in range(self._rng.randint(0, 4))] if plugged else []

    def _arm(self, name: str) -> Event:
        (op,) = self._rng.choices(tuple(PLUGIN_HOWS), weights=(4, 4, 2))
        how, rank = self._rng.choice(PLUGIN_HOWS[op]), self._rng.randrange(4)
        return Arm(self._at(), name, op, how, self._seconds(0.5, 20.0), rank, self._rng.choice((1, 1, 2)))

    # -- fallbacks ---------------------------------------------------------------------------------------------------

    def with_fallbacks(self, shape: Shape) -> Shape:
        """Of some engines, to another; two may be each other's."""
        engines = tuple(self._fallen(e) if self._rng.random() < 0.5 else e for e in shape.engines)
        return replace(shape, engines=engines)

    def _fallen(self, engine: EngineShape) -> EngineShape:
        others = [name for name in self._names if name != engine.name]
        return replace(engine, fallback=self._rng.choice(others))

    # -- the calendar ------------------------------------------------------------------------------------------------

    def with_calendar(self, shape: Shape) -> Shape:
        windows = tuple(self._window(f"w{i}") for i in range(self._rng.choice((1, 1, 2))))
        defaults = (self._rng.choice(self._names),) if self._rng.random() < 0.3 else ()
        return replace(shape, begins_s=self._seconds(0.0, 59.0), windows=windows, default_engines=defaults)

    def reservations(self) -> list[Event]:
        return [self._reserve() for _ in range(self._rng.choice((0, 1, 2)))]

    def _reserve(self) -> Event:
        in_s = self._rng.choice((0.0, self._seconds(0.0, 20.0)))
        return Reserve(
            self._at(), self._rng.choice(self._names), in_s, self._seconds(2.0, 40.0), self._rng.choice((0, 1))
        )

    def _window(self, name: str) -> WindowShape:
        minute = self._rng.choice((0, 1, 1, 2))
        return WindowShape(
            name, (self._rng.choice(self._names),), minute, self._seconds(5.0, 70.0), self._rng.choice((0, 0, 1))
        )
