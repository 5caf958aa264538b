"""What must be once faults have ended: everything serves again, and then everything rests."""

import asyncio

from rotator.sim.faults.people import People
from rotator.sim.faults.script import Ask
from rotator.sim.faults.stage import Stage

LOOK_EVERY_S = 0.5
BACK_S = 40.0  # within this after the last fault the service is up
SETTLE_S = 300.0  # within this after the last fault every engine serves, or says why a person must help
SILENCE_S = 20.0  # so long nobody asks: in its second half nobody comes in twice (once, for who is likely to ask)
ASK_AGAIN_S = 3.0
LEAVES_S = 90.0  # whose stream stands behind a pinned engine goes away: the service keeps it while it may stand
FILE_S = 60.0  # within this after the last fault a fleet file is taken


class Settling:
    def __init__(self, stage: Stage, people: People) -> None:
        self._stage = stage
        self._world = stage.world
        self._judge = stage.judge
        self._people = people

    async def settle(self) -> None:
        """Every engine serves again, or is in a state that a person must resolve."""
        stage, give_up_s = self._stage, self._world.now() + SETTLE_S
        await self._back()
        await self._takes_its_file()
        await asyncio.gather(*(self._serves_again(name, give_up_s) for name in stage.engines))
        await self._all_seen(give_up_s)
        if stage.clients:
            await asyncio.wait(tuple(stage.clients), timeout=max(1.0, give_up_s - self._world.now()))
        late = [ask.key for ask in stage.clients.values() if not self._people.needs_a_person(ask.engine)]
        self._judge.expect(not late, "every request ends", f"{late} are still open after everything settled")

    async def _back(self) -> None:
        back_by_s = self._world.now() + BACK_S
        while not self._stage.adopted and self._world.now() < back_by_s:  # noqa: ASYNC110 — virtual time
            await asyncio.sleep(LOOK_EVERY_S)
        up = self._stage.life.up
        self._judge.expect(up, "the service comes back", f"it was not up {BACK_S:g} s after the last fault")

    async def _all_seen(self, give_up_s: float) -> None:
        """Also those that nobody may wake are found out about: one that still starts takes its time to answer."""
        unseen = [""]
        while unseen and self._world.now() < give_up_s:
            unseen = [e.name for e in self._stage.life.loop.all_runtimes() if e.unseen] if self._stage.life.up else []
            await asyncio.sleep(LOOK_EVERY_S if unseen else 0.0)
        self._judge.expect(not unseen, "every engine is found out about", f"nobody knows whether {unseen} run")

    async def _takes_its_file(self) -> None:
        """Whoever mended the fleet file has it read again, and it is taken."""
        if not self._stage.judge.removed:
            return
        for _ in range(int(FILE_S / ASK_AGAIN_S)):
            life = self._stage.life
            if not life.up or await life.spawn(self._people.reload(life)):
                break
            await asyncio.sleep(ASK_AGAIN_S)
        missing = self._stage.engines.keys() - self._stage.life.loop.fleet.engines.keys()
        self._judge.expect(not missing, "a file that is right is taken", f"{sorted(missing)} are still missing")

    async def _serves_again(self, name: str, give_up_s: float) -> None:
        for n in range(1000):
            if not self._stage.life.up:
                return  # told already
            asked = Ask(self._world.now(), f"{name}-{n}", name, 2, 0.05, True, 60.0, LEAVES_S)
            answer = await self._people.one_client(asked)
            self._judge.checks["a quiet fleet converges"] += 1
            served = answer.verdict == "whole" and answer.served_by == name
            if served or self._people.needs_a_person(name):
                return
            if self._world.now() > give_up_s:
                state = self._stage.life.loop.fleet.engines.get(name)
                is_ = f"{state.state.value} ({state.reason})" if state else "missing"
                text = f"{name} is {is_} and answers: {answer.status} {answer.error}"
                self._judge.fail("a quiet fleet converges", text)
                return
            await asyncio.sleep(ASK_AGAIN_S)

    async def rest(self) -> None:
        """Nobody asks for anything: nothing may come in for ever, and the books are true."""
        stage = self._stage
        await asyncio.sleep(SILENCE_S / 2)
        stage.coming_in.clear()
        await asyncio.sleep(SILENCE_S / 2)
        again = [f"{name} {count} times" for name, count in stage.coming_in.items() if count > 1]
        self._judge.expect(not again, "a quiet fleet comes to rest", f"brought in for nobody: {', '.join(again)}")
        life = stage.life
        rests_by_s = self._world.now() + SILENCE_S
        while not stage.stands_still(life) and self._world.now() < rests_by_s:  # noqa: ASYNC110 — virtual time
            await asyncio.sleep(LOOK_EVERY_S / 5)
        self._judge.rest(life)
        await self._books()

    async def _books(self) -> None:
        life = self._stage.life
        check = await life.spawn(life.operator.check_ledger())
        self._judge.expect(check.matches, "the ledger equals the devices", f"at rest: {check.differences}")
        page = await life.spawn(life.ledger.query("transitions", filters={}, limit=1000))
        left = [f"{row['engine']} {row['action']}" for row in page.rows if row["result"] in (None, "open")]
        self._judge.expect(not left, "every transition has an outcome", f"without one: {left}")
