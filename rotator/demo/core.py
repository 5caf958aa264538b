"""The stub's engine core: a scheduler that really pauses, over memory that really goes away."""

import asyncio
import logging
import secrets
from collections import deque
from collections.abc import Callable, Sequence
from itertools import count

from rotator.demo import tokens
from rotator.demo.dialects import WAKE_TAGS, StubDialect
from rotator.demo.memory import (
    KV,
    KV_SLOT_BYTES,
    TAGS,
    WEIGHTS,
    DeviceFault,
    RankMemory,
    load_weights,
    spoil_weights,
    weights_digest,
)
from rotator.demo.misbehave import Misbehaviour
from rotator.demo.sequences import CoreError, Counters, Finish, Sampling, Speed, Step, Stream

log = logging.getLogger("vllm")

GIB = 1 << 30
WAITING_MAX = 16_384
_TOKENS_A_SAMPLE = 16


class Core:
    """One task (``run``) produces tokens; ``sleep`` and ``wake`` pause and resume it. ``die`` ends the process."""

    def __init__(
        self,
        ranks: Sequence[RankMemory],
        *,
        seed: str,
        dialect: StubDialect,
        speed: Speed,
        misbehaviour: Misbehaviour,
        die: Callable[[int], None],
    ) -> None:
        self.misbehaviour = misbehaviour
        self.counters = Counters()
        self.dead = False
        self.level = 0
        self.transitions = 0  # under way now
        self.masters = "host"  # where the weights' masters were last told to be; the stub has no disk to speak of
        self._ranks, self._seed, self._dialect, self._speed, self._die = ranks, seed, dialect, speed, die
        self._digest: bytes | None = None
        self._waiting: deque[Stream] = deque()
        self._running: dict[int, Stream] = {}
        slots = min(speed.running_max, ranks[0].content_bytes(KV) // KV_SLOT_BYTES)
        self._free_slots = list(range(slots))[::-1]
        self._ids = count(1)
        self._awake = asyncio.Event()
        self._awake.set()
        self._paused_new = False
        self._work = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._transition = asyncio.Lock()

    # -- requests ----------------------------------------------------------------------------------------------------

    def submit(self, prompt_ids: list[int], sampling: Sampling) -> Stream:
        """Queue a sequence. While asleep it waits, silently, as it does in vLLM. Raises CoreError when dead or full."""
        self._check_alive()
        if len(self._waiting) >= WAITING_MAX:
            raise CoreError("too many requests are waiting")
        seed = sampling.seed if sampling.seed is not None else secrets.randbits(32)
        stream = Stream(next(self._ids), prompt_ids, sampling, seed)
        self._waiting.append(stream)
        self.counters.requests += 1
        self._warn_if_wedged()
        self._kick()
        return stream

    def drop(self, stream: Stream) -> None:
        """Forget a sequence whose client went away. Harmless for one that has ended."""
        if stream in self._waiting:
            self._waiting.remove(stream)
        self._leave(stream)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    async def embed(self, text: str, dimensions: int) -> list[float]:
        """A vector for a text, once the engine is awake. Raises CoreError."""
        await self.reachable()
        await self._awake.wait()
        self._check_alive()
        try:
            state = tokens.first_state(self._read_digest(), tokens.tokenize(text))
            return tokens.vector(state, self._sample(state), dimensions)
        except DeviceFault as e:
            self._fail(str(e))
            raise CoreError(str(e)) from None

    def _warn_if_wedged(self) -> None:
        """What vLLM's workers say once a minute while a rank does not take its turn."""
        if self.misbehaviour.wedged:
            log.warning("No available shared memory broadcast block found in 60 seconds.")

    @property
    def kv_share(self) -> float:
        """Of its slots that are taken: like all that the core tells, it stands still while the core does."""
        return len(self._running) / max(1, len(self._running) + len(self._free_slots))

    async def reachable(self) -> None:
        """Every call that reaches the core passes here: a wedged core answers none."""
        if self.misbehaviour.wedged:
            await asyncio.Event().wait()

    # -- sleeping and waking -----------------------------------------------------------------------------------------

    def load(self) -> None:
        load_weights(self._ranks, self._seed)
        self._digest = None

    @property
    def is_sleeping(self) -> bool:
        return not self._awake.is_set() or any(rank.asleep() for rank in self._ranks)

    async def sleep(self, level: int, mode: str) -> None:
        """Raises CoreError where a rank failed: the others sleep then."""
        await self.reachable()
        self._check_alive()
        if self.misbehaviour.die("sleep"):
            self._die(self.misbehaviour.exit_code)
        self.transitions += 1
        began_s = asyncio.get_running_loop().time()
        try:
            await self._quiesce(mode if self._dialect.takes_mode else "abort")
            async with self._transition:
                await self._sleep_ranks(level)
        finally:
            self.transitions -= 1
        self.counters.sleeps += 1
        self.counters.sleep_s += asyncio.get_running_loop().time() - began_s

    async def _quiesce(self, mode: str) -> None:
        if mode == "abort":
            for stream in [*self._running.values(), *self._waiting]:
                self._finish(stream, "abort")
            self._waiting.clear()
        elif mode == "wait":
            self._paused_new = True
            await self._idle.wait()
        self._awake.clear()

    async def _sleep_ranks(self, level: int) -> None:
        if level == 0 or any(rank.asleep() for rank in self._ranks):
            return
        if self.misbehaviour.take("hang_sleep"):
            await asyncio.Event().wait()
        slow_s = self.misbehaviour.slow_sleep_s
        if self.misbehaviour.take("slow_sleep_s"):
            await asyncio.sleep(slow_s)
        if self.misbehaviour.take("lie_sleep"):
            self.level = level
            return
        self._lose_caches()
        failing = self.misbehaviour.fail_sleep_rank
        ranks = [r for i, r in enumerate(self._ranks) if i != failing]
        await asyncio.gather(*(asyncio.to_thread(rank.sleep, level) for rank in ranks))
        if self.misbehaviour.take("fail_sleep_rank"):
            raise CoreError(f"Worker_TP{failing}: CUDA driver error while suspending")
        self.level = level
        grown = int(self.misbehaviour.residue_growth_gib * GIB)
        if self.misbehaviour.take("residue_growth_gib"):
            for rank in self._ranks:
                rank.grow_residue(grown)

    async def wake(self, tags: Sequence[str]) -> None:
        """No tags: all. One unknown tag makes it a logged no-op. Raises CoreError where a rank failed."""
        await self.reachable()
        self._check_alive()
        if unknown := set(tags) - set(WAKE_TAGS):
            log.error("wake up with unknown tags %s: nothing is done", sorted(unknown))
            return
        if self.misbehaviour.die("wake"):
            self._die(self.misbehaviour.exit_code)
        self.transitions += 1
        began_s = asyncio.get_running_loop().time()
        try:
            async with self._transition:
                await self._wake_ranks(frozenset(tags) & TAGS if tags else TAGS)
                self._resume_if_due(tags)
        finally:
            self.transitions -= 1
        self.counters.wakes += 1
        self.counters.wake_s += asyncio.get_running_loop().time() - began_s

    async def _wake_ranks(self, wanted: frozenset[str]) -> None:
        if not wanted or not any(rank.asleep() & wanted for rank in self._ranks):
            return
        if self.misbehaviour.take("hang_wake"):
            await asyncio.Event().wait()
        slow_s = self.misbehaviour.slow_wake_s
        if self.misbehaviour.take("slow_wake_s"):
            await asyncio.sleep(slow_s)
        failing = self.misbehaviour.fail_wake_rank
        ranks = [r for i, r in enumerate(self._ranks) if i != failing]
        outcomes = await asyncio.gather(
            *(asyncio.to_thread(rank.wake, wanted) for rank in ranks), return_exceptions=True
        )
        for number, outcome in enumerate(outcomes):
            if isinstance(outcome, BaseException):
                raise CoreError(f"Worker_TP{number}: {outcome}")
        if self.misbehaviour.take("fail_wake_rank"):
            raise CoreError(f"Worker_TP{failing}: CUDA driver error while resuming")
        kind = self.misbehaviour.wake_garbage
        if WEIGHTS in wanted and self.misbehaviour.take("wake_garbage"):
            spoil_weights(self._ranks, zero=kind == "zero")
        self._digest = None

    def _resume_if_due(self, tags: Sequence[str]) -> None:
        awake = not any(rank.asleep() for rank in self._ranks)
        if awake or self._dialect.resumes_on_partial_wake or "scheduling" in tags:
            if awake:
                self.level = 0
            self._paused_new = False
            self._awake.set()
            now_s = asyncio.get_running_loop().time()
            for stream in self._running.values():
                if not stream.computed:
                    stream.ready_at_s = now_s + self._prefill_s(stream)
            self._kick()

    async def free_bytes(self, size: int) -> None:
        """Every rank gives at least so many bytes back. Raises CoreError: nothing may be freed under a scheduler that
        runs."""
        await self.reachable()
        self._check_alive()
        if self._awake.is_set():
            raise CoreError("memory is only freed while the scheduler is paused")
        async with self._transition:
            self._lose_caches()
            await asyncio.gather(*(asyncio.to_thread(rank.free, size) for rank in self._ranks))

    async def restore(self) -> None:
        """Bring back what ``free_bytes`` gave; the scheduler stays paused. Raises CoreError where a rank failed."""
        await self.reachable()
        self._check_alive()
        async with self._transition:
            await self._wake_ranks(TAGS)

    async def reload_weights(self) -> None:
        await self.reachable()
        self._check_alive()
        try:
            await asyncio.to_thread(self.load)
        except DeviceFault as e:
            raise CoreError(str(e)) from None

    def _lose_caches(self) -> None:
        """Frozen sequences keep their tokens and lose their KV: they are computed again after the wake."""
        self._digest = None
        for stream in self._running.values():
            stream.computed = False

    # -- generating --------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Produce one token a stream and tick, for ever."""
        loop = asyncio.get_running_loop()
        tick_s = 1 / self._speed.tokens_per_s
        due_s = loop.time()
        while True:
            await self._work.wait()
            due_s = max(due_s + tick_s, loop.time())
            await asyncio.sleep(due_s - loop.time())
            if not self._awake.is_set() or self.misbehaviour.wedged or self.misbehaviour.hang_generate:
                self._work.clear()
                continue
            try:
                self._tick(loop.time())
            except DeviceFault as e:
                self._fail(str(e))

    def exit(self, code: int) -> None:
        """End the process, where a misbehaviour says so."""
        self._die(code)

    def poke(self) -> None:
        """A misbehaviour changed: look again."""
        self._kick()

    def _tick(self, now_s: float) -> None:
        self._admit(now_s)
        ready = [stream for stream in self._running.values() if stream.ready_at_s <= now_s]
        if ready:
            self.counters.steps += 1
            cache = bytearray(self._ranks[0].read(KV, 0, (max(s.slot for s in ready) + 1) * KV_SLOT_BYTES))
            for stream in ready:
                self._step(stream, cache)
            self._ranks[0].write(KV, 0, bytes(cache))
        if not self._running and not self._waiting:
            self._work.clear()

    def _admit(self, now_s: float) -> None:
        while self._waiting and self._free_slots and not self._paused_new:
            stream = self._waiting.popleft()
            stream.slot = self._free_slots.pop()
            stream.ready_at_s = now_s + self._prefill_s(stream)
            self._running[stream.id] = stream
            self._idle.clear()

    def _prefill_s(self, stream: Stream) -> float:
        return (len(stream.prompt_ids) + len(stream.produced)) / self._speed.prefill_tokens_per_s

    def _step(self, stream: Stream, cache: bytearray) -> None:
        at = stream.slot * KV_SLOT_BYTES
        if not stream.computed:
            cache[at : at + tokens.STATE_BYTES] = self._compute(stream)
        state = bytes(cache[at : at + tokens.STATE_BYTES])
        if len(stream.produced) % _TOKENS_A_SAMPLE == 0:
            stream.sample = self._sample(state)
        options = tokens.candidates(state, stream.sample, allow_eos=not stream.sampling.ignore_eos)
        chosen = tokens.choose(options, stream.sampling.temperature, stream.seed, len(stream.produced))
        cache[at : at + tokens.STATE_BYTES] = tokens.next_state(state, chosen.token_id)
        if not stream.produced:  # a prompt counts once its prefill is through
            self.counters.prompt_tokens += len(stream.prompt_ids)
        stream.produced.append(chosen.token_id)
        self.counters.generation_tokens += 1
        if (share := self.misbehaviour.draft_acceptance) is not None:
            self.counters.drafts += 1
            self.counters.accepted += share
        logprob = float("nan") if self.misbehaviour.nan_logprobs else chosen.logprob
        stream.out.put_nowait(Step(chosen.token_id, logprob, options))
        if chosen.token_id == tokens.EOS:
            self._finish(stream, "stop")
        elif len(stream.produced) >= stream.sampling.max_tokens:
            self._finish(stream, "length")

    def _compute(self, stream: Stream) -> bytes:
        """Prefill: the state after the prompt and every token produced so far, from the weights as they are now."""
        state = tokens.first_state(self._read_digest(), stream.prompt_ids)
        for number, token_id in enumerate(stream.produced):
            if number % _TOKENS_A_SAMPLE == 0:
                stream.sample = self._sample(state)
            state = tokens.next_state(state, token_id)
        stream.computed = True
        return state

    def _read_digest(self) -> bytes:
        if self._digest is None:
            self._digest = weights_digest(self._ranks)
        return self._digest

    def _sample(self, state: bytes) -> bytes:
        rank = self._ranks[state[-1] % len(self._ranks)]
        return rank.read(WEIGHTS, tokens.weights_offset(state, rank.content_bytes(WEIGHTS)), tokens.SAMPLE_BYTES)

    def _finish(self, stream: Stream, reason: str) -> None:
        stream.out.put_nowait(Finish(reason))
        self._leave(stream)

    def _leave(self, stream: Stream) -> None:
        if self._running.pop(stream.id, None) is not None:
            self._free_slots.append(stream.slot)
        if not self._running:
            self._idle.set()

    def _kick(self) -> None:
        if (self._running or self._waiting) and self._awake.is_set():
            self._work.set()

    def _check_alive(self) -> None:
        if self.dead:
            raise CoreError("EngineCore encountered an issue and is dead")

    def _fail(self, why: str) -> None:
        log.error("EngineCore failed: %s", why)
        self.dead = True
        for stream in [*self._running.values(), *self._waiting]:
            self._finish(stream, "error")
        self._waiting.clear()
        self._work.clear()
        self._die(1)
