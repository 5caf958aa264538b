"""A machine under a trace: a discrete-event replay, fast enough for weeks of requests in seconds.

What it keeps of the service: one gate an engine, admission closed from the drain on, in-flight work that ends or
freezes at the drain bound and keeps its progress, swaps that sleep all victims before the wake, a canary before the
gate opens, host RAM for masters, waits with a deadline, bounded queues, bounded freezes. What it leaves out: failures,
the ledger, HTTP. A request in an engine takes its service seconds whoever is served beside it, up to ``slots`` at once.

A policy is asked to ``decide`` only when something changed that could change its mind: an engine that is not open got a
waiter whom the policy minds, an engine ran out of work, a swap ended, or the time came that it asked for.
"""

from heapq import heappop, heappush
from math import inf

from rotator.core.values import Depth, Level, State
from rotator.sim.events import ActiveSwap, Victim
from rotator.sim.floor import Floor

DONE, BOUND, SLEPT, WOKE, EXPIRED, ALARM = range(6)
OPEN = State.AWAKE
ASK_AGAIN_S = 1e-3  # the least between being asked and being asked again for the time's sake
YIELD_AGAIN_S = 10.0  # as in the loop: an engine that could not yield is not asked again before


class Box(Floor):
    """A replay under way."""

    # -- what policies do ----------------------------------------------------------------------------------------------

    def ask_at(self, at_s: float) -> None:
        """Ask the policy again at that time (later than now), if nothing asks it before; the earliest wish counts."""
        if at_s < self._alarm and at_s < inf:
            self._alarm = max(at_s, self.now + ASK_AGAIN_S)
            heappush(self._heap, (self._alarm, ALARM, 0, 0))

    def swap(
        self, admit: int | None, victims: tuple[Victim, ...] = (), *, freeze: bool = True, unasked: bool = False
    ) -> None:
        """Begin a swap: victims drain side by side, then what is left freezes, they sleep, and ``admit`` comes in.

        ``unasked``: it comes in although nobody waits for it. Without ``freeze`` victims whose work outlasts the drain
        keep their turn, all of them, and the swap ends.
        """
        names = [v.engine for v in victims] + ([] if admit is None else [admit])
        gpus = frozenset(gpu for engine in names for gpu in self.specs[engine].gpus)
        self._swaps_begun += 1
        swap = ActiveSwap(self._swaps_begun, admit, victims, freeze, gpus, unasked)
        self.swaps[swap.id] = swap
        bound = 0.0
        for victim in victims:
            if self.state[victim.engine] is State.AWAKE:
                self.state[victim.engine] = State.DRAINING
                if self.in_flight(victim.engine):
                    swap.interrupts = True
                    bound = max(bound, victim.drain_s)
        if bound <= 0.0:
            self._bound_reached(swap)
        elif bound < inf:
            heappush(self._heap, (self.now + bound, BOUND, swap.id, 0))

    # -- the replay ----------------------------------------------------------------------------------------------------

    def run(self, until_s: float = inf) -> None:
        """Replay until the trace is served, nothing can happen any more, or ``until_s``."""
        at, engine_of, state, heap = self.at, self.engine, self.state, self._heap
        running, inside, slots = self.running, self.inside, [spec.slots for spec in self.specs]
        freezes = self.freezes
        last, used_at, policy = self.last, self.used_at, self.policy
        first_s, done_s, service, recording = self.first_s, self.done_s, self.service, self.recording
        if self._dirty:
            self._decide()
        while True:
            arrival = at[self.next] if self.next < last else inf
            if heap and heap[0][0] <= arrival:
                when, kind, a, b = heap[0]
                if when > until_s:
                    break
                heappop(heap)
                self.now = when
                if kind == DONE:
                    if running[b].get(a) != when:
                        continue  # it was frozen meanwhile
                    del running[b][a]
                    if a in freezes:
                        del freezes[a]
                        self.stood_s.pop(a, None)
                    used_at[b] = when
                    if recording:
                        done_s[a] = when
                    if self.notes_arrivals:
                        policy.ended(self, b, service[a])
                    if inside[b]:
                        self._serve(inside[b].popleft(), b)
                    elif not running[b]:
                        self._ran_out(b)
                else:
                    self._happened(kind, a, b)
            elif arrival <= until_s and self.next < last:
                request, self.now = self.next, arrival
                self.next += 1
                e = engine_of[request]
                if self.notes_arrivals:
                    policy.arrived(self, e)
                if state[e] is not OPEN:
                    self._wait(request, e)
                else:
                    used_at[e] = arrival
                    if len(running[e]) < slots[e]:
                        end = arrival + service[request]
                        running[e][request] = end
                        heappush(heap, (end, DONE, request, e))
                        if recording:
                            first_s[request] = arrival
                    else:
                        inside[e].append(request)
            else:
                break
            if self._dirty:
                self._decide()
        if until_s < inf:
            self.now = max(self.now, until_s)

    def unserved(self) -> int:
        """Requests that were not served to the end."""
        return sum(1 for done in self.done_s if done != done)

    def standing_delay_s(self) -> float:
        """Delay of those who wait or stand still now, not yet in ``delay_s``."""
        now, at = self.now, self.at
        total = sum(now - at[r] for queue in (*self.waiting, *self.inside) for r in queue)
        for e, frozen in enumerate(self.frozen):
            total += len(frozen) * (now - self.frozen_since[e])
        return total

    # -- events --------------------------------------------------------------------------------------------------------

    def _decide(self) -> None:
        self._dirty = False
        self.counts.decisions += 1
        self.policy.decide(self)

    def _happened(self, kind: int, a: int, b: int) -> None:
        if kind == ALARM:
            if self.now >= self._alarm:
                self._alarm = inf
                self._dirty = True
        elif kind == EXPIRED:
            self._expire(a, b)
        elif (swap := self.swaps.get(a)) is not None:
            if kind == BOUND:
                self._bound_reached(swap)
            elif kind == SLEPT:
                self._slept(swap)
            else:
                self._woke(swap, b)

    def _wait(self, request: int, engine: int) -> None:
        spec, queue = self.specs[engine], self.waiting[engine]
        if len(queue) >= spec.queue_max:
            self.counts.refused += 1
            return
        queue.append(request)
        self.waiting_at_s[engine] += self.now
        if spec.wait_deadline_s < inf:
            heappush(self._heap, (self.now + spec.wait_deadline_s, EXPIRED, request, engine))
        # While a swap is under way on its GPUs nothing can begin there, and its end asks anyway.
        if all(swap.gpus.isdisjoint(spec.gpus) for swap in self.swaps.values()) and self.policy.minds(self, engine):
            self._dirty = True

    def _expire(self, request: int, engine: int) -> None:
        queue = self.waiting[engine]
        if queue and queue[0] == request:  # waits end in order of arrival: the first in line expires first
            queue.popleft()
            self.waiting_at_s[engine] -= self.at[request]
            self.counts.expired += 1
            self._dirty = True
            for swap in list(self.swaps.values()):
                if swap.draining and swap.admit == engine and not self.is_wanted(engine):
                    self._keep_turns(swap)

    def refuse(self, engine: int) -> None:
        """Whoever waits learns that waiting cannot help."""
        self.counts.refused += len(self.waiting[engine])
        self.waiting[engine].clear()
        self.waiting_at_s[engine] = 0.0

    def _serve(self, request: int, engine: int) -> None:
        """Service begins."""
        end = self.now + self.service[request]
        self.running[engine][request] = end
        heappush(self._heap, (end, DONE, request, engine))
        self.delay_s += self.now - self.at[request]
        if self.recording:
            self.first_s[request] = self.now

    def _ran_out(self, engine: int) -> None:
        """Nothing is in flight any more."""
        if self.state[engine] is State.DRAINING:
            swap = next(s for s in self.swaps.values() if any(v.engine == engine for v in s.victims))
            if not any(self.in_flight(v.engine) for v in swap.victims):
                self._drained(swap)
        elif self.watch_idle:
            self._dirty = True
        else:
            self.ask_at(self.now + self.idle_look_s)

    def _bound_reached(self, swap: ActiveSwap) -> None:
        """The drain is over: whoever is still in flight freezes, or nobody yields."""
        if not swap.draining:
            return  # they were done before
        for victim in swap.victims:
            if self.in_flight(victim.engine) and not self._can_freeze(swap, victim):
                self._keep_turns(swap)
                self.yields_after[victim.engine] = self.now + YIELD_AGAIN_S
                self.ask_at(self.now + YIELD_AGAIN_S)
                return
        self._drained(swap)

    def _can_freeze(self, swap: ActiveSwap, victim: Victim) -> bool:
        if not swap.freeze or victim.level is None:
            return False
        most = self.specs[victim.engine].freezes_max
        return all(self.freezes.get(r, 0) < most for r in self.running[victim.engine])

    def _keep_turns(self, swap: ActiveSwap) -> None:
        self.counts.kept_turn += 1
        del self.swaps[swap.id]
        for victim in swap.victims:
            if self.state[victim.engine] is State.DRAINING:
                self._open(victim.engine)
        self._dirty = True

    def _drained(self, swap: ActiveSwap) -> None:
        """All victims sleep, side by side; what is in flight stands still."""
        victims = swap.victims
        swap.draining, swap.drained_s = False, self.now
        self._copying += (ranks := sum(len(self.specs[v.engine].gpus) for v in victims))
        took = 0.0
        for victim in victims:
            took = max(took, self._yield_s(victim))
        if ranks:
            heappush(self._heap, (self.now + took, SLEPT, swap.id, ranks))
            self.counts.lost_gpu_s += took * ranks
        else:
            self._slept(swap)

    def _yield_s(self, victim: Victim) -> float:
        e, spec = victim.engine, self.specs[victim.engine]
        if victim.level is None:
            self.state[e] = State.STOPPING
            return self.machine.costs.stop_s
        if self.running[e]:
            for request, end in self.running[e].items():
                self.frozen[e][request] = end - self.now
                self.freezes[request] = self.freezes.get(request, 0) + 1
            self.counts.freezes += len(self.running[e])
            self.running[e].clear()
        self.frozen_since[e] = self.now
        self.state[e] = State.FALLING_ASLEEP
        if victim.level is Level.HOST and self.machine.costs.copy_out:
            self.counts.moved_bytes += spec.host_bytes
            return self.machine.sleep_s(spec, self._copying)
        return self.machine.sleep_s(spec, len(spec.gpus)) if victim.level is Level.HOST else self.machine.costs.sleep_s

    def _slept(self, swap: ActiveSwap) -> None:
        for victim in swap.victims:
            e, spec = victim.engine, self.specs[victim.engine]
            self._copying -= len(spec.gpus)
            if self.depth[e] is Depth.HOST:
                self.host_used -= spec.host_bytes  # a sleeper that is stopped gives its masters back
            if victim.level is None:
                self.state[e], self.depth[e] = State.STOPPED, None
                self.counts.stops += 1
                continue
            self.state[e] = State.ASLEEP
            self.depth[e] = Depth.HOST if victim.level is Level.HOST else Depth.DISCARDED
            self.host_used += spec.host_bytes if victim.level is Level.HOST else 0
            self.counts.sleeps += 1
        admit = swap.admit
        if admit is None or not (self.is_wanted(admit) or swap.unasked):
            self._over(swap)
            return
        self._bring_in(swap, admit)

    def _bring_in(self, swap: ActiveSwap, engine: int) -> None:
        spec, machine = self.specs[engine], self.machine
        ranks = len(spec.gpus)
        self._copying += ranks
        if self.state[engine] is State.STOPPED:
            self.state[engine] = State.STARTING
            took = machine.start_s(spec)
            self.counts.starts += 1
        else:
            warm = self.depth[engine] is Depth.HOST
            self.state[engine] = State.WAKING
            took = machine.wake_s(spec, self._copying) if warm else machine.reload_s(spec)
            self.counts.wakes += 1
        took += machine.canary_s(spec)
        self.counts.moved_bytes += spec.host_bytes
        self.counts.swaps += 1
        self.counts.lost_gpu_s += took * ranks
        heappush(self._heap, (self.now + took, WOKE, swap.id, engine))

    def _woke(self, swap: ActiveSwap, engine: int) -> None:
        spec = self.specs[engine]
        self._copying -= len(spec.gpus)
        if self.depth[engine] is Depth.HOST:
            self.host_used -= spec.host_bytes
        self.depth[engine] = None
        self.awake_since[engine] = self.now
        if self.frozen[engine]:
            stood = self.now - self.frozen_since[engine]
            for request, left in self.frozen[engine].items():
                end = self.now + left
                self.running[engine][request] = end
                heappush(self._heap, (end, DONE, request, engine))
                self.delay_s += stood
                self.stood_s[request] = self.stood_s.get(request, 0.0) + stood
            self.frozen[engine].clear()
        self._open(engine)
        self._over(swap)

    def _over(self, swap: ActiveSwap) -> None:
        del self.swaps[swap.id]
        self.policy.swapped(self, swap, self.now - swap.drained_s)
        self._dirty = True

    def _open(self, engine: int) -> None:
        """Admit all who wait, in order."""
        self.state[engine] = State.AWAKE
        waiting, running, inside = self.waiting[engine], self.running[engine], self.inside[engine]
        if waiting:
            self.used_at[engine] = self.now
            self.counts.gate_s_max = max(self.counts.gate_s_max, self.now - self.at[waiting[0]])
        slots = self.specs[engine].slots
        while inside and len(running) < slots:
            self._serve(inside.popleft(), engine)
        while waiting and len(running) < slots:
            self._serve(waiting.popleft(), engine)
        inside.extend(waiting)
        waiting.clear()
        self.waiting_at_s[engine] = 0.0
