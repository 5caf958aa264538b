"""The sequence from the field: A sleeps, a stock engine boots on the same GPUs and stops, A wakes."""

from collections.abc import Callable

import pytest

import allocator as api
from allocator import Allocator
from allocator.box import SimulatedBox
from allocator.simdriver import SimulatedDriver

GIB = 1 << 30

# Takes plain memory on both devices, one layer at a time, computes on it, frees some while loading, and holds the rest.
STOCK_ENGINE = """
import sys
from contextlib import ExitStack
from ctypes import c_size_t, c_ubyte, c_ulonglong, c_uint
from allocator._bare import BareDriver

scale, layer, layers = 4096, 4 << 30, 20
with ExitStack() as stack:
    drivers = [stack.enter_context(BareDriver(device).open()) for device in range(2)]
    for driver in drivers:
        with driver.open():
            for i in range(layers):
                address = stack.enter_context(driver.plain(layer // scale))
                driver.call("cuMemsetD8Async", c_ulonglong(address), c_ubyte(i), c_size_t(layer // scale), None)
                with driver.plain(layer // scale):
                    driver.call("cuCtxSynchronize")
            driver.call("cuCtxSynchronize")
    print("serves")
    sys.stdin.readline()
"""


def test_an_engine_that_slept_while_a_stock_engine_came_and_went_wakes_with_its_content(  # type: ignore[no-untyped-def]
    child, box: SimulatedBox, driver: SimulatedDriver, allocator: Allocator, pattern: Callable[[int, int], bytes]
) -> None:
    weights = [allocator.alloc(50 * GIB, device=device) for device in range(2)]
    caches = [allocator.alloc(30 * GIB, device=device, tag="kv_cache") for device in range(2)]
    for i, segment in enumerate(weights):
        allocator.write(segment, pattern(i, segment.content_nbytes))
    for turn in range(2):
        allocator.sleep()
        stock = child(STOCK_ENGINE)
        assert stock.line() == "serves", f"turn {turn}"
        assert [driver.bytes_used(device) * box.scale for device in range(2)] == [80 * GIB, 80 * GIB]
        with pytest.raises(api.OutOfMemory) as caught:
            allocator.wake()
        assert (caught.value.bytes_wanted, caught.value.bytes_free) == (80 * GIB, 16 * GIB)
        assert [driver.bytes_used(device, own=True) for device in range(2)] == [0, 0]
        stock.go_on()
        assert stock.process.wait(timeout=30) == 0
        allocator.wake()
        for i, segment in enumerate(weights):
            assert allocator.read(segment) == pattern(i, segment.content_nbytes), f"turn {turn}"
        assert not any(any(allocator.read(cache)) for cache in caches)


def test_a_stock_engine_that_is_killed_leaves_room_as_well(  # type: ignore[no-untyped-def]
    child, driver: SimulatedDriver, allocator: Allocator
) -> None:
    weights = allocator.alloc(50 * GIB)
    allocator.write(weights, b"content")
    allocator.sleep()
    stock = child(STOCK_ENGINE)
    assert stock.line() == "serves"
    stock.process.kill()
    stock.process.wait(timeout=30)
    allocator.wake()
    assert allocator.read(weights, 0, 7) == b"content"
