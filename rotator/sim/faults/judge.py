"""What must hold whatever fails: looked at whenever bytes, transitions, engines or requests change, and every tick."""

from collections import Counter
from collections.abc import Mapping

from rotator.core import watchdog
from rotator.core.lifecycle import is_moving
from rotator.core.placement import Room
from rotator.core.values import EngineName, GpuId, State
from rotator.service.events import Event
from rotator.sim.faults.clients import Answer
from rotator.sim.faults.engine import SimEngine
from rotator.sim.faults.life import ServiceLife
from rotator.sim.faults.process import Process
from rotator.sim.faults.world import GIB, Gpu, World

GRACE_S = 1.0  # over a waiting request's deadline
CAUSE_S = 60.0  # an engine is condemned within this of what was wrong with it
NEWS_S = 6.0  # what happened to a GPU's bytes so lately, a plan may not know yet
TURN_S = 0.05
SPARE_GIB = 0.6  # the configuration's residue tolerance, and a little
UNFIT = "found running, but unfit"  # it passes through a live state on its way out: nothing is begun


class Judge:
    """``failure`` is the first thing that did not hold, with its name; ``checks`` counts what was looked at."""

    def __init__(self, world: World, engines: Mapping[EngineName, SimEngine], host_budget_bytes: int) -> None:
        self.failure: tuple[str, str] | None = None
        self.checks: Counter[str] = Counter()
        self._world = world
        self.engines = engines
        self._host_budget_bytes = host_budget_bytes
        self.removed: set[EngineName] = set()  # those that the fleet file lacked once
        self._served: dict[str, int] = {}
        self._condemned_at_s: list[tuple[EngineName, float, str]] = []
        self._forced_at_s: list[tuple[EngineName, float]] = []
        self._shaken_at_s: list[float] = []  # when something happened that concerns every engine
        self._life: ServiceLife | None = None
        self._stood_since_s: dict[tuple[ServiceLife, EngineName], float] = {}
        self._ticks = 0
        world.on_bytes = self.on_bytes
        world.on_operation = self.on_operation

    def fail(self, name: str, text: str) -> None:
        if self.failure is None:
            self.failure = name, text
            self._world.trace.note(f"VIOLATION {name}: {text}")

    def expect(self, holds: bool, name: str, text: str) -> None:
        self.checks[name] += 1
        if not holds:
            self.fail(name, text)

    def watch(self, life: ServiceLife) -> None:
        self._life = life

    def shaken(self) -> None:
        self._shaken_at_s.append(self._world.now())

    @property
    def shakes(self) -> int:
        return len(self._shaken_at_s)

    def on_put_away(self, life: ServiceLife) -> None:
        """The service ends, and puts its engines away by force."""
        for name in self.engines:
            self.forced(name)

    def forced(self, engine: EngineName) -> None:
        self._forced_at_s.append((engine, self._world.now()))

    # -- bytes -------------------------------------------------------------------------------------------------------

    def on_bytes(self, gpu: Gpu) -> None:
        self.expect(gpu.used <= gpu.total, "no GPU is overcommitted", f"{gpu.id} holds {gpu.used / GIB:.1f} GiB")
        self._host()

    def _host(self) -> None:
        used = self._world.host_used
        text = f"masters take {used / GIB:.1f} GiB of {self._host_budget_bytes / GIB:.1f}"
        self.expect(used <= self._host_budget_bytes, "no host RAM is overcommitted", text)

    # -- transitions -------------------------------------------------------------------------------------------------

    def on_operation(self, process: Process) -> None:
        self._host()
        for other in self._others(process):
            both_sleep = process.operation == other.operation == "sleep"
            begins = f"{process.shape.name} begins to {process.operation}"
            text = f"{begins} while {other.shape.name} is in its {other.operation}"
            self.expect(both_sleep, "no two transitions on one GPU", text)
        if process.operation == "boot":
            count = len(process.engine.processes)
            self.expect(count <= 1, "no engine is doubled", f"{process.shape.name} has {count} processes")
        if process.operation in ("wake", "boot"):
            self._fits(process)

    def _others(self, process: Process) -> list[Process]:
        mine = set(process.engine.gpus)
        return [
            other
            for engine in self.engines.values()
            if engine is not process.engine and not mine.isdisjoint(engine.gpus)
            for other in engine.processes
            if other.operation and not engine.was_undying
        ]

    def _fits(self, process: Process) -> None:
        """What is begun must fit, but for bytes that came too lately to be known."""
        wanted = int(process.shape.awake_gib * GIB)
        for gpu in (self._world.gpus[id] for id in process.engine.gpus):
            lacks = gpu.used - gpu.held.get(process.pid, 0) + wanted - gpu.total
            known = self._world.now() - gpu.disturbed_at_s > self._knowledge_s(process)
            text = f"{process.shape.name} begins to {process.operation} and lacks {lacks / GIB:.2f} GiB on {gpu.id}"
            self.expect(lacks <= 0 or not known, "what is woken fits", text)

    def _knowledge_s(self, process: Process) -> float:
        """How old the newest bytes on a GPU must be for the plan to have known them."""
        life, blind = self._life, any(g.query for g in self._world.gpus.values())
        swaps = life.loop.active.values() if life and life.up else ()
        mine = (s.begun_at_s for s in swaps if s.swap.admit and s.swap.admit.engine == process.shape.name)
        since = self._world.now() - min(process.asked_at_s, *mine, process.asked_at_s)
        return since + NEWS_S + (CAUSE_S if blind else 0.0)

    # -- what the service says ---------------------------------------------------------------------------------------

    def on_event(self, life: ServiceLife, event: Event) -> None:
        if event.kind in ("engine.starting", "engine.waking") and UNFIT not in str(event.data.get("reason")):
            text = f"{event.engine} is brought in while all are put away"
            self.expect(not life.puts_away, "nothing comes in while a service ends", text)
        if event.engine is None or not event.kind.startswith("engine."):
            return
        state, cause = event.data.get("state"), event.data.get("event")
        if state in (State.WAKING, State.STARTING) and UNFIT not in str(event.data.get("reason")):
            self._known_to_fit(life, event.engine)
        if cause in ("fault", "lied"):
            self._condemned_at_s.append((event.engine, self._world.now(), str(cause)))
            self._has_cause(event.engine, str(event.data.get("reason")))
        elif cause == "stop":
            self._condemned_at_s.append((event.engine, self._world.now(), "stop"))

    def _known_to_fit(self, life: ServiceLife, engine: EngineName) -> None:
        loop = life.loop
        snapshot = loop.snapshot()
        room = Room(snapshot.gpus, snapshot.engines.values())
        for gpu in snapshot.engines[engine].gpus:
            fresh = self._world.now() - self._world.gpus[gpu].disturbed_at_s < NEWS_S
            text = (
                f"{engine} is brought in with {room.free[gpu] / GIB:.2f} GiB free on {gpu} by the service's own books"
            )
            self.expect(room.free[gpu] >= 0 or fresh, "nothing is begun that does not fit by the books", text)

    def _has_cause(self, engine: EngineName, reason: str) -> None:
        self.expect(self.excused(self.engines[engine]), "no engine is condemned without cause", f"{engine}: {reason}")

    def excused(self, engine: SimEngine) -> bool:
        """Whether something failed of late that concerns it."""
        now = self._world.now()
        lately = [*engine.troubled_at_s, *self._shaken_at_s, *(self._world.gpus[g].disturbed_at_s for g in engine.gpus)]
        return any(now - at_s <= CAUSE_S for at_s in lately) or any(self._world.gpus[g].query for g in engine.gpus)

    # -- every tick --------------------------------------------------------------------------------------------------

    def tick(self) -> None:
        life = self._life
        if life is None or not life.up:
            return
        self._ticks += 1
        for entry in life.traffic.entries() if self._ticks % 4 == 0 else ():  # they cost an estimate an engine
            text = f"a request for {entry.engine} waits {-entry.deadline_in_s:.1f} s past its deadline"
            self.expect(entry.deadline_in_s > -GRACE_S, "waits are bounded", text)
        self._claims(life)
        self._wedges(life)
        self.expect(life.loop.bugs == 0, "no decision raises", "a decision raised: see the log")

    def _wedges(self, life: ServiceLife) -> None:
        """An engine with work that stands still behind its /health is found out in time. Time counts while one life of
        the service believes it awake and in no swap."""
        watch, now = life.loop.world.config.watchdog, self._world.now()
        bound_s = watchdog.noticed_within_s(
            watch.bounds(), every_s=watch.every_s, probe_deadline_s=watch.probe_deadline_s, young=True
        )
        yielding = {step.engine for a in life.loop.active.values() for step in a.swap.evict}
        for name, engine in self.engines.items():
            process, runtime = engine.process, life.loop.fleet.engines.get(name)
            stands = process is not None and process.wedged_since_s is not None and any(w.busy for w in process.wires)
            if (
                not stands
                or runtime is None
                or runtime.state is not State.AWAKE
                or name in yielding
                or life.loop.adopting
            ):
                self._stood_since_s.pop((life, name), None)
                continue
            stood_s = now - self._stood_since_s.setdefault((life, name), now)
            text = f"{name} has stood for {stood_s:.1f} s with work, and is believed awake"
            self.expect(stood_s <= bound_s, "a wedge is noticed", text)

    def _claims(self, life: ServiceLife) -> None:
        taken: dict[GpuId, str] = {}
        for active in life.loop.active.values():
            for gpu in active.swap.gpus:
                text = f"{gpu} is in two swaps at once"
                self.expect(taken.setdefault(gpu, active.id) == active.id, "no two swaps on one GPU", text)

    # -- requests ----------------------------------------------------------------------------------------------------

    def on_serve(self, process: Process, key: str) -> None:
        self._served[key] = self._served.get(key, 0) + 1
        self.expect(
            self._served[key] == 1, "no request is sent twice", f"{key} reached engines {self._served[key]} times"
        )

    def on_answer(self, answer: Answer, life: ServiceLife) -> None:
        ask = answer.ask
        self._world.trace.note(f"{ask.key} {ask.engine} {answer.verdict} {answer.status} {len(answer.body)}")
        self.expect(answer.verdict != "forgotten", "no request is forgotten", f"{ask.key} for {ask.engine} got no byte")
        if answer.status == 200:
            self._genuine(answer)
        if answer.served_by != ask.engine:
            may = self.engines[ask.engine].shape.fallback
            text = f"{ask.key} for {ask.engine} was served by {answer.served_by}"
            self.expect(answer.served_by == may, "a request goes elsewhere only by its fallback", text)
        if answer.verdict == "whole":
            self._whole(answer)
        elif answer.status == 404 and answer.code == "model_not_found":
            self.expect(ask.engine in self.removed, "every model is found", f"{ask.key} asked for {ask.engine}")
        elif answer.verdict in ("broken", "failed"):
            text = (
                f"{ask.key} for {ask.engine} ended as {answer.verdict} ({answer.status} {answer.error}) without cause"
            )
            self.expect(self._may_break(answer, life), "no request is lost", text)
        elif answer.verdict == "refused" and answer.code == "wait_expired":
            early = ask.deadline_s - (answer.ended_s - answer.begun_s)
            self.expect(early <= GRACE_S, "nobody is turned away early", f"{ask.key} was, by {early:.1f} s")

    def _genuine(self, answer: Answer) -> None:
        """Every piece is this request's, of its own model, in order, once."""
        ask = answer.ask
        engine = self.engines[answer.served_by]
        if answer.verdict != "whole" and not ask.stream:
            return
        try:
            texts = answer.texts()
        except (ValueError, KeyError, IndexError):
            texts = ["something that cannot be read"]
        expected = [f"{engine.model}|{ask.key}|{i}" for i in range(len(texts))]
        text = f"{ask.key} for {ask.engine} got {texts[:4]}"
        self.expect(texts == expected, "every answer is genuine", text)

    def _whole(self, answer: Answer) -> None:
        count = len(answer.texts())
        text = f"{answer.ask.key} for {answer.ask.engine} looks whole with {count} of {answer.ask.tokens} pieces"
        self.expect(count == answer.ask.tokens and answer.says_done, "what looks whole is whole", text)

    def _may_break(self, answer: Answer, life: ServiceLife) -> bool:
        """For what befell the engine that was asked for, or its fallback."""
        asked = answer.ask.engine
        names = {asked, self.engines[asked].shape.fallback} & self.engines.keys()
        return life.dead or any(self._befell(name, answer) for name in names)

    def _befell(self, engine: EngineName, answer: Answer) -> bool:
        begun, ended = answer.begun_s - TURN_S, answer.ended_s + TURN_S
        told = any(
            name == engine and cause != "stop" and begun <= at <= ended for name, at, cause in self._condemned_at_s
        )
        forced = any(name == engine and begun - 60.0 <= at <= ended for name, at in self._forced_at_s)
        own = any(begun <= at <= ended for at in self.engines[engine].troubled_at_s)
        return told or forced or own

    # -- at rest -----------------------------------------------------------------------------------------------------

    def rest(self, life: ServiceLife) -> None:
        """The service's book against the world's truth, once everything stands still."""
        gone = [
            name for name, engine in self.engines.items() if engine.processes and name not in life.loop.fleet.engines
        ]
        self.expect(not gone, "no engine is leaked", f"{gone} run and are not in the fleet")
        for runtime in life.loop.all_runtimes():
            engine, state = self.engines[runtime.name], runtime.state
            processes = engine.processes
            text = f"{runtime.name} is {state.value} ({runtime.reason}) and has {len(processes)} processes"
            self.expect(not is_moving(state), "a quiet fleet comes to rest", text)
            running = state in (State.AWAKE, State.ASLEEP)
            self.expect(len(processes) == (1 if running else 0), "no engine is leaked", text)
            if running and processes:
                right = processes[0].sleeping == (state is State.ASLEEP) and processes[0].ready
                self.expect(right, "states are true", f"{text}; sleeping is {processes[0].sleeping}")
                self._holds(processes[0], text)

    def _holds(self, process: Process, text: str) -> None:
        """What it holds is what its state is worth, within what a verified sleep may leave besides."""
        shape = process.shape
        deep = process.sleeping and process.level != 0  # who only paused holds what nobody needed yet
        most = int((shape.residue_gib + SPARE_GIB if deep else shape.awake_gib) * GIB)
        for gpu in process.engine.gpus:
            held = process.held_on(gpu)
            self.expect(held <= most, "bytes are true", f"{text}, which hold {held / GIB:.1f} GiB on {gpu}")
