"""Graph pools, and captures that anyone makes."""

from collections.abc import Callable
from typing import Any

import pytest

from allocator import TagAsleep

MIB = 1 << 20
Make = Callable[..., Any]


def test_all_graphs_share_one_pool(make: Make) -> None:
    bench = make()
    with bench.allocator.graph_pool() as first:
        pass
    with bench.allocator.graph_pool() as second:
        pass
    assert first == second
    assert bench.torch.pools[-1].function.malloc_name == "rotator_malloc_cudagraph"


def test_a_graph_pool_outlives_the_end_of_regions(make: Make) -> None:
    bench = make()
    with bench.allocator.graph_pool():
        pass
    with bench.allocator.region("weights"):
        pass
    assert not bench.torch.pools[0].dropped
    bench.allocator.release_pools()
    assert bench.torch.pools[0].dropped


def test_a_graph_pool_that_sleeps_takes_no_capture(make: Make) -> None:
    bench = make()
    bench.memory.asleep.add("cudagraph")
    with pytest.raises(TagAsleep):
        bench.allocator.graph_pool().__enter__()


def test_the_allocator_hears_of_every_capture(make: Make) -> None:
    bench = make()
    with bench.allocator.region("weights"):
        pass
    graph = bench.torch.module.cuda.CUDAGraph()
    graph.capture_begin(pool=(0, 1), capture_error_mode="thread_local")
    assert bench.memory.captures == 1
    graph.capture_end()
    assert bench.memory.captures == 0


def test_a_capture_that_does_not_begin_is_over(make: Make) -> None:
    bench = make()
    with bench.allocator.region("weights"):
        pass
    with pytest.raises(RuntimeError, match="refused"):
        bench.torch.module.cuda.CUDAGraph(refuses=True).capture_begin()
    assert bench.memory.captures == 0


def test_no_pool_is_dropped_during_a_capture(make: Make) -> None:
    bench = make()
    with bench.allocator.region("weights"):
        kept = bench.torch.empty(MIB)
    graph = bench.torch.module.cuda.CUDAGraph()
    graph.capture_begin()
    with bench.allocator.region("kv_cache"):
        bench.torch.empty(8 * MIB)
    assert not bench.torch.aborted
    graph.capture_end()
    bench.allocator.trim()
    assert bench.memory.nbytes("kv_cache") == 0
    assert kept.function == "rotator_malloc_weights"


def test_closing_leaves_torch_as_it_was(make: Make) -> None:
    bench = make()
    graph = bench.torch.module.cuda.CUDAGraph
    before = graph.capture_begin, graph.capture_end
    with bench.allocator.region("weights"):
        assert graph.capture_begin is not before[0]
    bench.allocator.close()
    assert (graph.capture_begin, graph.capture_end) == before
