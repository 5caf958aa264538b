"""The end of a process: pools go before the allocator, and the allocator stays while tensors live."""

import dataclasses
from collections.abc import Callable
from typing import Any

MIB = 1 << 20
Make = Callable[..., Any]


def test_pools_go_and_an_allocator_without_tensors_too(make: Make) -> None:
    bench = make()
    with bench.allocator.region("weights"):
        bench.torch.empty(8 * MIB)
    with bench.allocator.graph_pool():
        pass
    bench.allocator.at_exit()
    assert all(pool.dropped for pool in bench.torch.pools)
    assert bench.memory.closed


def test_the_allocator_stays_while_tensors_live_for_they_are_freed_later(make: Make) -> None:
    bench = make()
    with bench.allocator.region("weights"):
        weights = bench.torch.empty(8 * MIB)
    bench.allocator.at_exit()
    assert all(pool.dropped for pool in bench.torch.pools)
    assert not bench.memory.closed
    assert weights.data_ptr() in bench.memory.segments


def test_the_background_thread_does_not_outlive_the_interpreter(make: Make) -> None:
    bench = make()
    with bench.allocator.region("weights"):
        weights = bench.torch.empty(8 * MIB)
    bench.memory.progress = dataclasses.replace(bench.memory.progress, running=True)
    bench.allocator.at_exit()
    assert bench.memory.closed
    assert weights.function == "rotator_malloc_weights"


def test_an_allocator_that_was_closed_has_nothing_to_do_at_exit(make: Make) -> None:
    bench = make()
    bench.allocator.close()
    before = list(bench.memory.calls)
    bench.allocator.at_exit()
    assert bench.memory.calls == before
