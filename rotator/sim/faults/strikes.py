"""Faults of a script as they befall engines, GPUs, the disk, the launcher and the clock."""

from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from rotator.sim.faults.engine import SimEngine
from rotator.sim.faults.judge import Judge
from rotator.sim.faults.parts import SimDisk, SimLauncher
from rotator.sim.faults.script import Away, Cut, Die, Disk, Event, Foreign, Jump, Nvml, Undying, Wedge
from rotator.sim.faults.world import GIB, World


class Strikes:
    """``lost`` is told of every GPU that is lost, as the loss begins."""

    def __init__(
        self,
        world: World,
        engines: Mapping[str, SimEngine],
        disk: SimDisk,
        launcher: SimLauncher,
        judge: Judge,
        lost: Callable[[Nvml], Coroutine[Any, Any, None]],
    ) -> None:
        self._world, self._engines, self._judge = world, engines, judge
        self._disk, self._launcher, self._lost = disk, launcher, lost

    def strike(self, event: Event) -> None:
        """Begin a fault; what lasts ends by itself. Raises AssertionError for what is no fault."""
        match event:
            case Jump():
                self._world.wall_offset_s += event.seconds
            case Disk() | Away() | Nvml():
                self._world.spawn(self._lasting(event))
            case Foreign():
                self._world.spawn(self._world.gpus[event.gpu].visit(int(event.gib * GIB), event.seconds))
            case Die() | Undying() | Wedge() | Cut():
                self._hit(self._engines[event.engine], event)
            case _:
                raise AssertionError(type(event).__name__.lower())

    def _hit(self, engine: SimEngine, event: Die | Undying | Wedge | Cut) -> None:
        engine.trouble()
        match event:
            case Die() if engine.process:
                engine.process.die("killed by signal 9", event.linger_s)
            case Undying():
                engine.undying_until_s = self._world.now() + event.seconds
                engine.was_undying = True
            case Wedge() if engine.process:
                engine.process.do(engine.process.wedge(event.seconds))
            case Cut():
                engine.cut_until_s, engine.cut_silent = self._world.now() + event.seconds, event.silent
                self._world.spawn(self._mark_later(engine, event.seconds))

    async def _mark_later(self, engine: SimEngine, seconds: float) -> None:
        await self._world.calm_or(seconds)
        engine.trouble()

    async def _lasting(self, event: Disk | Away | Nvml) -> None:
        self._judge.shaken()
        match event:
            case Disk():
                self._disk.trouble = event.how
            case Away():
                self._launcher.away = event.how
            case Nvml():
                self._world.gpus[event.gpu].query = event.how
        if isinstance(event, Nvml) and event.how == "lost":
            self._world.spawn(self._lost(event))
            for engine in self._engines.values():
                if event.gpu in engine.gpus and engine.process:
                    engine.process.die("killed by signal 6: CUDA error: the GPU is lost")
        await self._world.calm_or(event.seconds)
        match event:
            case Disk():
                self._disk.mend()
            case Away():
                self._launcher.away = ""
            case Nvml():
                self._world.gpus[event.gpu].query = ""
        self._judge.shaken()
