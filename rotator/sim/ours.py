"""The service's own policy in a replay: the same pure planner, asked as the loop asks it."""

from math import inf

from rotator.config_policies import PoliciesConfig
from rotator.core.history import Chains, Expectation, History, Link, SwapTime, strongest
from rotator.core.planner import plan
from rotator.core.values import Action, BlockKind, Demand, Engine, Gpu, Plan, Snapshot, State, Step, Swap
from rotator.sim.box import Box
from rotator.sim.events import ActiveSwap, Victim
from rotator.sim.machine import Machine
from rotator.sim.stays import Stay, standing

# As in the loop: waiting cannot help whoever wants one of these.
HOPELESS = frozenset({BlockKind.NEVER_FITS, BlockKind.PINNED, BlockKind.QUARANTINED, BlockKind.CORDONED})

IDLE_LOOK_S = 10.0  # as the ladder's own patience; the loop plans once a second in any case
EXPECT_EVERY_S, EXPECT_SHARE = 2.0, 0.05  # a chance is looked up anew after this, or after so much more silence
_Seen = tuple[Expectation, Expectation]  # within the horizon of evictions, and of pre-waking
_UNASKED: _Seen = (Expectation(0.0), Expectation(0.0))  # of engines in use: planners ask it only of idle ones


class Ours:
    """``core.planner.plan`` over snapshots of the box. Costs are those of idle links, as a service would know them."""

    notes_arrivals = True

    def __init__(self, machine: Machine, policies: PoliciesConfig) -> None:
        self._policy = policies.core()
        self._stall_max_s = policies.stall_bound_s
        self._horizons_s = (policies.wanted_horizon_s, policies.prewake_horizon_s)
        self._machine = machine
        self._index = machine.index()
        self._names = [spec.name for spec in machine.specs]
        self._gpus = [Gpu(f"GPU-{i}", size) for i, size in enumerate(machine.gpu_bytes)]
        self._on = [tuple(f"GPU-{g}" for g in spec.gpus) for spec in machine.specs]
        self._wake_s = [machine.wake_s(spec, len(spec.gpus)) for spec in machine.specs]
        self._sleep_s = [machine.sleep_s(spec, len(spec.gpus)) for spec in machine.specs]
        self._start_s = [machine.start_s(spec) for spec in machine.specs]
        self._histories = [History() for _ in machine.specs]
        self._chains = Chains()
        self._last: tuple[Snapshot, Plan] | None = None  # the last plan and what it was made of,
        self._stays: tuple[Stay, ...] = ()  # and what it waits for, once somebody wanted to know
        self._looked_s = -inf  # when it last planned while nobody wanted anything
        self._swap_times = [SwapTime() for _ in machine.gpu_bytes]
        self._looked_up = [-inf] * len(machine.specs)  # when an engine's chance was looked up,
        self._look_up_at = [-inf] * len(machine.specs)  # when it is next,
        self._links: list[Link] = [(0.0, None)] * len(machine.specs)  # and what chains said of it then
        self._seen: list[_Seen | None] = [None] * len(machine.specs)
        self._views: list[tuple[tuple[object, ...], Engine] | None] = [None] * len(machine.specs)

    def arrived(self, box: Box, engine: int) -> None:
        self._histories[engine].arrived(box.now, box.now)
        self._look_up_at[engine] = -inf
        self._chains.arrived(self._names[engine], box.now)

    def ended(self, box: Box, engine: int, service_s: float) -> None:
        self._histories[engine].served(service_s)

    def swapped(self, box: Box, swap: ActiveSwap, seconds: float) -> None:
        if swap.interrupts:
            for gpu in swap.gpus:
                self._swap_times[gpu].spent(seconds, box.now)

    def minds(self, box: Box, engine: int) -> bool:
        """In the loop each further waiter brings a plan; here only one that may have ended a turn."""
        if len(box.waiting[engine]) == 1:
            return True
        if self._last is not None:
            self._stays, self._last = standing(*self._last), None
        if not self._stays:
            return True
        served = {name: box.served_at_once(i) for i, name in enumerate(self._names)}
        ends_s = min([stay.ends_s(served) for stay in self._stays])
        box.ask_at(ends_s)
        return box.now >= ends_s

    def decide(self, box: Box) -> None:
        box.watch_idle, box.idle_look_s = False, IDLE_LOOK_S
        if not any(box.waiting) and not any(box.frozen):
            if box.now < self._looked_s + IDLE_LOOK_S:
                box.ask_at(self._looked_s + IDLE_LOOK_S)
                return
            self._looked_s = box.now
        claimed = len(box.claimed()) if box.swaps else 0
        if claimed == len(self._gpus):
            return  # nothing can begin anywhere before a swap ends, and then it is asked anyway
        shown = self.snapshot(box)
        made = plan(shown)
        self._last, self._stays = (shown, made), ()
        for swap in made.swaps:
            self._begin(box, swap)
        for blocked in made.blocked:
            engine = self._index[blocked.engine]
            if blocked.kind in HOPELESS and box.waiting[engine]:
                box.refuse(engine)
        box.watch_idle = bool(made.blocked)
        if made.look_again_at_s is not None:
            box.ask_at(made.look_again_at_s)

    def snapshot(self, box: Box) -> Snapshot:
        """What the service's loop would show its planner now."""
        return Snapshot(
            now_s=box.now,
            gpus=self._gpus_now(box.now),
            engines={name: self._engine(box, i) for i, name in enumerate(self._names)},
            host_budget_bytes=self._machine.host_bytes,
            host_used_bytes=box.host_used,
            claimed=frozenset([f"GPU-{gpu}" for gpu in box.claimed()]) if box.swaps else frozenset(),
            policy=self._policy,
        )

    def _gpus_now(self, now_s: float) -> dict[str, Gpu]:
        """GPUs with what share of their time interrupting swaps have lately cost."""
        return {
            gpu.id: Gpu(gpu.id, gpu.total_bytes, swapping=spent.share(now_s))
            for gpu, spent in zip(self._gpus, self._swap_times, strict=True)
        }

    def _engine(self, box: Box, i: int) -> Engine:
        """An engine's value, built anew only when something about it has changed: most of a fleet is still."""
        now = box.now
        if now >= self._look_up_at[i]:
            self._look_up(now, i)
        waits = bool(box.waiting[i] or box.frozen[i])
        flying = len(box.running[i]) + len(box.inside[i]) + len(box.frozen[i])
        expected = _UNASKED if waits or flying else self._expected(i)
        key = (now if waits else 0.0, len(box.waiting[i]), flying, box.state[i], box.depth[i], box.used_at[i], expected,
               box.yields_after[i] <= now)  # fmt: skip
        known = self._views[i]
        if known is not None and known[0] == key:
            return known[1]
        made = self._view(box, i, expected)
        self._views[i] = (key, made)
        return made

    def _look_up(self, now_s: float, i: int) -> None:
        """Anew when a request came, and with a long silence seldom: by then a chance hardly moves. What its own past
        says does not change before its next request, and is asked when somebody wants to know."""
        silence_s = now_s - (self._histories[i].last_s or 0.0)
        self._looked_up[i], self._look_up_at[i] = now_s, now_s + max(EXPECT_EVERY_S, EXPECT_SHARE * silence_s)
        self._links[i], self._seen[i] = self._chains.chance(self._names[i], now_s), None

    def _expected(self, i: int) -> _Seen:
        seen = self._seen[i]
        if seen is None:
            at_s, past, link = self._looked_up[i], self._histories[i], self._links[i]
            near_s, far_s = self._horizons_s
            seen = strongest(past, link, at_s, near_s, at_s), strongest(past, link, at_s, far_s, at_s)
            self._seen[i] = seen
        return seen

    def _view(self, box: Box, i: int, expected: _Seen) -> Engine:
        spec = self._machine.specs[i]
        return Engine(
            name=spec.name,
            gpus=self._on[i],
            state=box.state[i],
            awake_bytes=spec.awake_bytes,
            residue_bytes=spec.residue_bytes,
            host_bytes=spec.host_bytes,
            depth=box.depth[i],
            levels=spec.levels,
            pinned=spec.pinned,
            priority=spec.priority,
            demand=self._demand(box, i, expected),
            can_freeze=box.yields_after[i] <= box.now,
            awake_since_s=box.awake_since[i],
            wake_cost_s=self._wake_s[i],
            sleep_cost_s=self._sleep_s[i],
            start_cost_s=self._start_s[i],
            slots=spec.slots,
        )

    def _demand(self, box: Box, i: int, expected: _Seen) -> Demand:
        past = self._histories[i]
        flying = box.in_flight(i)
        return Demand(
            waiting=len(box.waiting[i]),
            oldest_wait_s=box.oldest_wait_s(i),
            in_flight=flying,
            frozen=flying if box.state[i] is State.ASLEEP else 0,
            likely_wanted=expected[0].chance,
            soon=expected[1].chance,
            likely_why=expected[1].why,
            service_s=past.service_s,
            last_used_s=box.used_at[i],
            stall_left_s=self._stall_left_s(box, i),
        )

    def _stall_left_s(self, box: Box, i: int) -> float:
        """Of the stream in flight that has stood still longest, over all its freezes."""
        frozen = box.frozen[i]
        stood_s = max((box.stood_s.get(r, 0.0) for r in frozen or box.running[i]), default=0.0)
        return self._stall_max_s - stood_s - (box.now - box.frozen_since[i] if frozen else 0.0)

    def _begin(self, box: Box, swap: Swap) -> None:
        """A pre-wake comes in unasked. Nothing here has a disk or frees by bytes, so no step sinks a sleeper."""
        victims = tuple(self._victim(step) for step in swap.evict if step.action is not Action.SINK)
        admit = None if swap.admit is None else self._index[swap.admit.engine]
        box.swap(admit, victims, unasked=admit is not None and not box.is_wanted(admit))

    def _victim(self, step: Step) -> Victim:
        engine = self._index[step.engine]
        own_s = self._machine.specs[engine].drain_bound_s
        level = None if step.action is Action.STOP else step.level
        return Victim(engine, level, step.drain_bound_s if own_s is None else own_s)
