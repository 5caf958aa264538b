"""Random operations with injected faults, against a plain model of contents and bytes."""

import json
import os
import random
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

import allocator as api
from allocator import Allocator, Segment
from allocator.simdriver import SimulatedDriver
from allocator.values import OFFLOADED_BY_LEVEL

MIB = 1 << 20
SLAB = 64 * MIB
FAULTS = st.one_of(
    st.just(""),
    st.builds("*@{}={}".format, st.integers(1, 60), st.sampled_from([1, 2, 999])),
    st.builds("seed:{}/{}".format, st.integers(0, 1 << 30), st.sampled_from([30, 200])),
)
# 260 examples of at most 50 steps in the suite: nearly 7,000 operations, and the threads below make over 10,000. A
# night's run sets more.
EXAMPLES = int(os.environ.get("ROTATOR_EXAMPLES", "260"))
STEPS_PER_EXAMPLE = 50
TAGS = st.sampled_from(api.TAGS)
SOME_TAGS = st.none() | st.sets(TAGS, min_size=1)
INDEX = st.integers(0, 100)
FAULTY = (api.DriverError, api.OutOfMemory, api.RollbackFailed, api.HostMemoryExhausted)


@dataclass(frozen=True)
class Mixed:
    """Parts were discarded and read as zeros, parts stayed: known again when it is read."""

    before: bytes | None

    def allows(self, found: bytes) -> bool:
        before = self.before
        return before is None or all(now in (0, was) for now, was in zip(found, before, strict=True))


Content = bytes | Mixed | None  # None: a birth left it open


class Model(RuleBasedStateMachine):
    """`contents` is what each live segment must read as."""

    steps = 0

    @initialize()
    def begin(self) -> None:
        self.driver = SimulatedDriver()
        self.before = self.held()
        self.allocator = Allocator(slab_bytes=SLAB, link_share=1.0)
        self.contents: dict[Segment, Content] = {}
        self.pins: Counter[Segment] = Counter()  # freed segments stay in it until they are unpinned
        self.held_back: dict[Segment, bytes] = {}  # what kernels that wait will write
        self.asleep: set[str] = set()
        self.bounded = False
        self.seed = 0
        self.stack = ExitStack()
        self.streams: list[int] = []
        for device in range(2):
            with self.driver.context(device):
                self.streams.append(self.stack.enter_context(self.driver.stream()))

    def teardown(self) -> None:
        self.driver.set_faults()
        self.settle()
        self.stack.close()
        self.allocator.close()
        assert self.held() == self.before

    def held(self) -> list[int]:
        return [*(self.driver.bytes_used(i, own=True) for i in range(2)), self.driver.bytes_registered()]

    def attempt(self, faults: str, operation: Callable[..., object], *arguments: object, **options: object) -> object:
        """What it returned, or the error that an injected fault or the budget may bring about."""
        type(self).steps += 1
        with self.driver.faults(faults):
            try:
                return operation(*arguments, **options)
            except FAULTY as error:
                if not faults and not (self.bounded and isinstance(error, api.HostMemoryExhausted)):
                    raise
                return error

    def some(self, index: int) -> Segment | None:
        live = list(self.contents)
        return live[index % len(live)] if live else None

    def awake(self, index: int) -> Segment | None:
        segment = self.some(index)
        return None if segment is None or segment.tag in self.asleep else segment

    def settle(self) -> None:
        """Kernels that wait run: before anything that waits for them."""
        self.driver.hold(False)
        for stream in self.streams:
            assert self.driver.library.cuStreamSynchronize(stream) == 0
        for segment, content in self.held_back.items():
            if segment in self.contents:
                self.contents[segment] = content
        self.held_back.clear()

    def fresh(self, segment: Segment) -> bytes:
        self.seed += 1
        if self.seed % 3 == 0:
            return random.Random(self.seed).randbytes(segment.content_nbytes)  # which packing makes no smaller
        content = (bytes([self.seed % 255 + 1]) * 13 + b"\x00") * (segment.content_nbytes // 14 + 1)
        return content[: segment.content_nbytes]

    @rule(mib=st.integers(1, 300), device=st.integers(0, 1), tag=TAGS, faults=FAULTS)
    def alloc(self, mib: int, device: int, tag: api.Tag, faults: str) -> None:
        if faults:
            self.settle()  # memory that seems to be short is waited for
        if tag in self.asleep:
            with pytest.raises(api.TagAsleep):
                self.allocator.alloc(mib * MIB, device=device, tag=tag)
            return
        segment = self.attempt(faults, self.allocator.alloc, mib * MIB, device=device, tag=tag)
        if isinstance(segment, Segment):
            assert segment not in self.contents
            assert segment not in self.pins
            self.contents[segment] = None

    @rule(index=INDEX)
    def write(self, index: int) -> None:
        segment = self.awake(index)
        if segment is None or segment in self.held_back:
            return
        content = self.fresh(segment)
        self.attempt("", self.allocator.write, segment, content)
        self.contents[segment] = content

    @rule(index=INDEX, waits=st.booleans(), frees=st.booleans())
    def launch(self, index: int, waits: bool, frees: bool) -> None:
        """A kernel in a stream of its device, perhaps one that runs only after its segment was freed."""
        segment = self.awake(index)
        if segment is None or segment in self.held_back:
            return
        self.driver.hold(True)
        stream, value = self.streams[segment.device], self.seed % 256
        self.held_back[segment] = bytes([value]) * segment.content_nbytes
        self.driver.launch(stream, segment.address, segment.content_nbytes, value, held=True)
        type(self).steps += 1
        if frees:
            self.free(index, "")
        if not waits:
            self.settle()

    @rule(index=INDEX, faults=FAULTS)
    def free(self, index: int, faults: str) -> None:
        segment = self.some(index)
        if segment is None:
            return
        assert self.attempt(faults, self.allocator.free, segment) is None
        del self.contents[segment]
        with pytest.raises(api.ForeignPointer):
            self.allocator.free(segment)

    @rule(index=INDEX)
    def pin(self, index: int) -> None:
        segment = self.awake(index)
        if segment is not None:
            self.attempt("", self.allocator.pin, segment)
            self.pins[segment] += 1

    @rule(index=INDEX, faults=FAULTS)
    def unpin(self, index: int, faults: str) -> None:
        pinned = list(self.pins)
        if pinned:
            segment = pinned[index % len(pinned)]
            assert self.attempt(faults, self.allocator.unpin, segment) is None
            self.pins -= Counter([segment])

    @rule(
        level=st.integers(1, 2),
        tags=SOME_TAGS,
        wanted_mib=st.none() | st.integers(1, 600),
        faults=FAULTS,
    )
    def sleep(self, level: int, tags: set[api.Tag] | None, wanted_mib: int | None, faults: str) -> None:
        wanted = None if wanted_mib is None else wanted_mib * MIB
        discarded = set(api.TAGS) - OFFLOADED_BY_LEVEL[level]
        call = lambda: self.allocator.sleep(level, tags, bytes_wanted=wanted)  # noqa: E731  # one call of two shapes
        self.put_to_sleep(call, tags, discarded, faults, whole=wanted is None)

    @rule(tags=st.sets(TAGS, min_size=1), faults=FAULTS)
    def discard(self, tags: set[api.Tag], faults: str) -> None:
        self.put_to_sleep(lambda: self.allocator.discard(tags), tags, set(api.TAGS), faults, whole=True)

    def put_to_sleep(
        self,
        call: Callable[[], object],
        tags: set[api.Tag] | None,
        discarded: set[api.Tag],
        faults: str,
        *,
        whole: bool,
    ) -> None:
        self.settle()
        named = set(api.TAGS) if tags is None else set(tags)
        awake = named - self.asleep
        kept = {row.tag for row in self.allocator.memory_usage() if row.bytes_mapped} & named & self.asleep
        try:
            answer = self.attempt(faults, call)
        except api.AlreadyAsleep:
            assert not awake or (tags is not None and named & self.asleep)
            return
        except api.Registered:
            assert any(segment.tag in named for segment in self.pins)
            return
        if isinstance(answer, api.RollbackFailed):
            # Asleep with every byte, the discarded ones too, for as many of the tags as hold any.
            self.asleep = set(self.allocator.asleep_tags())
            return
        if isinstance(answer, api.AllocatorError):
            return
        assert awake | kept
        assert tags is None or named <= awake | kept
        assert not any(segment.tag in named for segment in self.pins)
        self.asleep |= awake | kept
        for segment, content in self.contents.items():
            if segment.tag in (awake | kept) & discarded:
                zeros = whole and segment.tag in awake
                self.contents[segment] = bytes(segment.content_nbytes) if zeros else self.mixed(content)

    @staticmethod
    def mixed(content: Content) -> Mixed:
        return content if isinstance(content, Mixed) else Mixed(content)

    @rule(tags=SOME_TAGS, faults=FAULTS)
    def wake(self, tags: set[api.Tag] | None, faults: str) -> None:
        wanted = set(self.asleep) if tags is None else tags
        if not wanted or wanted - self.asleep:
            with pytest.raises(api.NotAsleep):
                self.allocator.wake(tags)
            return
        if not isinstance(self.attempt(faults, self.allocator.wake, tags), api.AllocatorError):
            self.asleep -= wanted

    @rule(tags=SOME_TAGS, wait=st.booleans(), faults=FAULTS)
    def prepare(self, tags: set[api.Tag] | None, wait: bool, faults: str) -> None:
        self.settle()
        self.attempt(faults, self.allocator.prepare, tags, wait=wait)

    @rule(mib=st.none() | st.integers(0, 900))
    def budget(self, mib: int | None) -> None:
        self.attempt("", self.allocator.set_host_budget, None if mib is None else mib * MIB)
        self.bounded = mib is not None

    @rule(tags=SOME_TAGS)
    def release_masters(self, tags: set[api.Tag] | None) -> None:
        self.attempt("", self.allocator.release_masters, tags)

    @rule(faults=FAULTS)
    def collect(self, faults: str) -> None:
        self.settle()
        self.attempt(faults, self.allocator.collect)

    @invariant()
    def contents_are_as_written(self) -> None:
        for segment, content in self.contents.items():
            if segment.tag in self.asleep or content is None:
                continue
            found = self.allocator.read(segment)
            if isinstance(content, Mixed):
                assert content.allows(found)
                self.contents[segment] = found
            else:
                assert found == content

    @invariant()
    def bytes_are_accounted_for(self) -> None:
        assert self.allocator.asleep_tags() == self.asleep
        if self.allocator.prepare_status().running:
            return  # between two looks it takes and gives
        rows = self.allocator.memory_usage()
        for device in range(2):
            mapped = sum(row.bytes_mapped for row in rows if row.device == device)
            assert mapped == self.driver.bytes_used(device, own=True) * self.allocator.scale
        for row in rows:
            live = [s for s in self.contents if (s.tag, s.device) == (row.tag, row.device)]
            assert (row.segments, row.bytes_allocated) == (len(live), sum(s.content_nbytes for s in live) * 4096)
            if row.state == "awake":
                assert row.bytes_mapped >= row.bytes_allocated
        assert self.driver.bytes_registered() * self.allocator.scale == self.allocator.host_memory().bytes_registered


@pytest.mark.usefixtures("box")
def test_random_operations_agree_with_the_model(record_property: Callable[[str, object], None]) -> None:
    Model.steps = 0
    limits = settings(
        max_examples=EXAMPLES,
        stateful_step_count=STEPS_PER_EXAMPLE,
        deadline=None,
        derandomize="ROTATOR_EXAMPLES" not in os.environ,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(Model, settings=limits)
    record_property("steps", Model.steps)
    print(f"{Model.steps} steps")
    assert Model.steps >= 20 * min(EXAMPLES, 260), "the machine hardly ran"


# Transitions of each of two processes, while three threads of each allocate, write, read and free all the time.
TRANSITIONS = 150 * max(1, EXAMPLES // 260)
WORKER = f"""
import sys
from tests.system.allocator import worker
sys.argv = ["worker", "%d", "{TRANSITIONS}", "%s"]
sys.exit(worker.main())
"""


def test_threads_of_several_processes_agree_with_their_own_models(  # type: ignore[no-untyped-def]
    child, box, driver: SimulatedDriver, tmp_path, record_property
) -> None:
    budget = tmp_path / "budget"
    budget.write_text(f"rotator-host-budget 1 {(900 << 20) // box.scale}\n")
    workers = [child(WORKER % (seed, budget)) for seed in (1, 2)]
    findings = [json.loads(worker.rest(timeout_s=60 + TRANSITIONS)) for worker in workers]
    for found in findings:
        assert (found["wrong"], found["leaked"]) == ([], [0, 0, 0])
    steps = sum(found["steps"] for found in findings)
    record_property("steps", steps)
    print(f"{steps} steps, {sum(found['injected'] for found in findings)} faults injected")
    assert steps >= 20 * TRANSITIONS
    assert [driver.bytes_used(device) for device in range(2)] == [0, 0]
