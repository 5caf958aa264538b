"""Segments: what can be allocated, what it costs the device, and what comes back."""

import pytest

import allocator as api
from allocator import Allocator
from allocator.simdriver import SimulatedDriver

GIB = 1 << 30
MIB = 1 << 20


def usage(allocator: Allocator, tag: str, device: int = 0) -> api.TagUsage:
    return next(row for row in allocator.memory_usage() if row.tag == tag and row.device == device)


def test_segments_hold_what_was_written_to_them_and_nothing_of_each_other(allocator: Allocator) -> None:
    segments = [allocator.alloc(GIB + i * 48 * MIB, device=i % 2, tag=tag) for i, tag in enumerate(api.TAGS)]
    for i, segment in enumerate(segments):
        allocator.write(segment, bytes([i]) * segment.content_nbytes)
    for i, segment in enumerate(segments):
        assert allocator.read(segment) == bytes([i]) * segment.content_nbytes


def test_small_segments_share_a_slab(allocator: Allocator) -> None:
    for _ in range(4):
        allocator.alloc(16 * MIB)
    assert usage(allocator, "weights").bytes_mapped == 64 * MIB


def test_a_slab_goes_back_when_the_last_segment_on_it_is_freed(allocator: Allocator) -> None:
    """Catalogue 16: while a model loads, what is freed is the device's again, not a pool's."""
    first, second = allocator.alloc(128 * MIB), allocator.alloc(128 * MIB)
    allocator.free(first)
    assert usage(allocator, "weights").bytes_mapped == 128 * MIB
    allocator.free(second)
    assert usage(allocator, "weights").bytes_mapped == 0


def test_a_freed_range_is_used_again_before_new_memory_is_taken(allocator: Allocator) -> None:
    first, _keep = allocator.alloc(32 * MIB), allocator.alloc(32 * MIB)
    allocator.free(first)
    assert allocator.alloc(32 * MIB).address == first.address
    assert usage(allocator, "weights").bytes_mapped == 64 * MIB


def test_a_large_segment_costs_at_most_one_slab_more_than_its_size(allocator: Allocator) -> None:
    allocator.alloc(3 * GIB + 16 * MIB)
    row = usage(allocator, "weights")
    assert row.bytes_allocated <= row.bytes_mapped < row.bytes_allocated + 64 * MIB


def test_fresh_memory_is_not_zero_so_that_tests_find_out_who_relies_on_it(allocator: Allocator) -> None:
    assert allocator.read(allocator.alloc(GIB), 0, 16) == b"\xff" * 16


def test_an_allocation_that_fails_half_way_takes_nothing(allocator: Allocator, driver: SimulatedDriver) -> None:
    calls = driver.calls()
    first = allocator.alloc(256 * MIB)
    allocator.free(first)
    allocator.collect()
    for n in range(1, driver.calls() - calls):
        with driver.faults(f"*@{n}=999"):
            try:
                segment = allocator.alloc(256 * MIB)
            except api.AllocatorError:
                segment = None
        if segment is not None:
            allocator.free(segment)
        allocator.collect()
        assert driver.bytes_used(own=True) == 0
        again = allocator.alloc(256 * MIB)  # the address is free again as well
        assert again.address == first.address
        allocator.free(again)


def test_out_of_memory_says_what_was_wanted_and_what_is_free(allocator: Allocator) -> None:
    allocator.alloc(90 * GIB)
    with pytest.raises(api.OutOfMemory) as caught:
        allocator.alloc(10 * GIB)
    assert (caught.value.bytes_wanted, caught.value.bytes_free) == (10 * GIB, 6 * GIB)
    allocator.alloc(6 * GIB)


@pytest.mark.parametrize("nbytes", [0, -1])
def test_a_segment_of_no_bytes_is_refused(allocator: Allocator, nbytes: int) -> None:
    with pytest.raises(api.InvalidSize):
        allocator.alloc(nbytes)


def test_a_segment_larger_than_the_device_is_refused(allocator: Allocator) -> None:
    with pytest.raises(api.InvalidSize):
        allocator.alloc(97 * GIB)


def test_an_unknown_tag_is_refused_and_the_known_ones_are_named(allocator: Allocator) -> None:
    with pytest.raises(api.UnknownTag, match="kv_cache"):
        allocator.alloc(GIB, tag="wieghts")  # type: ignore[arg-type]


def test_a_device_that_is_not_there_is_the_drivers_error(allocator: Allocator) -> None:
    with pytest.raises(api.DriverError, match="CUDA_ERROR_INVALID_DEVICE"):
        allocator.alloc(GIB, device=7)


def test_a_foreign_pointer_and_a_second_free_are_refused(allocator: Allocator, driver: SimulatedDriver) -> None:
    segment = allocator.alloc(GIB)
    allocator.free(segment)
    driver.clear_log()
    for address in (segment.address, 4096):
        with pytest.raises(api.ForeignPointer):
            allocator.free(address)
    assert driver.log() == []


@pytest.mark.parametrize(("offset", "nbytes"), [(0, 1 << 40), (-1, 1), (1 << 40, 1)])
def test_copies_past_the_end_are_refused(allocator: Allocator, offset: int, nbytes: int) -> None:
    segment = allocator.alloc(GIB)
    with pytest.raises(api.InvalidSize):
        allocator.read(segment, offset, min(nbytes, segment.content_nbytes + 1))


def test_an_attribute_query_that_fails_poisons_no_later_call(driver: SimulatedDriver) -> None:
    """Catalogue 13: a card without Fabric or RDMA answers such a query with an error."""
    with driver.faults("cuDeviceGetAttribute=801"), Allocator() as allocator:
        segment = allocator.alloc(GIB)
        allocator.write(segment, b"content")
        assert allocator.read(segment, 0, 7) == b"content"


def test_a_failed_call_leaves_no_error_for_the_next_one(allocator: Allocator, driver: SimulatedDriver) -> None:
    """Catalogue 3: upstream keeps the code of a failed call in a global, and later calls fail of it."""
    with driver.faults("cuMemCreate=2"), pytest.raises(api.OutOfMemory):
        allocator.alloc(GIB)
    assert allocator.alloc(GIB).nbytes == GIB


def test_a_closed_allocator_says_so(box: object) -> None:
    allocator = Allocator()
    allocator.close()
    allocator.close()
    with pytest.raises(api.UsageError, match="closed"):
        allocator.alloc(GIB)


def test_a_driver_that_is_not_there_is_named(box: object) -> None:
    with pytest.raises(api.DriverMissing, match="no-such-driver"):
        Allocator("/no-such-driver.so")
