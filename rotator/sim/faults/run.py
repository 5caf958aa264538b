"""One run: a script played against the service under virtual time, judged to its end."""

import asyncio
import os
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from rotator.sim.clock import Stalled
from rotator.sim.faults.errors import errors_are_failures
from rotator.sim.faults.generate import make_script
from rotator.sim.faults.lives import Lives
from rotator.sim.faults.people import People
from rotator.sim.faults.script import Arm, Ask, Edit, Event, Kill, Nvml, Order, Reserve, Script, Term
from rotator.sim.faults.settling import Settling
from rotator.sim.faults.simloop import SimLoop
from rotator.sim.faults.stage import Stage
from rotator.sim.faults.strikes import Strikes

TICK_S = 0.5
CORDONED_S = 8.0  # a GPU that is lost for so long is cordoned by then: three looks, and what a look may hang


@dataclass(slots=True)
class Outcome:
    """How a run ended. ``failure`` is None, or the invariant's name and what was seen."""

    seed: int
    failure: tuple[str, str] | None
    digest: str
    virtual_s: float
    requests: Counter[str]
    injected: Counter[str]
    checks: Counter[str]
    trace: tuple[str, ...] = field(default=(), repr=False)


def run_seed(seed: int) -> Outcome:
    return run_script(make_script(seed))


def run_script(script: Script) -> Outcome:
    """Play a script in a loop of its own. The same script gives the same outcome, to the digest of its trace."""
    with tempfile.TemporaryDirectory(dir=_memory_dir()) as folder, asyncio.Runner(loop_factory=SimLoop) as runner:
        return runner.run(_play(script, Path(folder)))


async def _play(script: Script, folder: Path) -> Outcome:
    return await _Run(Stage(script, folder)).play()


def _memory_dir() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108 — only to be quick


class _Run:
    def __init__(self, stage: Stage) -> None:
        self.stage, self.script = stage, stage.script
        self.world, self.judge = stage.world, stage.judge
        self.lives = Lives(stage)
        self.people = People(stage)
        self.settling = Settling(stage, self.people)
        self.strikes = Strikes(self.world, stage.engines, stage.disk, stage.launcher, self.judge, self._expect_cordon)
        loop = asyncio.get_running_loop()
        if isinstance(loop, SimLoop):
            loop.connect = stage.network.connect

    async def play(self) -> Outcome:
        with errors_are_failures(self.judge):
            self.lives.begin()
            ticking = self.world.spawn(self._tick())
            playing = self.world.spawn(self._story())
            try:
                await asyncio.wait((playing, ticking), return_when=asyncio.FIRST_COMPLETED)
                if playing.done():
                    playing.result()
            except Stalled as e:
                self.judge.fail("nothing waits for ever", str(e))
            await self.stage.life.kill()
            await self.world.end()
        trace = tuple(self.world.trace.last) if self.judge.failure else ()
        seed, failure, digest = self.script.seed, self.judge.failure, self.world.trace.digest()
        injected, checks = self.world.injected, self.judge.checks
        return Outcome(seed, failure, digest, self.world.now(), self.stage.requests, injected, checks, trace)

    async def _tick(self) -> None:
        """Returns at the first failure: what follows it proves nothing."""
        while self.judge.failure is None:
            await asyncio.sleep(TICK_S)
            self.judge.tick()

    async def _story(self) -> None:
        for event in self.script.events:
            await asyncio.sleep(max(0.0, event.at_s - self.world.now()))
            self._apply(event)
        await asyncio.sleep(max(0.0, self.script.faults_end_s - self.world.now()))
        self._calm()
        await self.settling.settle()
        await self.settling.rest()

    # -- what happens ------------------------------------------------------------------------------------------------

    def _apply(self, event: Event) -> None:
        if not isinstance(event, Ask | Arm | Kill):
            self.world.injected[_fault_name(event)] += 1
            self.world.trace.note(f"script: {event}")
        match event:
            case Ask():
                self.people.ask(event)
            case Arm():
                self.stage.engines[event.engine].arm(event)
            case Order():
                self.people.order(event)
            case Reserve():
                self.people.reserve(event)
            case Edit():
                self.people.edit(event)
            case Kill():
                self.lives.kill(event)
            case Term():
                self.lives.end(event)
            case _:
                self.strikes.strike(event)

    async def _expect_cordon(self, event: Nvml) -> None:
        """A lost GPU is kept out until a person has seen to it, unless the service was away or the script lifted it."""
        stage, life, lifted = self.stage, self.stage.life, self.world.injected["order uncordon"]
        await asyncio.sleep(CORDONED_S)
        lasted = self.world.gpus[event.gpu].query == "lost" and not self.world.calm.is_set()
        if not lasted or life is not stage.life or not stage.adopted or self.world.now() - life.adopted_s < CORDONED_S:
            return
        cordoned = life.loop.fleet.gpus[event.gpu].cordoned is not None
        untouched = self.world.injected["order uncordon"] == lifted
        self.judge.expect(cordoned or not untouched, "a lost GPU is cordoned", f"{event.gpu} is not")

    def _calm(self) -> None:
        """Nothing fails any more."""
        self.world.trace.note("faults end")
        self.world.calm.set()
        self.lives.calm()
        self.stage.file.mend()
        for engine in self.stage.engines.values():
            engine.disarm()
        self.judge.shaken()


def _fault_name(event: Event) -> str:
    name = type(event).__name__.lower()
    how = getattr(event, "how", None) or getattr(event, "verb", None)
    return f"{name} {how}" if how else name
