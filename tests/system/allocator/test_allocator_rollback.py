"""Every driver call that a sleep or a wake makes is failed once: nothing is lost, nothing leaks, a retry succeeds."""

from collections.abc import Callable, Iterator

import pytest

import allocator as api
from allocator import Allocator, Segment
from allocator.box import SimulatedBox
from allocator.simdriver import SimulatedDriver

GIB = 1 << 30
MIB = 1 << 20
Pattern = Callable[[int, int], bytes]

# Answers differ in what an allocator may be tempted to do with them.
ANSWERS = [2, 999]


class Engine:
    """An allocator with one of everything, on two devices, and the content it must still have."""

    def __init__(self, allocator: Allocator, driver: SimulatedDriver, pattern: Pattern) -> None:
        self.allocator, self.driver = allocator, driver
        self.kept: dict[Segment, bytes] = {}
        for i, (tag, device) in enumerate([("weights", 0), ("weights", 0), ("weights", 1), ("runtime", 1)]):
            segment = allocator.alloc((i + 1) * 80 * MIB, device=device, tag=tag)  # type: ignore[arg-type]
            self.kept[segment] = pattern(i + 1, segment.content_nbytes)
            allocator.write(segment, self.kept[segment])
        self.caches = [allocator.alloc(192 * MIB, device=device, tag="kv_cache") for device in range(2)]
        self.warm_cache()

    def warm_cache(self) -> None:
        for cache in self.caches:
            self.allocator.write(cache, b"\x07" * cache.content_nbytes)

    def intact(self) -> bool:
        return all(self.allocator.read(segment) == content for segment, content in self.kept.items())

    def cache_is(self, byte: int) -> bool:
        return all(self.allocator.read(cache) == bytes([byte]) * cache.content_nbytes for cache in self.caches)

    def device_bytes(self) -> list[int]:
        return [self.driver.bytes_used(i, own=True) for i in range(2)]

    def calls_of(self, operation: Callable[[], object]) -> list[str]:
        self.driver.clear_log()
        operation()
        return self.driver.log()


@pytest.fixture
def engine(allocator: Allocator, driver: SimulatedDriver, pattern: Pattern) -> Iterator[Engine]:
    return Engine(allocator, driver, pattern)


@pytest.mark.parametrize("answer", ANSWERS)
def test_a_wake_survives_the_failure_of_any_of_its_calls(engine: Engine, answer: int) -> None:
    """Catalogue 1, 2, 5: blocks left mapped, masters dropped too early, blocks marked awake before their copy."""
    allocator, driver = engine.allocator, engine.driver
    allocator.sleep()
    calls = engine.calls_of(allocator.wake)
    awake, host = engine.device_bytes(), driver.bytes_registered()
    assert {"cuMemCreate", "cuMemMap", "cuMemSetAccess", "cuMemcpyHtoDAsync", "cuMemsetD8Async"} <= set(calls)
    for n, call in enumerate(calls, start=1):
        allocator.sleep()
        with driver.faults(f"*@{n}={answer}"), pytest.raises((api.DriverError, api.OutOfMemory)) as caught:
            allocator.wake()
        assert caught.value.call.startswith(call)
        assert allocator.asleep_tags() == set(api.TAGS), f"call {n}, {call}"
        assert engine.device_bytes() == [0, 0], f"call {n}, {call}"
        assert driver.bytes_registered() == host
        allocator.wake()
        assert engine.intact(), f"call {n}, {call}"
        assert engine.cache_is(0)
        assert engine.device_bytes() == awake


@pytest.mark.parametrize("answer", ANSWERS)
def test_a_sleep_survives_the_failure_of_any_of_its_calls(engine: Engine, answer: int) -> None:
    """It stays awake with all its content, the cache too; or, past the point of no return, it sleeps in full."""
    allocator, driver = engine.allocator, engine.driver
    awake, refusals = engine.device_bytes(), 0
    calls = engine.calls_of(allocator.sleep)
    allocator.wake()
    for n, call in enumerate(calls, start=1):
        allocator.release_masters()
        engine.warm_cache()
        with driver.faults(f"*@{n}={answer}"):
            try:
                allocator.sleep()
            except api.AllocatorError:
                refusals += 1
                assert allocator.asleep_tags() == frozenset(), f"call {n}, {call}"
                assert engine.intact(), f"call {n}, {call}"
                assert engine.cache_is(7), f"call {n}, {call}"
                assert engine.device_bytes() == awake
                host = driver.bytes_registered()
                # Masters that were taken in full may stay: they are accounted, and go when asked.
                assert allocator.release_masters() == allocator.scale * host
                assert driver.bytes_registered() == 0
        if not allocator.asleep_tags():
            allocator.sleep()
        assert engine.device_bytes() == [0, 0], f"call {n}, {call}"
        allocator.wake()
        assert engine.intact(), f"call {n}, {call}"
    assert refusals >= len(calls) // 2  # the rest are releases and contexts, which a sleep gets over


def test_a_wake_that_fails_every_time_can_be_retried_for_ever(engine: Engine) -> None:
    engine.allocator.sleep()
    with engine.driver.faults("cuMemcpyHtoDAsync@2x1000=1"):
        for _ in range(20):
            with pytest.raises(api.DriverError):
                engine.allocator.wake()
    assert engine.device_bytes() == [0, 0]
    engine.allocator.wake()
    assert engine.intact()


def test_an_unmap_that_is_refused_during_rollback_is_remembered(engine: Engine) -> None:
    """Catalogue 4: state follows the driver's answer, so a slot that stayed mapped is not mapped again."""
    allocator, driver = engine.allocator, engine.driver
    allocator.sleep()
    with driver.faults("cuMemcpyHtoDAsync=1;cuMemUnmap@1x3=999"), pytest.raises(api.DriverError):
        allocator.wake()
    assert sum(engine.device_bytes()) > 0  # stuck, and accounted for
    assert sum(row.bytes_mapped for row in allocator.memory_usage()) == sum(engine.device_bytes()) * allocator.scale
    allocator.wake()
    assert engine.intact()


def test_what_stayed_stuck_is_given_back_on_demand(engine: Engine) -> None:
    allocator, driver = engine.allocator, engine.driver
    allocator.sleep()
    with driver.faults("cuMemcpyHtoDAsync=1;cuMemUnmap@1x3=999"), pytest.raises(api.DriverError):
        allocator.wake()
    assert allocator.collect() > 0
    assert engine.device_bytes() == [0, 0]
    allocator.wake()
    assert engine.intact()


def test_a_handle_that_the_driver_will_not_take_is_reported_and_used_again(engine: Engine) -> None:
    allocator, driver = engine.allocator, engine.driver
    awake = engine.device_bytes()
    with driver.faults("cuMemRelease=999"):
        report = allocator.sleep()
    assert (report.bytes_freed, report.bytes_held) == (0, sum(awake) * allocator.scale)
    assert engine.device_bytes() == awake  # bytes, not words
    assert allocator.wake().bytes == 0
    assert engine.intact()
    with driver.faults("cuMemRelease=999"):
        allocator.sleep()
    assert allocator.collect() == sum(awake) * allocator.scale
    assert engine.device_bytes() == [0, 0]
    allocator.wake()
    assert engine.intact()


def test_a_sleep_whose_rollback_fails_too_loses_nothing(engine: Engine) -> None:
    """Bytes stay behind their handles, even those of the cache, and a wake maps them without a copy."""
    allocator, driver = engine.allocator, engine.driver
    with driver.faults("cuMemUnmap@3x1=999;cuMemMap=999"), pytest.raises(api.RollbackFailed, match="wake"):
        allocator.sleep()
    assert allocator.asleep_tags() >= {"weights", "kv_cache"}
    assert allocator.wake().bytes_copied == 0
    assert engine.intact()
    assert engine.cache_is(7)


def test_a_copy_to_the_host_that_fails_makes_its_old_master_worthless(engine: Engine, pattern: Pattern) -> None:
    allocator, driver = engine.allocator, engine.driver
    allocator.prepare()
    for i, segment in enumerate(engine.kept):
        engine.kept[segment] = pattern(i + 50, segment.content_nbytes)
        allocator.write(segment, engine.kept[segment])
    with driver.faults("cuMemcpyDtoHAsync@2=999"), pytest.raises(api.DriverError):
        allocator.sleep()
    assert engine.intact()
    allocator.sleep()
    allocator.wake()
    assert engine.intact()


def test_a_half_renewed_master_is_not_taken_for_the_old_one(engine: Engine) -> None:
    """Content goes A, B, A, and the sleep at B copies some segments before it fails: masters at B must not serve A."""
    allocator, driver = engine.allocator, engine.driver
    allocator.prepare()
    for segment in engine.kept:
        allocator.write(segment, b"\x01" * segment.content_nbytes)
    with driver.faults("cuMemcpyDtoHAsync@3=999"), pytest.raises(api.DriverError):
        allocator.sleep()
    for segment, content in engine.kept.items():
        allocator.write(segment, content)
    allocator.sleep()
    allocator.wake()
    assert engine.intact()


def test_a_wake_that_fails_waits_for_its_copies_before_it_unmaps(child, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """On a link slow enough that the weights are in flight when mapping the cache fails."""
    box = SimulatedBox.create(tmp_path / "box", devices=1, copy_gib_s=20)
    program = """
from allocator import Allocator, OutOfMemory
from allocator.simdriver import SimulatedDriver
driver, allocator = SimulatedDriver(), Allocator()
weights, cache = allocator.alloc(2 << 30), allocator.alloc(1 << 30, tag="kv_cache")
allocator.write(weights, b"content")
allocator.sleep()
with driver.faults("cuMemCreate@10=2"):
    try:
        allocator.wake()
    except OutOfMemory:
        print("out of memory")
allocator.wake()
print(allocator.read(weights, 0, 7).decode())
"""
    assert child(program, **box.env()).rest().splitlines() == ["out of memory", "content"]


def test_a_device_that_someone_else_filled_is_named_in_bytes(engine: Engine, box) -> None:  # type: ignore[no-untyped-def]
    """Catalogue 1: wake out of memory. It says how much is missing, and succeeds once there is room."""
    allocator = engine.allocator
    allocator.sleep()
    wanted = allocator.wake().bytes
    on_first = engine.device_bytes()[0] * allocator.scale
    allocator.sleep()
    box.set_foreign_bytes(0, box.memory_bytes - 128 * MIB)
    try:
        with pytest.raises(api.OutOfMemory) as caught:
            allocator.wake()
    finally:
        box.set_foreign_bytes(0, 0)
    assert (caught.value.bytes_wanted, caught.value.bytes_free) == (on_first, 128 * MIB)
    assert allocator.wake().bytes == wanted
    assert engine.intact()


@pytest.mark.parametrize("seed", range(5))
def test_random_failures_lose_nothing(engine: Engine, seed: int) -> None:
    allocator, driver = engine.allocator, engine.driver
    for round_number in range(20):
        with driver.faults(f"seed:{seed * 100 + round_number}/60"):
            for operation in (allocator.sleep, allocator.wake):
                try:
                    operation()
                except api.AllocatorError:
                    continue
        if allocator.asleep_tags():
            allocator.wake()
        assert engine.intact()
