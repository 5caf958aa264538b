"""One run: a script played against the service under virtual time, judged to its end."""

import asyncio
import os
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from rotator.core.values import BlockKind, Command, CommandKind, State
from rotator.ports import RotatorError
from rotator.service.events import Event as BusEvent
from rotator.sim.clock import Stalled
from rotator.sim.faults.clients import Answer, Client
from rotator.sim.faults.engine import SimEngine
from rotator.sim.faults.errors import errors_are_failures
from rotator.sim.faults.fleet import fleet_config
from rotator.sim.faults.generate import make_script
from rotator.sim.faults.judge import Judge
from rotator.sim.faults.life import ServiceLife
from rotator.sim.faults.network import Network
from rotator.sim.faults.parts import SimDisk, SimLauncher, new_ledger
from rotator.sim.faults.script import Arm, Ask, Event, Kill, Nvml, Order, Script
from rotator.sim.faults.simloop import SimLoop
from rotator.sim.faults.strikes import Strikes
from rotator.sim.faults.world import GIB, World

TICK_S = 0.5
START_AGAIN_S = 1.0  # what a supervisor waits before it starts a service again that could not start
BACK_S = 40.0  # within this after the last fault the service is up
SETTLE_S = 300.0  # within this after the last fault every engine serves, or says why a person must help
SILENCE_S = 20.0  # so long nobody asks: in its second half nobody comes in twice (once, for who is likely to ask)
ASK_AGAIN_S = 3.0
CHECK_S = 12.0  # within this a service that stands still agrees with the devices
CORDONED_S = 8.0  # a GPU that is lost for so long is cordoned by then: three looks, and what a look may hang
_RESOLVED_BY_PEOPLE = frozenset({BlockKind.PINNED, BlockKind.CORDONED, BlockKind.QUARANTINED})


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
    return await _Run(script, folder).play()


def _memory_dir() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108 — only to be quick


class _Run:
    def __init__(self, script: Script, folder: Path) -> None:
        self.script = script
        self.world = World(script.seed, script.shape)
        self.engines = {e.name: SimEngine(self.world, e) for e in script.shape.engines}
        self.config = fleet_config(script.shape)
        self.judge = Judge(self.world, self.engines, int(script.shape.host_budget_gib * GIB))
        self.disk = SimDisk(self.world)
        self.launcher = SimLauncher(self.world, self.engines)
        self.strikes = Strikes(self.world, self.engines, self.disk, self.launcher, self.judge, self._expect_cordon)
        self.network = Network(self.world, tuple(self.engines.values()), self.judge.on_serve)
        self.requests: Counter[str] = Counter()
        self.clients: dict[asyncio.Task[Answer], Ask] = {}
        self.kills: list[Kill] = []
        self.coming_in: Counter[str] = Counter()  # swaps that bring an engine in
        self.ledger_path = folder / "ledger.db"
        self.ledger_path.write_bytes(new_ledger())
        self.world.on_effect = self._on_effect
        self.loop = asyncio.get_running_loop()
        if isinstance(self.loop, SimLoop):
            self.loop.connect = self.network.connect

    async def play(self) -> Outcome:
        with errors_are_failures(self.judge):
            self.life = self._begin_life()
            ticking = self.world.spawn(self._tick())
            playing = self.world.spawn(self._story())
            try:
                await asyncio.wait((playing, ticking), return_when=asyncio.FIRST_COMPLETED)
                if playing.done():
                    playing.result()
            except Stalled as e:
                self.judge.fail("nothing waits for ever", str(e))
            await self.life.kill()
            await self.world.end()
        trace = tuple(self.world.trace.last) if self.judge.failure else ()
        seed, failure, digest = self.script.seed, self.judge.failure, self.world.trace.digest()
        injected, checks = self.world.injected, self.judge.checks
        return Outcome(seed, failure, digest, self.world.now(), self.requests, injected, checks, trace)

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
        await self._settle()
        await self._silence()

    # -- lives of the service ----------------------------------------------------------------------------------------

    def _begin_life(self) -> ServiceLife:
        parts = (self.network, self.launcher, self.disk)
        life = ServiceLife(self.world, self.config, self.ledger_path, parts, self._on_bus, self._on_exit)
        self.judge.watch(life)
        return life

    def _on_effect(self, kind: str) -> None:
        """Called by the service's own task as it is about to change the world."""
        if (kill := next((k for k in self.kills if k.before == kind), None)) is not None:
            self.kills.remove(kill)
            self._kill(kill)

    def _kill(self, kill: Kill) -> None:
        if kill.steps == 0:
            self.life.dead = True
        self.world.spawn(self._kill_and_restart(self.life, kill))

    async def _kill_and_restart(self, life: ServiceLife, kill: Kill) -> None:
        for _ in range(kill.steps):
            await asyncio.sleep(0)
        if life is not self.life or (life.dead and kill.steps):
            return
        self.world.trace.note("the service is killed")
        self.world.injected[f"kill before {kill.before}" if kill.before else "kill"] += 1
        await self._restart(life, kill.down_s)

    def _on_exit(self, life: ServiceLife) -> None:
        self.world.spawn(self._restart(life, START_AGAIN_S))

    async def _restart(self, life: ServiceLife, down_s: float) -> None:
        await life.kill()
        await asyncio.sleep(down_s)
        if life is self.life:
            self.judge.shaken()
            self.life = self._begin_life()

    def _on_bus(self, life: ServiceLife, event: BusEvent) -> None:
        if life.dead:
            return
        data = {k: v for k, v in event.data.items() if k not in ("id", "plan", "phases_s", "evidence")}
        self.world.trace.note(f"{event.kind} {event.engine or ''} {data}")
        self.judge.on_event(life, event)
        if event.kind == "swap.begun" and event.engine is not None:
            self.coming_in[event.engine] += 1
        elif event.kind == "service.ready":
            life.adopted_s = self.world.now()
            life.spawn(self._check_ledger(life))

    async def _check_ledger(self, life: ServiceLife) -> None:
        """After a recovery the ledger agrees with the devices, unless something else happens first."""
        begun = self.world.now()
        differences: tuple[str, ...] = ()
        shakes = self._shakes()
        while self.world.now() - begun < CHECK_S:
            await asyncio.sleep(TICK_S)
            if shakes[0] or self._shakes() != shakes or life.dead or not self._stands_still(life):
                return
            check = await life.operator.check_ledger()
            if check.matches:
                self.judge.checks["the ledger equals the devices"] += 1
                return
            differences = check.differences
        if self._shakes() == shakes and self._stands_still(life) and not life.dead:
            self.judge.fail("the ledger equals the devices", f"after a recovery: {differences}")

    def _shakes(self) -> tuple[float, ...]:
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
    def _stands_still(life: ServiceLife) -> bool:
        moving = any(e.state not in _STILL for e in life.loop.all_runtimes())
        return life.up and not life.loop.active and not moving

    # -- what happens ------------------------------------------------------------------------------------------------

    def _apply(self, event: Event) -> None:
        if not isinstance(event, Ask | Arm | Kill):
            self.world.injected[_fault_name(event)] += 1
            self.world.trace.note(f"script: {event}")
        match event:
            case Ask():
                self._ask(event)
            case Arm():
                self.engines[event.engine].arm(event)
            case Order():
                self._order(event)
            case Kill(before=""):
                self._kill(event)
            case Kill():
                self.kills.append(event)
            case _:
                self.strikes.strike(event)

    async def _expect_cordon(self, event: Nvml) -> None:
        """A lost GPU is kept out until a person has seen to it, unless the service was away or the script lifted it."""
        life, lifted = self.life, self.world.injected["order uncordon"]
        await asyncio.sleep(CORDONED_S)
        lasted = self.world.gpus[event.gpu].query == "lost" and not self.world.calm.is_set()
        if not lasted or life is not self.life or not self._adopted() or self.world.now() - life.adopted_s < CORDONED_S:
            return
        cordoned = life.loop.fleet.gpus[event.gpu].cordoned is not None
        untouched = self.world.injected["order uncordon"] == lifted
        self.judge.expect(cordoned or not untouched, "a lost GPU is cordoned", f"{event.gpu} is not")

    def _ask(self, ask: Ask) -> None:
        if not self.life.up:
            self.requests["down"] += 1
            return
        task = self.world.spawn(self._one_client(ask))
        self.clients[task] = ask
        task.add_done_callback(lambda done: self.clients.pop(done, None))

    async def _one_client(self, ask: Ask) -> Answer:
        life = self.life
        answer = await Client(self.world, life, ask).run()
        if answer.verdict == "forgotten" and life.up and self._needs_a_person(ask.engine):
            answer.verdict = "left"  # it stands still until somebody lets its engine wake
        self.requests[answer.verdict] += 1
        self.judge.on_answer(answer, life)
        return answer

    def _order(self, order: Order) -> None:
        if self.life.up:
            for name in self.engines if order.force else (order.target,):  # who makes room for a force is aborted too
                if order.force or order.verb in ("stop", "restart"):
                    self.judge.forced(name)
            self.life.spawn(self._carry_out(self.life, order))

    async def _carry_out(self, life: ServiceLife, order: Order) -> None:
        operator, target = life.operator, order.target
        try:
            match order.verb:
                case "wake" | "sleep" | "stop" | "start":
                    command = Command(CommandKind(order.verb), target, force=order.force)
                    await operator.command(command, wait=True, deadline_s=60.0)
                case "restart":
                    await operator.restart(target, wait=True, deadline_s=60.0)
                case "release":
                    await operator.release(target)
                case "pin" | "unpin":
                    await operator.set_pin(target, order.verb == "pin")
                case _:
                    await operator.set_cordon(target, order.verb == "cordon", "by the script")
        except RotatorError as e:
            self.world.trace.note(f"{order.verb} {target}: {e}")

    # -- at the end --------------------------------------------------------------------------------------------------

    def _calm(self) -> None:
        """Nothing fails any more."""
        self.world.trace.note("faults end")
        self.world.calm.set()
        self.kills.clear()
        for engine in self.engines.values():
            engine.disarm()
        self.judge.shaken()

    async def _settle(self) -> None:
        """Every engine serves again, or is in a state that a person must resolve."""
        give_up_s = self.world.now() + SETTLE_S
        await self._back()
        await asyncio.gather(*(self._serves_again(name, give_up_s) for name in self.engines))
        if self.clients:
            await asyncio.wait(tuple(self.clients), timeout=max(1.0, give_up_s - self.world.now()))
        late = [ask.key for ask in self.clients.values() if not self._needs_a_person(ask.engine)]
        self.judge.expect(not late, "every request ends", f"{late} are still open after everything settled")

    async def _back(self) -> None:
        back_by_s = self.world.now() + BACK_S
        while not self._adopted() and self.world.now() < back_by_s:  # noqa: ASYNC110 — virtual time
            await asyncio.sleep(TICK_S)
        self.judge.expect(self.life.up, "the service comes back", f"it was not up {BACK_S:g} s after the last fault")

    def _adopted(self) -> bool:
        return self.life.up and not self.life.loop.adopting

    async def _serves_again(self, name: str, give_up_s: float) -> None:
        for n in range(1000):
            if not self.life.up:
                return  # told already
            answer = await self._one_client(Ask(self.world.now(), f"{name}-{n}", name, 2, 0.05, True, 60.0))
            self.judge.checks["a quiet fleet converges"] += 1
            if answer.verdict == "whole" or self._needs_a_person(name):
                return
            if self.world.now() > give_up_s:
                state = self.life.loop.runtime(name)
                text = f"{name} is {state.state.value} ({state.reason}) and answers: {answer.status} {answer.error}"
                self.judge.fail("a quiet fleet converges", text)
                return
            await asyncio.sleep(ASK_AGAIN_S)

    def _needs_a_person(self, name: str) -> bool:
        loop = self.life.loop
        if loop.runtime(name).state is State.QUARANTINED:
            return bool(loop.runtime(name).reason)
        blocked = loop.plan_for((Command(CommandKind.WAKE, name),)).blocked
        return any(b.engine == name and b.kind in _RESOLVED_BY_PEOPLE for b in blocked)

    async def _silence(self) -> None:
        """Nobody asks for anything: nothing may come in for ever, and the books are true."""
        await asyncio.sleep(SILENCE_S / 2)
        self.coming_in.clear()
        await asyncio.sleep(SILENCE_S / 2)
        again = [f"{name} {count} times" for name, count in self.coming_in.items() if count > 1]
        self.judge.expect(not again, "a quiet fleet comes to rest", f"brought in for nobody: {', '.join(again)}")
        life = self.life
        rests_by_s = self.world.now() + SILENCE_S
        while not self._stands_still(life) and self.world.now() < rests_by_s:  # noqa: ASYNC110 — virtual time
            await asyncio.sleep(TICK_S / 5)
        self.judge.rest(life)
        check = await life.spawn(life.operator.check_ledger())
        self.judge.expect(check.matches, "the ledger equals the devices", f"at rest: {check.differences}")
        page = await life.spawn(life.ledger.query("transitions", filters={}, limit=1000))
        left = [f"{row['engine']} {row['action']}" for row in page.rows if row["result"] in (None, "open")]
        self.judge.expect(not left, "every transition has an outcome", f"without one: {left}")


_STILL = frozenset({State.STOPPED, State.AWAKE, State.ASLEEP, State.FAILED, State.QUARANTINED})


def _fault_name(event: Event) -> str:
    name = type(event).__name__.lower()
    how = getattr(event, "how", None) or getattr(event, "verb", None)
    return f"{name} {how}" if how else name
