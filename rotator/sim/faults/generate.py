"""From a seed to a script. The same seed makes the same script, on every machine."""

import random

from rotator.sim.faults.more import with_more
from rotator.sim.faults.script import (
    Arm,
    Ask,
    Away,
    Cut,
    Die,
    Disk,
    EngineShape,
    Event,
    Foreign,
    Jump,
    Kill,
    Nvml,
    Order,
    Script,
    Shape,
    Undying,
    Wedge,
)

GPU_GIB = 96.0
VERSIONS = ("0.19.1", "0.23.0", "0.26.0", "0.30.2", "0.33.0")

# What can go wrong with each thing that an engine is asked, by the catalogue of what vLLM was seen to do.
HOWS = {
    "sleep": ("slow", "hang", "rank_fails", "lie", "lie_one_rank", "lost", "late", "html", "crash", "frees_late",
              "wedge"),
    "wake": ("slow", "hang", "rank_fails", "noop", "stays_asleep", "garbage", "nan", "lost", "late", "html", "crash",
             "oom", "wedge"),
    "boot": ("slow", "never_healthy", "crash", "garbage", "wrong_model", "keeps_vram"),
    "launch": ("refuse", "lost"),
    "ask": ("error", "html", "lost", "hang"),
    "generate": ("error", "hang", "lost"),
}  # fmt: skip


def make_script(seed: int, *, brief: bool = False, more: bool = True) -> Script:
    """``brief`` scripts last a third as long, with as many faults in it. Without ``more`` it is the script that the
    seed made before others were added to it."""
    script = _script(seed, brief)
    return with_more(script, brief=brief) if more else script


def _script(seed: int, brief: bool) -> Script:
    rng = random.Random(seed)
    shape = _shape(rng)
    faults_end_s = round(rng.uniform(40.0, 100.0) / (3.0 if brief else 1.0), 1)
    events: list[Event] = [*_asks(rng, shape, faults_end_s), *_orders(rng, shape, faults_end_s)]
    dice = _Faults(rng, shape, faults_end_s)
    events += [dice.roll() for _ in range(rng.randint(3, 14))]
    if rng.random() < 0.3:
        events += dice.together()
    return Script(seed, shape, tuple(sorted(events, key=lambda e: e.at_s)), faults_end_s)


def _shape(rng: random.Random) -> Shape:
    gpus = rng.choice((1, 2, 2, 4))
    engines = tuple(_engine(rng, chr(ord("a") + i), gpus) for i in range(rng.randint(2, 4)))
    masters = sorted((e.host_gib for e in engines), reverse=True)
    roomy = sum(masters) * 1.1
    budget = roomy if rng.random() < 0.7 else rng.uniform(masters[0] * 0.8, roomy)
    idle_s = rng.uniform(8.0, 25.0) if rng.random() < 0.3 else None
    return Shape(gpus, GPU_GIB, round(budget, 1), None if idle_s is None else round(idle_s, 1), engines)


def _engine(rng: random.Random, name: str, gpus: int) -> EngineShape:
    wanted = rng.choice((1, gpus, gpus))
    first = rng.randrange(gpus - wanted + 1)
    awake = rng.uniform(20.0, 92.0) if wanted < gpus or rng.random() < 0.3 else rng.uniform(60.0, 88.0)
    residue = rng.uniform(0.5, 3.0)
    return EngineShape(
        name=name,
        gpus=tuple(range(first, first + wanted)),
        awake_gib=round(awake, 1),
        residue_gib=round(residue, 2),
        planned_gib=round(min(94.0, awake * rng.uniform(1.0, 1.08)), 1),
        planned_residue_gib=round(max(0.2, residue + rng.uniform(-1.5, 1.0)), 2),
        host_gib=round(awake * wanted * rng.uniform(0.5, 0.9), 1),
        version=rng.choice(VERSIONS),
        levels=rng.choice(((1,), (1,), (1, 2), (2,))),
        boot_s=round(rng.uniform(2.0, 9.0), 1),
        sleep_s=round(rng.uniform(0.2, 1.5), 2),
        wake_s=round(rng.uniform(0.2, 2.0), 2),
        pin=rng.random() < 0.04,
        preload=rng.random() < 0.25,
        priority=rng.choice((0, 0, 0, 1)),
        served_model=f"org/{name}" if rng.random() < 0.4 else "",
    )


def _asks(rng: random.Random, shape: Shape, end_s: float) -> list[Event]:
    """Steady traffic with bursts: engines are wanted side by side, so that they have to take turns."""
    every_s, at_s, asks = rng.uniform(1.5, 6.0), 0.5, list[Event]()
    while at_s < end_s:
        engine = rng.choice(shape.engines).name
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            asks.append(_ask(rng, f"r{len(asks)}", engine, at_s))
        at_s = round(at_s + rng.expovariate(1.0 / every_s), 3)
    return asks


def _ask(rng: random.Random, key: str, engine: str, at_s: float) -> Ask:
    tokens, long = rng.randint(2, 12), rng.random() < 0.25
    leaves_s = round(rng.uniform(0.05, 20.0), 3) if rng.random() < 0.15 else None
    deadline_s = round(rng.choice((rng.uniform(1.0, 10.0), rng.uniform(20.0, 80.0))), 1)
    token_s = round(rng.uniform(0.4, 1.5) if long else rng.uniform(0.02, 0.2), 3)
    return Ask(at_s, key, engine, tokens, token_s, rng.random() < 0.7, deadline_s, leaves_s)


def _orders(rng: random.Random, shape: Shape, end_s: float) -> list[Event]:
    verbs = ("wake", "sleep", "stop", "start", "restart", "release", "pin", "unpin", "cordon", "uncordon")
    orders = list[Event]()
    for _ in range(rng.choice((0, 0, 1, 2, 4))):
        verb = rng.choice(verbs)
        target = f"GPU-{rng.randrange(shape.gpus)}" if "cordon" in verb else rng.choice(shape.engines).name
        orders.append(Order(round(rng.uniform(2.0, end_s), 3), verb, target, rng.random() < 0.25))
    return orders


class _Faults:
    """One fault at a roll, each kind with its share."""

    def __init__(self, rng: random.Random, shape: Shape, end_s: float) -> None:
        self._rng = rng
        self._shape = shape
        self._end_s = end_s

    def roll(self) -> Event:
        kinds = (self._arm, self._die, self._undying, self._wedge, self._cut, self._nvml, self._foreign, self._disk,
                 self._kill, self._jump, self._away)  # fmt: skip
        (kind,) = self._rng.choices(kinds, weights=(12, 3, 1, 2, 1, 2, 2, 2, 4, 1, 1))
        return kind(round(self._rng.uniform(1.0, self._end_s), 3))

    def together(self) -> list[Event]:
        """Two that are seldom near each other by chance: the service dies while an operation goes wrong, or comes back
        while its launcher is away."""
        at_s = round(self._rng.uniform(5.0, self._end_s), 3)
        if self._rng.random() < 0.25:
            away = Away(at_s, self._rng.choice(("refuse", "hang")), self._seconds(2.0, 15.0))
            return [away, Kill(round(at_s + 0.5, 3), "", 0, self._seconds(0.1, 2.0))]
        op = self._rng.choice(("sleep", "wake"))
        armed = [
            Arm(at_s, e.name, op, self._rng.choice(HOWS[op]), self._seconds(5.0, 30.0)) for e in self._shape.engines
        ]
        if self._rng.random() < 0.5:
            return [*armed, Kill(at_s, op, self._rng.randint(1, 24), self._seconds(0.1, 4.0))]
        return [*armed, Kill(round(at_s + self._seconds(0.5, 20.0), 3), "", 0, self._seconds(0.1, 4.0))]

    def _engine(self) -> str:
        return self._rng.choice(self._shape.engines).name

    def _gpu(self) -> str:
        return f"GPU-{self._rng.randrange(self._shape.gpus)}"

    def _seconds(self, least: float, most: float) -> float:
        return round(self._rng.uniform(least, most), 2)

    def _arm(self, at_s: float) -> Event:
        (op,) = self._rng.choices(tuple(HOWS), weights=(5, 6, 3, 1, 2, 2))
        times = self._rng.choice((1, 1, 1, 2, 3))
        return Arm(
            at_s,
            self._engine(),
            op,
            self._rng.choice(HOWS[op]),
            self._seconds(0.5, 20.0),
            self._rng.randrange(4),
            times,
        )

    def _die(self, at_s: float) -> Event:
        return Die(at_s, self._engine(), self._rng.choice((0.0, 0.0, self._seconds(0.2, 30.0))))

    def _undying(self, at_s: float) -> Event:
        return Undying(at_s, self._engine(), self._seconds(2.0, 40.0))

    def _wedge(self, at_s: float) -> Event:
        return Wedge(at_s, self._engine(), self._seconds(1.0, 40.0))

    def _cut(self, at_s: float) -> Event:
        return Cut(at_s, self._engine(), self._seconds(0.5, 15.0), self._rng.random() < 0.5)

    def _nvml(self, at_s: float) -> Event:
        return Nvml(at_s, self._gpu(), self._rng.choice(("hang", "fail", "blind", "lost")), self._seconds(0.5, 30.0))

    def _foreign(self, at_s: float) -> Event:
        return Foreign(at_s, self._gpu(), self._seconds(0.5, 60.0), self._seconds(0.5, 40.0))

    def _disk(self, at_s: float) -> Event:
        return Disk(at_s, self._rng.choice(("full", "hang", "slow")), self._seconds(0.5, 20.0))

    def _kill(self, at_s: float) -> Event:
        before = self._rng.choice(("", "", "sleep", "wake", "start", "stop", "commit"))
        return Kill(at_s, before, self._rng.randint(0, 24), self._rng.choice((0.1, 1.0, self._seconds(0.1, 12.0))))

    def _jump(self, at_s: float) -> Event:
        return Jump(at_s, self._rng.choice((-7200.0, -30.0, 30.0, 7200.0)))

    def _away(self, at_s: float) -> Event:
        return Away(at_s, self._rng.choice(("refuse", "hang", "lost")), self._seconds(1.0, 25.0))
