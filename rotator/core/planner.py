"""What to do now, and why everything else waits: ``plan(snapshot) -> Plan``.

Wishes are served in turn: commands (oldest first), engines that the calendar keeps awake, engines that clients want (by
urgency, the overdue first), engines to be loaded at start, default engines, and last those that are likely wanted soon.
A wish that fits goes in; else the cheapest set of engines yields for it; else it is blocked, with the reason. What then
is idle may go down the ladder. When the service ends, only the first of these are served (``Serves``). Three rules
make that safe and fair:

  * Every GPU takes part in one swap at most, and in none while a transition is under way on it. So the free bytes of a
    GPU never change within one plan, and a plan's swaps may run in any order or at once.
  * A wish that is blocked by something that passes by itself (a transition, a minimum stay) keeps its GPUs, and those
    of whoever must yield to it, closed to all later wishes: nobody can overtake it for ever.
  * Host RAM for masters is only ever taken within a plan. A wake gives its masters back when it is over, but the engine
    that yields to it needs room for its own before that.
"""

from collections.abc import Sequence

from rotator.core import calendar, reasons
from rotator.core.admission import Planning
from rotator.core.eviction import Option, stop_option
from rotator.core.hostram import HostBytes, clipped, fits, left_for
from rotator.core.ladder import descents
from rotator.core.lifecycle import is_moving
from rotator.core.placement import gib
from rotator.core.policy import by_turn
from rotator.core.recycle import recycling
from rotator.core.values import (
    Blocked,
    BlockKind,
    Command,
    CommandKind,
    Engine,
    GpuId,
    Level,
    Plan,
    Serves,
    Snapshot,
    State,
)
from rotator.core.yielding import Wish


def plan(snapshot: Snapshot) -> Plan:
    """Decide what happens now. The same snapshot gives the same plan. Raises nothing for any well-formed snapshot."""
    if snapshot.serves is not Serves.ALL:
        return _last(snapshot)
    schedule = calendar.resolve(snapshot)
    snapshot = calendar.applied(snapshot, schedule)
    planning = Planning(snapshot)
    _Orders(snapshot, planning).serve()
    planning.blocked.extend(schedule.overruled)
    for call in schedule.calls:
        if call.engine not in planning.asked:
            planning.admit(Wish(snapshot.engines[call.engine], reason=call.reason))
    _take_turns(snapshot, planning)
    for engine in _preloads(snapshot):
        if engine.name not in planning.asked:
            planning.admit(Wish(engine, preload=True))
    for call in schedule.defaults:
        if call.engine not in planning.asked:
            planning.admit(Wish(snapshot.engines[call.engine], preload=True, reason=call.reason))
    _prewake(snapshot, planning)
    sinking = descents(snapshot, planning.room, planning.host_free_bytes)
    for descent in sinking.due:
        planning.sink(descent)
    restarts = recycling(snapshot, planning.room)
    for descent in restarts.due:
        planning.sink(descent)
    look_again_s = [b.until_s for b in planning.blocked if b.until_s is not None]
    if restarts.look_again_at_s is not None:
        look_again_s.append(restarts.look_again_at_s)
    if sinking.look_again_at_s is not None:
        look_again_s.append(sinking.look_again_at_s)
    if schedule.look_again_at_s is not None:
        look_again_s.append(schedule.look_again_at_s)
    return Plan(tuple(planning.swaps), tuple(planning.blocked), min(look_again_s, default=None))


def _last(snapshot: Snapshot) -> Plan:
    """What still happens when the service ends: whatever else came in now would outlive it."""
    planning = Planning(snapshot)
    _Orders(snapshot, planning).serve()
    if snapshot.serves is Serves.UNDER_WAY:
        _take_turns(snapshot, planning)
    untils_s = (b.until_s for b in planning.blocked if b.until_s is not None)
    return Plan(tuple(planning.swaps), tuple(planning.blocked), min(untils_s, default=None))


def _take_turns(snapshot: Snapshot, planning: Planning) -> None:
    planning.turns = by_turn(snapshot)
    for engine in planning.turns:
        if engine.name not in planning.asked and not planning.turned_away(engine):
            planning.admit(Wish(engine))


def _prewake(snapshot: Snapshot, planning: Planning) -> None:
    """Wake sleepers that are likely wanted soon, the likeliest first, into room that costs nobody. Room that a likelier
    one has no use for yet is kept for it: whoever came in there would be sent to sleep for it again."""
    least = snapshot.policy.prewake_chance
    if least is None:
        return
    likely = [e for e in snapshot.engines.values() if e.demand.soon >= least and e.state is State.ASLEEP]
    kept: set[GpuId] = set()
    for engine in sorted(likely, key=lambda e: (-e.demand.soon, e.name)):
        if not kept.isdisjoint(engine.gpus) or not planning.fits(engine):
            kept.update(engine.gpus)
        elif engine.name not in planning.asked:
            chance = f"{engine.demand.soon:.0%}, {engine.demand.likely_why or 'by its history'}"
            reason = f"{engine.name} is likely wanted soon ({chance}) and there is room that nobody else wants"
            planning.admit(Wish(engine, preload=True, reason=reason, ahead=True))


def _preloads(snapshot: Snapshot) -> list[Engine]:
    idle = (e for e in snapshot.engines.values() if e.preload and e.state in (State.STOPPED, State.FAILED))
    return sorted(idle, key=lambda e: (-e.priority, e.name))


class _Orders:
    """Operators' commands, on their way into the plan."""

    def __init__(self, snapshot: Snapshot, planning: Planning) -> None:
        self._planning = planning
        self._engines = snapshot.engines
        self._policy = snapshot.policy
        self._commands = sorted(snapshot.commands, key=lambda c: c.issued_at_s)

    def serve(self) -> None:
        """Serve the operators, oldest command first; a sleep given with a wake that gains by it is one swap."""
        pending = list(self._commands)
        while pending:
            command = pending.pop(0)
            wake = command if _brings_in(command) else self._partner(command, pending)
            if wake is None:
                self._serve(command)
                continue
            sleeps = [c for c in [command, *pending] if c is not wake and self._makes_way(c, wake)]
            pending = [c for c in pending if c is not wake and c not in sleeps]
            self._serve_wake(wake, sleeps)

    def _partner(self, sleep: Command, pending: Sequence[Command]) -> Command | None:
        return next((c for c in pending if _brings_in(c) and self._makes_way(sleep, c)), None)

    def _makes_way(self, sleep: Command, wake: Command) -> bool:
        """Whether both were given together and the sleep makes room on a GPU that the wake needs."""
        yielding, coming = self._engines.get(sleep.engine), self._engines.get(wake.engine)
        if yielding is None or coming is None or yielding is coming or sleep.kind is not CommandKind.SLEEP:
            return False
        together = sleep.issued_at_s == wake.issued_at_s
        useful = yielding.state is State.AWAKE and coming.state is not State.AWAKE
        return together and useful and not frozenset(yielding.gpus).isdisjoint(coming.gpus)

    def _serve_wake(self, wake: Command, sleeps: Sequence[Command]) -> None:
        """A wake or start, with the sleeps given together with it: all of it happens, or nothing."""
        if (refused := self._refusal(wake)) is not None:
            self._planning.block(refused)
            for sleep in sleeps:
                self._serve(sleep)
            return
        options: list[Option] = []
        host_free = self._planning.host_free_bytes
        for sleep in sleeps:
            option = self._commanded_sleep(sleep, host_free)
            if isinstance(option, Blocked):
                self._planning.block(option)
                self._planning.block(Blocked(wake.engine, option.kind, f"waits: {option.reason}", option.until_s, wake))
                return
            options.append(option)
            host_free -= option.host_bytes
        forced = {c.engine for c in sleeps if c.force}
        blocked = self._planning.admit(Wish(self._engines[wake.engine], wake), tuple(options), frozenset(forced))
        if blocked is not None:
            for sleep in sleeps:
                reason = f"stays as it is: {wake.engine}, for which it was to make room, is blocked: {blocked.reason}"
                self._planning.block(Blocked(sleep.engine, blocked.kind, reason, blocked.until_s, sleep))

    def _serve(self, command: Command) -> None:
        if (refused := self._refusal(command)) is not None:
            self._planning.block(refused)
            return
        way = self._commanded_sleep if command.kind is CommandKind.SLEEP else self._commanded_stop
        option = way(command, self._planning.host_free_bytes)
        if isinstance(option, Blocked):
            self._planning.block(option)
            return
        self._planning.commit_alone(option, command)

    def _refusal(self, command: Command) -> Blocked | None:
        """Why the command makes no sense as things are, with what would; None where it does."""
        name, engine = command.engine, self._engines.get(command.engine)
        if engine is None:
            return Blocked(
                name, BlockKind.REFUSED, f"there is no engine {name}: see the list of engines", None, command
            )
        text: str | None = None
        match command.kind, engine.state:
            case _, state if is_moving(state):
                return Blocked(
                    name, BlockKind.BUSY, f"{name} is {state.value}: its transition ends first", None, command
                )
            case ((CommandKind.WAKE | CommandKind.START), State.AWAKE):
                text = f"{name} is already awake"
            case CommandKind.START, State.ASLEEP:
                text = f"{name} is asleep, not stopped: wake it"
            case CommandKind.SLEEP, State.ASLEEP:
                text = f"{name} is already asleep: wake it before it can sleep at another level"
            case CommandKind.SLEEP, state if state is not State.AWAKE:
                text = f"{name} is {state.value} and only an awake engine can sleep: wake it first"
            case CommandKind.SLEEP, _ if command.level is not None and command.level not in _deep(engine):
                text = f"{name} may not sleep at level {command.level.value}: its levels are {_levels(engine)}"
            case CommandKind.SLEEP, _ if not _deep(engine):
                text = f"{name} has no sleep level: stop it"
            case CommandKind.STOP, State.STOPPED:
                text = f"{name} is already stopped"
            case CommandKind.STOP, _ if not engine.can_stop:
                text = f"{name} is attached, not started here: stop it where it was started, or put it to sleep"
        return None if text is None else Blocked(name, BlockKind.REFUSED, text, None, command)

    def _commanded_sleep(self, command: Command, host_free: HostBytes) -> Option | Blocked:
        engine = self._engines[command.engine]
        if (refused := self._refusal(command) or self._planning.shut(engine, command)) is not None:
            return refused
        if engine.demand.in_flight and not engine.can_freeze and not command.force:
            flying = reasons.count(engine.demand.in_flight, "request")
            reason = f"{engine.name} has {flying} in flight that may not be frozen: wait, or force (which aborts them)"
            return Blocked(engine.name, BlockKind.UNFREEZABLE, reason, None, command)
        levels = [o for o in self._planning.sleeps(engine) if command.level in (None, o.level)]
        option = next((o for o in levels if fits(o.host_bytes, clipped(host_free))), None)
        if option is not None:
            return option
        reason = (
            f"{engine.name} needs {gib(engine.host_bytes)} of host RAM to sleep and "
            f"{gib(max(0, left_for(engine, host_free)))} are left: "
            "wake or stop a sleeping engine, raise the budget, allow level 2, or stop it"
        )
        return Blocked(engine.name, BlockKind.HOST_RAM, reason, None, command)

    def _commanded_stop(self, command: Command, _host_free: HostBytes) -> Option | Blocked:
        engine = self._engines[command.engine]
        if (shut := self._planning.shut(engine, command)) is not None:
            return shut
        if engine.state is State.ASLEEP and engine.demand.frozen and not command.force:
            frozen = reasons.count(engine.demand.frozen, "frozen stream")
            reason = f"{engine.name} holds {frozen} that a stop would cut: wake it first, or force"
            return Blocked(engine.name, BlockKind.UNFREEZABLE, reason, None, command)
        return stop_option(engine, self._planning.room.charged[engine.name], self._policy)


def _brings_in(command: Command) -> bool:
    return command.kind in (CommandKind.WAKE, CommandKind.START)


def _deep(engine: Engine) -> tuple[Level, ...]:
    """The levels at which a sleep frees anything."""
    return tuple(level for level in engine.levels if level is not Level.PAUSE)


def _levels(engine: Engine) -> str:
    return ", ".join(str(level.value) for level in _deep(engine)) or "none"
