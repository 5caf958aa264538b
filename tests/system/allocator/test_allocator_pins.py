"""Memory registered for IPC or RDMA: no fence sees who uses it, so it stays until it is released by name."""

import pytest

import allocator as api
from allocator import Allocator
from allocator.simdriver import SimulatedDriver

GIB = 1 << 30


def test_pinned_memory_does_not_sleep_and_says_what_to_do(allocator: Allocator, driver: SimulatedDriver) -> None:
    buffer, cache = allocator.alloc(GIB), allocator.alloc(GIB, tag="kv_cache")
    allocator.write(buffer, b"content")
    allocator.pin(buffer)
    driver.clear_log()
    for call in (allocator.sleep, lambda: allocator.sleep(bytes_wanted=GIB), lambda: allocator.discard(["weights"])):
        with pytest.raises(api.Registered, match="deregister"):
            call()
    assert (driver.log(), allocator.asleep_tags()) == ([], frozenset())
    allocator.sleep(tags=["kv_cache"])  # others may
    allocator.wake()
    allocator.unpin(buffer)
    allocator.sleep()
    allocator.wake()
    assert allocator.read(buffer, 0, 7) == b"content"
    allocator.free(cache)


def test_freed_while_pinned_it_stays_mapped_until_the_last_release(
    allocator: Allocator, driver: SimulatedDriver
) -> None:
    buffer = allocator.alloc(GIB)
    allocator.write(buffer, b"content")
    for _ in range(2):
        allocator.pin(buffer)
    allocator.free(buffer)
    allocator.unpin(buffer)
    allocator.collect()
    assert driver.bytes_used(own=True) * allocator.scale == GIB
    row = next(iter(allocator.memory_usage()))
    assert (row.segments, row.bytes_allocated, row.bytes_deferred) == (0, 0, GIB)
    assert allocator.alloc(GIB).address != buffer.address
    with pytest.raises(api.Registered):
        allocator.sleep()
    allocator.unpin(buffer)
    allocator.collect()
    assert driver.bytes_used(own=True) * allocator.scale == GIB


def test_an_address_inside_a_segment_pins_it(allocator: Allocator) -> None:
    segment = allocator.alloc(GIB)
    allocator.pin(segment.address + 4096)
    with pytest.raises(api.Registered):
        allocator.sleep()
    allocator.unpin(segment.address)
    allocator.sleep()


def test_what_is_not_pinned_cannot_be_released(allocator: Allocator) -> None:
    segment = allocator.alloc(GIB)
    with pytest.raises(api.Registered, match="not registered"):
        allocator.unpin(segment)
    for call in (allocator.pin, allocator.unpin):
        with pytest.raises(api.ForeignPointer):
            call(4096)


def test_what_sleeps_or_was_freed_cannot_be_pinned(allocator: Allocator) -> None:
    segment, gone = allocator.alloc(GIB), allocator.alloc(GIB)
    allocator.pin(gone)
    allocator.free(gone)
    with pytest.raises(api.ForeignPointer, match="freed"):
        allocator.pin(gone)
    allocator.unpin(gone)
    allocator.sleep()
    with pytest.raises(api.TagAsleep, match="wake"):
        allocator.pin(segment)
    allocator.wake()


def test_pinned_memory_is_prepared_like_any_other(allocator: Allocator) -> None:
    segment = allocator.alloc(GIB)
    allocator.pin(segment)
    prepared = allocator.prepare()
    assert prepared is not None
    assert prepared.bytes_copied == GIB
    allocator.unpin(segment)
    assert allocator.sleep().bytes_copied == 0
