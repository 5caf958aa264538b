"""The service's lives, one after another: begun, killed, started again, and looked at when they know what runs."""

import asyncio

from rotator.service.events import Event
from rotator.sim.faults.judge_calendar import judge_swap
from rotator.sim.faults.judge_end import judge_end
from rotator.sim.faults.life import ServiceLife
from rotator.sim.faults.script import Kill, Term
from rotator.sim.faults.stage import Stage

START_AGAIN_S = 1.0  # what a supervisor waits before it starts a service again that could not start
CHECK_S = 12.0  # within this a service that stands still agrees with the devices
LOOK_EVERY_S = 0.5


class Lives:
    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._world = stage.world
        self._kills: list[Kill] = []  # before something that the service has not done yet
        stage.world.on_effect = self._on_effect

    def begin(self) -> None:
        stage = self._stage
        parts = (stage.network, stage.launcher, stage.disk)
        ends = self._on_exit, stage.judge.on_put_away
        stage.life = ServiceLife(self._world, stage.file, stage.ledger_path, parts, self._on_bus, *ends)
        stage.judge.watch(stage.life)

    def calm(self) -> None:
        self._kills.clear()

    # -- killed ------------------------------------------------------------------------------------------------------

    def kill(self, kill: Kill) -> None:
        if kill.before:
            self._kills.append(kill)
        else:
            self._kill(kill)

    def _on_effect(self, kind: str) -> None:
        """Called by the service's own task as it is about to change the world."""
        if (kill := next((k for k in self._kills if k.before == kind), None)) is not None:
            self._kills.remove(kill)
            self._kill(kill)

    def _kill(self, kill: Kill) -> None:
        if kill.steps == 0:
            self._stage.life.dead = True
        self._world.spawn(self._kill_and_restart(self._stage.life, kill))

    async def _kill_and_restart(self, life: ServiceLife, kill: Kill) -> None:
        for _ in range(kill.steps):
            await asyncio.sleep(0)
        if life is not self._stage.life or (life.dead and kill.steps):
            return
        self._world.trace.note("the service is killed")
        self._world.injected[f"kill before {kill.before}" if kill.before else "kill"] += 1
        await self._restart(life, kill.down_s)

    # -- told to end -------------------------------------------------------------------------------------------------

    def end(self, term: Term) -> None:
        life = self._stage.life
        if not life.up:  # it does not listen for signals yet, and dies of one
            self._kill(Kill(term.at_s, down_s=term.down_s))
        elif not life.ending:
            life.terminate()
            self._world.spawn(self._ends(life, term))

    async def _ends(self, life: ServiceLife, term: Term) -> None:
        await asyncio.wait((life.main,), timeout=term.patience_s)
        if life.dead:
            return
        if life.main.done():
            self._world.trace.note("the service has ended")
            judge_end(self._stage.judge, life, life.loop.world.config.recovery.on_shutdown)
        await self._restart(life, term.down_s)

    def _on_exit(self, life: ServiceLife) -> None:
        self._world.spawn(self._restart(life, START_AGAIN_S))

    async def _restart(self, life: ServiceLife, down_s: float) -> None:
        await life.kill()
        await asyncio.sleep(down_s)
        if life is self._stage.life:
            self._stage.judge.shaken()
            self.begin()

    # -- what it says ------------------------------------------------------------------------------------------------

    def _on_bus(self, life: ServiceLife, event: Event) -> None:
        if life.dead:
            return
        data = {k: v for k, v in event.data.items() if k not in ("id", "plan", "phases_s", "evidence")}
        self._world.trace.note(f"{event.kind} {event.engine or ''} {data}")
        self._stage.judge.on_event(life, event)
        if event.kind == "swap.begun":
            judge_swap(self._stage.judge, life, event)
            if event.engine is not None:
                self._stage.coming_in[event.engine] += 1
        elif event.kind == "service.ready":
            life.adopted_s = self._world.now()
            life.spawn(self._check_ledger(life))

    async def _check_ledger(self, life: ServiceLife) -> None:
        """After a recovery the ledger agrees with the devices, unless something else happens first."""
        stage, begun = self._stage, self._world.now()
        differences: tuple[str, ...] = ()
        shakes = stage.shakes()
        while self._world.now() - begun < CHECK_S:
            await asyncio.sleep(LOOK_EVERY_S)
            if shakes[0] or stage.shakes() != shakes or life.dead or not stage.stands_still(life):
                return
            check = await life.operator.check_ledger()
            if check.matches:
                stage.judge.checks["the ledger equals the devices"] += 1
                return
            differences = check.differences
        if stage.shakes() == shakes and stage.stands_still(life) and not life.dead:
            stage.judge.fail("the ledger equals the devices", f"after a recovery: {differences}")
