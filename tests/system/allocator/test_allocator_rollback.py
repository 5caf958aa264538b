"""Failures that deserve a story of their own; test_allocator_sweep.py fails every call there is."""

from collections.abc import Callable

import pytest

import allocator as api
from allocator import Allocator
from allocator.box import SimulatedBox
from allocator.simdriver import SimulatedDriver
from tests.system.allocator.engine import MIB, Engine

GIB = 1 << 30

Pattern = Callable[[int, int], bytes]


@pytest.fixture
def engine(allocator: Allocator, driver: SimulatedDriver) -> Engine:
    return Engine(allocator, driver)


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
    allocator.prepare()
    with driver.faults("cuMemRelease=999"):
        report = allocator.sleep()
    assert (report.bytes_freed, report.bytes_held) == (0, sum(awake) * allocator.scale)
    stuck = engine.device_bytes()  # with what the digests lay in
    assert all(now >= before for now, before in zip(stuck, awake, strict=True))  # bytes, not words
    assert allocator.wake().bytes == 0
    assert engine.intact()
    with driver.faults("cuMemRelease=999"):
        allocator.sleep()
    assert allocator.collect() == sum(stuck) * allocator.scale
    assert engine.device_bytes() == [0, 0]
    allocator.wake()
    assert engine.intact()


def test_a_sleep_whose_rollback_fails_too_loses_nothing(engine: Engine) -> None:
    """Bytes stay behind their handles, even those of the cache, and a wake maps them without a copy."""
    allocator, driver = engine.allocator, engine.driver
    allocator.prepare()
    staging = 2  # maps and unmaps of the memory that digests are put in, one on each device
    rules = f"cuMemUnmap@{staging + 3}=999;cuMemMap@{staging + 1}x1000=999"
    with driver.faults(rules), pytest.raises(api.RollbackFailed, match="wake"):
        allocator.sleep()
    assert allocator.asleep_tags() >= {"weights", "kv_cache"}
    assert allocator.wake().bytes_copied == 0
    assert engine.intact()
    assert engine.cache_bytes() == {7}


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


@pytest.mark.parametrize("call", ["cuMemcpyDtoHAsync", "cuStreamSynchronize", "cuLaunchKernel"])
def test_a_first_sleep_that_fails_keeps_no_host_memory(
    allocator: Allocator, driver: SimulatedDriver, call: str
) -> None:
    allocator.alloc(GIB)
    calls = driver.calls(call)
    allocator.sleep()
    calls = driver.calls(call) - calls
    allocator.wake()
    assert calls > 0
    for n in range(1, calls + 1):
        allocator.release_masters()
        with driver.faults(f"{call}@{n}=999"), pytest.raises(api.DriverError):
            allocator.sleep()
        host = allocator.host_memory()
        assert (host.bytes_used, host.bytes_registered, driver.bytes_registered()) == (0, 0, 0), f"call {n}"


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
