"""What all parts of a run have to do with: the world and what is in it, who watches, and what came of it so far."""

import asyncio
from collections import Counter
from pathlib import Path

from rotator.core.values import State
from rotator.sim.faults.clients import Answer
from rotator.sim.faults.engine import SimEngine
from rotator.sim.faults.file import FleetFile
from rotator.sim.faults.judge import Judge
from rotator.sim.faults.life import ServiceLife
from rotator.sim.faults.network import Network
from rotator.sim.faults.parts import SimDisk, SimLauncher, new_ledger
from rotator.sim.faults.script import Ask, Script
from rotator.sim.faults.world import GIB, World

_STILL = frozenset({State.STOPPED, State.AWAKE, State.ASLEEP, State.FAILED, State.QUARANTINED})


class Stage:
    """``life`` is the service's current one."""

    life: ServiceLife

    def __init__(self, script: Script, folder: Path) -> None:
        self.script = script
        self.world = World(script.seed, script.shape)
        self.engines = {e.name: SimEngine(self.world, e) for e in script.shape.engines}
        self.file = FleetFile(script.shape)
        self.judge = Judge(self.world, self.engines, int(script.shape.host_budget_gib * GIB))
        self.disk = SimDisk(self.world)
        self.launcher = SimLauncher(self.world, self.engines)
        self.network = Network(self.world, tuple(self.engines.values()), self.judge.on_serve)
        self.requests: Counter[str] = Counter()
        self.clients: dict[asyncio.Task[Answer], Ask] = {}
        self.coming_in: Counter[str] = Counter()  # swaps that bring an engine in
        self.ledger_path = folder / "ledger.db"
        self.ledger_path.write_bytes(new_ledger())

    @property
    def adopted(self) -> bool:
        """Whether the service is up, is to stay so, and knows what runs."""
        return self.life.up and not self.life.ending and not self.life.loop.adopting

    def shakes(self) -> tuple[float, ...]:
        """What may make ledger and devices differ for a while."""
        gpus = self.world.gpus.values()
        busy = float(any(g.query or g.lingering for g in gpus) or self.disk.trouble != "" or self.launcher.away != "")
        return (
            busy,
            float(self.judge.shakes),
            sum(g.disturbed_at_s for g in gpus),
            float(sum(len(e.troubled_at_s) for e in self.engines.values())),
        )

    @staticmethod
    def stands_still(life: ServiceLife) -> bool:
        moving = any(e.state not in _STILL or e.unseen for e in life.loop.all_runtimes())
        return life.up and not life.loop.active and not moving
