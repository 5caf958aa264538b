"""Random operations with injected faults, against a plain model of contents and bytes."""

import os

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

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
# 250 examples of 50 steps in the suite; a night's run sets more.
EXAMPLES = int(os.environ.get("ROTATOR_EXAMPLES", "250"))
TAGS = st.sampled_from(api.TAGS)


class Model(RuleBasedStateMachine):
    """`contents` is what each live segment must read as: bytes, or None where a discard or a birth left it open."""

    @initialize()
    def begin(self) -> None:
        self.driver = SimulatedDriver()
        self.before = self.held()
        self.allocator = Allocator(slab_bytes=SLAB)
        self.contents: dict[Segment, bytes | None] = {}
        self.asleep: set[str] = set()
        self.seed = 0

    def teardown(self) -> None:
        self.driver.set_faults()
        self.allocator.close()
        assert self.held() == self.before

    def held(self) -> list[int]:
        return [*(self.driver.bytes_used(i, own=True) for i in range(2)), self.driver.bytes_registered()]

    def attempt(self, faults: str, operation, *arguments, **options):  # type: ignore[no-untyped-def]
        with self.driver.faults(faults):
            try:
                return operation(*arguments, **options)
            except (api.DriverError, api.OutOfMemory, api.RollbackFailed) as error:
                if not faults:
                    raise
                return error

    def some(self, index: int) -> Segment | None:
        live = list(self.contents)
        return live[index % len(live)] if live else None

    @rule(mib=st.integers(1, 300), device=st.integers(0, 1), tag=TAGS, faults=FAULTS)
    def alloc(self, mib: int, device: int, tag: api.Tag, faults: str) -> None:
        if tag in self.asleep:
            with pytest.raises(api.TagAsleep):
                self.allocator.alloc(mib * MIB, device=device, tag=tag)
            return
        segment = self.attempt(faults, self.allocator.alloc, mib * MIB, device=device, tag=tag)
        if isinstance(segment, Segment):
            assert segment not in self.contents
            self.contents[segment] = None

    @rule(index=st.integers(0, 100))
    def write(self, index: int) -> None:
        segment = self.some(index)
        if segment is None or segment.tag in self.asleep:
            return
        self.seed += 1
        content = (bytes([self.seed % 255 + 1]) * 13 + b"\x00") * (segment.content_nbytes // 14 + 1)
        self.contents[segment] = content[: segment.content_nbytes]
        self.allocator.write(segment, self.contents[segment] or b"")

    @rule(index=st.integers(0, 100), faults=FAULTS)
    def free(self, index: int, faults: str) -> None:
        segment = self.some(index)
        if segment is None:
            return
        assert self.attempt(faults, self.allocator.free, segment) is None
        del self.contents[segment]
        with pytest.raises(api.ForeignPointer):
            self.allocator.free(segment)

    @rule(level=st.integers(1, 2), tags=st.none() | st.sets(TAGS, min_size=1), faults=FAULTS)
    def sleep(self, level: int, tags: set[api.Tag] | None, faults: str) -> None:
        wanted = set(api.TAGS) - self.asleep if tags is None else tags
        if not wanted or wanted & self.asleep:
            with pytest.raises(api.AlreadyAsleep):
                self.allocator.sleep(level, tags)
            return
        answer = self.attempt(faults, self.allocator.sleep, level, tags)
        if isinstance(answer, api.RollbackFailed):
            # Asleep with every byte, the discarded ones too, for as many of the tags as hold any.
            self.asleep = set(self.allocator.asleep_tags())
            return
        if isinstance(answer, api.AllocatorError):
            return
        self.asleep |= wanted
        for segment in self.contents:
            if segment.tag in wanted - OFFLOADED_BY_LEVEL[level]:
                self.contents[segment] = bytes(segment.content_nbytes)

    @rule(tags=st.none() | st.sets(TAGS, min_size=1), faults=FAULTS)
    def wake(self, tags: set[api.Tag] | None, faults: str) -> None:
        wanted = set(self.asleep) if tags is None else tags
        if not wanted or wanted - self.asleep:
            with pytest.raises(api.NotAsleep):
                self.allocator.wake(tags)
            return
        if not isinstance(self.attempt(faults, self.allocator.wake, tags), api.AllocatorError):
            self.asleep -= wanted

    @rule(faults=FAULTS)
    def prepare(self, faults: str) -> None:
        self.attempt(faults, self.allocator.prepare)

    @rule()
    def release_masters(self) -> None:
        self.allocator.release_masters()

    @precondition(lambda self: self.contents)
    @rule(faults=FAULTS)
    def collect(self, faults: str) -> None:
        self.attempt(faults, self.allocator.collect)

    @invariant()
    def contents_are_as_written(self) -> None:
        for segment, content in self.contents.items():
            if segment.tag in self.asleep or content is None:
                continue
            assert self.allocator.read(segment) == content

    @invariant()
    def bytes_are_accounted_for(self) -> None:
        assert self.allocator.asleep_tags() == self.asleep
        rows = self.allocator.memory_usage()
        for device in range(2):
            mapped = sum(row.bytes_mapped for row in rows if row.device == device)
            assert mapped == self.driver.bytes_used(device, own=True) * self.allocator.scale
        for row in rows:
            live = [s for s in self.contents if (s.tag, s.device) == (row.tag, row.device)]
            assert (row.segments, row.bytes_allocated) == (len(live), sum(s.content_nbytes for s in live) * 4096)
            if row.state == "awake":
                assert row.bytes_mapped >= row.bytes_allocated


@pytest.mark.usefixtures("box")
class TestModel(Model.TestCase):  # type: ignore[misc,name-defined]
    settings = settings(
        max_examples=EXAMPLES,
        stateful_step_count=50,
        deadline=None,
        derandomize="ROTATOR_EXAMPLES" not in os.environ,
        suppress_health_check=list(HealthCheck),
    )
