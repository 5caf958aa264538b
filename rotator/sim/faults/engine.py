"""One configured engine of the simulated machine: what it is, what is armed against it, and its processes."""

from rotator.core.values import GpuId
from rotator.sim.faults.process import Process
from rotator.sim.faults.script import Arm
from rotator.sim.faults.shape import EngineShape
from rotator.sim.faults.world import GIB, World


class SimEngine:
    """One configured engine: what it is, what is armed against it, and its processes (more than one is a bug of the
    service)."""

    def __init__(self, world: World, shape: EngineShape) -> None:
        self.world = world
        self.shape = shape
        self.gpus: tuple[GpuId, ...] = tuple(f"GPU-{i}" for i in shape.gpus)
        self.processes: list[Process] = []
        self.undying_until_s = 0.0
        self.was_undying = False  # a process of it that would not go may still be in the middle of something
        self.cut_until_s = 0.0
        self.cut_silent = False
        self.troubled_at_s: list[float] = []  # when something happened that may cost a request
        self._armed: list[Arm] = []
        self._pids = 1000 + 100 * (ord(shape.name[0]) - ord("a"))

    @property
    def model(self) -> str:
        return self.shape.served_model or self.shape.name

    @property
    def process(self) -> Process | None:
        return self.processes[-1] if self.processes else None

    @property
    def has_room_for_masters(self) -> bool:
        room = self.world.host_budget - self.world.host_used
        return self.shape.host_gib * GIB <= room

    def arm(self, fault: Arm) -> None:
        self._armed += [fault] * fault.times

    def rank(self, fault: Arm) -> GpuId:
        """The GPU on which a fault of one rank strikes."""
        return self.gpus[fault.rank % len(self.gpus)]

    def disarm(self) -> None:
        self._armed.clear()

    def take(self, op: str) -> Arm | None:
        """The fault that strikes this ``op`` now, which is used up by it."""
        for fault in self._armed:
            if fault.op == op:
                self._armed.remove(fault)
                self.world.injected[f"{op} {fault.how}"] += 1
                self.world.trace.note(f"fault {self.shape.name} {op} {fault.how}")
                self.trouble()
                return fault
        return None

    def trouble(self) -> None:
        self.troubled_at_s.append(self.world.now())

    def launch(self, port: int) -> Process:
        self._pids += 1
        process = Process(self.world, self, self._pids, port)
        self.processes.append(process)
        return process

    @property
    def is_cut(self) -> bool:
        return self.world.now() < self.cut_until_s and not self.world.calm.is_set()

    @property
    def is_undying(self) -> bool:
        return self.world.now() < self.undying_until_s and not self.world.calm.is_set()
