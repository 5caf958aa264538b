"""Regions: whose tag a tensor gets, what goes back when, and what is refused."""

import threading
from collections.abc import Callable
from typing import Any

import pytest

from allocator import NestedRegion, OutOfMemory, TagAsleep, TorchUnsupported, UnknownTag, UsageError

MIB = 1 << 20
Make = Callable[..., Any]


def test_a_tensor_made_in_a_region_has_its_tag(make: Make) -> None:
    bench = make()
    with bench.allocator.region("kv_cache"):
        cache = bench.torch.empty(8 * MIB)
    assert cache.function == "rotator_malloc_kv_cache"
    assert bench.memory.nbytes("kv_cache") == 8 * MIB


def test_a_tensor_made_outside_is_none_of_ours(make: Make) -> None:
    bench = make()
    with bench.allocator.region("weights"):
        pass
    assert bench.torch.empty(MIB).function == "default"


def test_a_tensor_of_another_thread_is_none_of_ours(make: Make) -> None:
    bench = make()
    seen: list[str] = []
    with bench.allocator.region("weights"):
        thread = threading.Thread(target=lambda: seen.append(bench.torch.empty(MIB).function))
        thread.start()
        thread.join()
    assert seen == ["default"]


def test_the_temporaries_of_a_loader_go_back_when_the_region_ends(make: Make) -> None:
    bench = make()
    with bench.allocator.region("weights"):
        kept = bench.torch.empty(8 * MIB)
        temporary = bench.torch.empty(32 * MIB)
        del temporary
        assert bench.memory.nbytes("weights") == 40 * MIB
    assert bench.memory.nbytes("weights") == 8 * MIB
    assert kept.data_ptr() in bench.memory.segments


def test_what_dies_after_the_region_goes_back_before_the_next_sleep(make: Make) -> None:
    bench = make()
    with bench.allocator.region("weights"):
        kept, dying = bench.torch.empty(8 * MIB), bench.torch.empty(32 * MIB)
    del dying
    bench.allocator.sleep()
    assert bench.memory.nbytes("weights") == 8 * MIB
    assert bench.memory.calls[-1][0] == "sleep"
    assert kept.function == "rotator_malloc_weights"


def test_kept_pools_keep_what_they_cached(make: Make) -> None:
    bench = make()
    bench.allocator._trims = False
    with bench.allocator.region("weights"):
        bench.torch.empty(8 * MIB)
    assert bench.memory.nbytes("weights") == 8 * MIB
    bench.allocator.release_pools()
    assert bench.memory.nbytes("weights") == 0


@pytest.mark.parametrize(
    ("outer", "inner"), [("runtime", "kv_cache"), ("weights", "weights"), ("weights", "workspace")]
)
def test_regions_nest_and_the_inner_one_wins(make: Make, outer: str, inner: str) -> None:
    bench = make()
    with bench.allocator.region(outer):
        before = bench.torch.empty(4 * MIB)
        with bench.allocator.region(inner):
            inside = bench.torch.empty(4 * MIB)
        after = bench.torch.empty(4 * MIB)
    tags = [tensor.function.removeprefix("rotator_malloc_") for tensor in (before, inside, after)]
    assert tags == [outer, inner, outer]


def test_a_torch_that_uses_the_outer_pool_is_refused_when_regions_nest(make: Make) -> None:
    bench = make(innermost=False)
    with bench.allocator.region("runtime"), pytest.raises(NestedRegion, match="outermost"):
        bench.allocator.region("kv_cache").__enter__()


def test_an_inner_regions_pool_is_dropped_with_the_outermost(make: Make) -> None:
    bench = make()
    with bench.allocator.region("runtime"):
        with bench.allocator.region("kv_cache"):
            bench.torch.empty(8 * MIB)
        assert bench.memory.nbytes("kv_cache") == 10 * MIB  # with the probe of the nesting
    assert bench.memory.nbytes("kv_cache") == 0


def test_small_tensors_of_a_mixed_region_are_kept_and_large_ones_are_cache(make: Make) -> None:
    bench = make()
    with bench.allocator.region("kv_cache", mixed=True):
        small, large = bench.torch.empty(MIB), bench.torch.empty(64 * MIB)
    assert bench.memory.segments[small.data_ptr()][0] == "runtime"
    assert bench.memory.segments[large.data_ptr()][0] == "kv_cache"


def test_only_a_cache_can_be_mixed(make: Make) -> None:
    with pytest.raises(UsageError, match="kv_cache"):
        make().allocator.region("weights", mixed=True).__enter__()


def test_no_pool_is_dropped_while_another_thread_is_in_a_region(make: Make) -> None:
    bench = make()
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with bench.allocator.region("kv_cache"):
            entered.set()
            leave.wait(5)

    thread = threading.Thread(target=other)
    thread.start()
    entered.wait(5)
    with bench.allocator.region("weights"):
        bench.torch.empty(8 * MIB)
    assert not bench.torch.aborted
    leave.set()
    thread.join()
    assert bench.memory.nbytes("weights") == 0


def test_an_error_that_is_kept_keeps_no_pool(make: Make) -> None:
    bench = make()
    kept: list[BaseException] = []
    try:
        with bench.allocator.region("weights"):
            raise KeyError("the loader failed")
    except KeyError as error:
        kept.append(error)
    with bench.allocator.region("kv_cache"):
        kept.clear()
    assert bench.torch.pools[0].dropped


def test_a_refused_inner_region_leaves_the_outer_one_whole(make: Make) -> None:
    bench = make(innermost=False)
    with bench.allocator.region("runtime"):
        with pytest.raises(NestedRegion), bench.allocator.region("kv_cache"):
            pass
        kept = bench.torch.empty(4 * MIB)
    assert not bench.torch.aborted
    assert kept.function == "rotator_malloc_runtime"


def test_a_region_that_fails_ends_all_the_same(make: Make) -> None:
    bench = make()
    with pytest.raises(ZeroDivisionError), bench.allocator.region("weights"):
        bench.torch.empty(8 * MIB // 0)
    assert bench.torch.open == []
    assert bench.memory.nbytes("weights") == 0


def test_an_unknown_tag_is_refused(make: Make) -> None:
    with pytest.raises(UnknownTag, match="weights, kv_cache"):
        make().allocator.region("wieghts").__enter__()


def test_a_region_of_a_sleeping_tag_is_refused(make: Make) -> None:
    bench = make()
    bench.memory.asleep.add("weights")
    with pytest.raises(TagAsleep, match="wake it"):
        bench.allocator.region("weights").__enter__()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"version": "2.9.1"}, "too old"),
        ({"backend": "cudaMallocAsync"}, "no memory pools"),
        ({"available": False}, "no CUDA device"),
    ],
)
def test_a_torch_without_sound_pools_is_refused(make: Make, change: dict[str, Any], reason: str) -> None:
    bench = make(**{k: v for k, v in change.items() if k == "version"})
    for name, value in change.items():
        setattr(bench.torch, name, value)
    with pytest.raises(TorchUnsupported, match=reason):
        bench.allocator.region("weights").__enter__()


def test_a_closed_allocator_opens_no_region(make: Make) -> None:
    bench = make()
    bench.allocator.close()
    assert bench.memory.closed
    with pytest.raises(UsageError, match="closed"):
        bench.allocator.region("weights").__enter__()


def test_a_wake_that_finds_the_device_full_tries_again_without_torchs_cache(make: Make) -> None:
    bench = make()
    with bench.allocator.region("weights"):
        weights = bench.torch.empty(8 * MIB)
    with bench.allocator.region("runtime"):
        dying = bench.torch.empty(16 * MIB)
    bench.allocator.sleep(1, ["weights"])
    del dying
    bench.memory.wakes_to_refuse = 1
    bench.allocator.wake()
    assert bench.memory.nbytes("runtime") == 0
    assert not bench.memory.asleep
    assert weights.function == "rotator_malloc_weights"


def test_a_wake_that_stays_refused_says_so(make: Make) -> None:
    bench = make()
    with bench.allocator.region("weights"):
        weights = bench.torch.empty(8 * MIB)
    bench.allocator.sleep()
    bench.memory.wakes_to_refuse = 2
    with pytest.raises(OutOfMemory, match="full"):
        bench.allocator.wake()
    assert bench.memory.asleep == {"weights"}
    assert weights.data_ptr() in bench.memory.segments


def test_work_in_flight_is_waited_for_before_memory_goes(make: Make) -> None:
    bench = make()
    with bench.allocator.region("kv_cache"):
        cache = bench.torch.empty(8 * MIB)
    for give in (lambda: bench.allocator.discard(["kv_cache"]), bench.allocator.sleep):
        bench.memory.asleep.clear()
        before = bench.torch.synchronized
        give()
        assert bench.torch.synchronized > before
    assert cache.function == "rotator_malloc_kv_cache"
