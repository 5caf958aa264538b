"""The catalogue of what failed in the field, the allocator's part: each line and the tests that answer it.

Tests without a home elsewhere are below. Lines that also need a GPU have a test in tests/gpu.
"""

import ast
import gc
from pathlib import Path

import psutil
import pytest

import allocator as api
from allocator import Allocator
from allocator.simdriver import SimulatedDriver
from tests.system.allocator.engine import MIB, Engine

GIB = 1 << 30
SYSTEM, UNIT = "tests/system/allocator/test_", "tests/unit/allocator/test_"

# line: (symptom, file::test, ...)
CATALOGUE: dict[int, tuple[str, ...]] = {
    1: (
        "a wake that runs out of memory leaves earlier blocks mapped",
        SYSTEM + "allocator_sweep.py::test_a_wake_survives_the_failure_of_any_of_its_calls",
        SYSTEM + "allocator_rollback.py::test_a_device_that_someone_else_filled_is_named_in_bytes",
        SYSTEM
        + "allocator_field.py::test_an_engine_that_slept_while_a_stock_engine_came_and_went_wakes_with_its_content",
    ),
    2: (
        "a rollback after host copies were dropped loses weights",
        SYSTEM + "allocator_sweep.py::test_a_wake_survives_the_failure_of_any_of_its_calls",
        SYSTEM + "allocator_rollback.py::test_a_wake_that_fails_every_time_can_be_retried_for_ever",
    ),
    3: (
        "double free, stale error codes, a free while asleep that unmaps again",
        SYSTEM + "allocator_segments.py::test_a_foreign_pointer_and_a_second_free_are_refused",
        SYSTEM + "allocator_segments.py::test_a_failed_call_leaves_no_error_for_the_next_one",
        SYSTEM + "allocator_sleep.py::test_a_free_while_asleep_gives_back_the_address_and_the_master_alone",
    ),
    4: (
        "after an unmap that failed silently every later wake fails",
        SYSTEM + "allocator_rollback.py::test_an_unmap_that_is_refused_during_rollback_is_remembered",
        SYSTEM + "allocator_rollback.py::test_what_stayed_stuck_is_given_back_on_demand",
    ),
    5: (
        "a copy that fails after its block was marked awake: the retry skips it",
        SYSTEM + "allocator_sweep.py::test_a_wake_survives_the_failure_of_any_of_its_calls",
    ),
    6: (
        "unmap races kernels in flight",
        SYSTEM + "allocator_fence.py::test_a_segment_freed_under_a_kernel_goes_when_the_kernel_has_ended",
        SYSTEM + "allocator_fence.py::test_the_fence_is_recorded_before_the_range_is_unmapped",
        SYSTEM + "allocator_fence.py::test_without_the_fence_the_kernel_meets_unmapped_memory",
        SYSTEM + "allocator_fence.py::test_a_sleep_waits_for_the_kernels_that_still_write",
    ),
    7: (
        "stale device memory after a wake becomes NaN state",
        SYSTEM + "allocator_sleep.py::test_level_1_keeps_weights_runtime_and_graphs_and_discards_the_rest",
        SYSTEM + "allocator_segments.py::test_fresh_memory_is_not_zero_so_that_tests_find_out_who_relies_on_it",
    ),
    8: (
        "a wake runs out of memory because torch's cache holds free blocks",
        SYSTEM + "allocator_fence.py::test_allocation_pressure_waits_for_what_was_freed",
        UNIT + "regions.py::test_a_wake_that_finds_the_device_full_tries_again_without_torchs_cache",
    ),
    9: (
        "pinned sizes round up to a power of two",
        SYSTEM + "allocator_sleep.py::test_masters_take_exactly_what_they_hold",
    ),
    10: (
        "the first sleep is slow because it pins",
        SYSTEM + "allocator_catalogue.py::test_the_first_sleep_after_a_prepare_pins_and_copies_nothing",
        SYSTEM + "allocator_background.py::test_after_a_prepare_in_the_background_the_first_sleep_copies_nothing",
    ),
    11: (
        "pinned memory kept after a wake, not accounted for",
        SYSTEM + "allocator_sleep.py::test_masters_outlive_the_wake_until_they_are_released",
    ),
    12: (
        "expandable segments",
        UNIT + "torch_settings.py::test_they_are_off_inside_and_back_after",
        UNIT + "torch_settings.py::test_a_torch_that_does_not_tell_is_judged_by_either_variable",
    ),
    13: (
        "a failed attribute query poisons later calls",
        SYSTEM + "allocator_segments.py::test_an_attribute_query_that_fails_poisons_no_later_call",
    ),
    14: (
        "network cards cannot register such memory",
        SYSTEM
        + "allocator_catalogue.py::test_device_memory_can_be_registered_by_network_cards_before_and_after_a_cycle",
        SYSTEM + "allocator_pins.py::test_pinned_memory_does_not_sleep_and_says_what_to_do",
    ),
    15: (
        "pure virtual method called at exit",
        SYSTEM + "allocator_catalogue.py::test_a_process_that_just_ends_ends_cleanly",
        UNIT + "exit.py::test_pools_go_and_an_allocator_without_tensors_too",
    ),
    16: (
        "out of memory while loading, because a pool cannot give memory back",
        SYSTEM + "allocator_segments.py::test_a_slab_goes_back_when_the_last_segment_on_it_is_freed",
        SYSTEM + "allocator_catalogue.py::test_loading_never_holds_much_more_than_what_is_live",
        UNIT + "regions.py::test_the_temporaries_of_a_loader_go_back_when_the_region_ends",
    ),
    17: (
        "unified memory: host copies and device pages are the same memory",
        SYSTEM + "allocator_host.py::test_on_unified_memory_masters_go_to_disk_and_a_sleep_frees_what_it_says",
        SYSTEM + "allocator_host.py::test_on_unified_memory_level_1_without_a_disk_says_what_to_do",
    ),
    18: (
        "what sleeping peers leave behind grows from cycle to cycle",
        SYSTEM + "allocator_catalogue.py::test_cycles_with_failures_leave_device_and_host_as_after_the_first",
    ),
    19: (
        "an overlay that was not loaded: sleep answers 200 and frees nothing",
        SYSTEM + "allocator_catalogue.py::test_a_sleep_reports_the_bytes_that_the_device_gained",
    ),
    20: (
        "no end-to-end suite over random sequences with failures",
        SYSTEM + "allocator_model.py::test_random_operations_agree_with_the_model",
        SYSTEM + "allocator_model.py::test_threads_of_several_processes_agree_with_their_own_models",
    ),
}


@pytest.mark.parametrize("line", sorted(CATALOGUE))
def test_every_line_names_tests_that_exist(line: int) -> None:
    root = Path(__file__).parents[3]
    symptom, *tests = CATALOGUE[line]
    assert symptom
    assert tests
    for test in tests:
        path, name = test.split("::")
        tree = ast.parse((root / path).read_text())
        assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, test


def test_the_catalogue_is_whole() -> None:
    assert sorted(CATALOGUE) == list(range(1, 21))


def test_the_first_sleep_after_a_prepare_pins_and_copies_nothing(allocator: Allocator, driver: SimulatedDriver) -> None:
    allocator.alloc(4 * GIB)
    allocator.prepare()
    driver.clear_log()
    report = allocator.sleep()
    assert (report.bytes_copied, report.bytes_unchanged) == (0, 4 * GIB)
    assert "cuMemHostRegister" not in driver.log()
    allocator.wake()


def test_device_memory_can_be_registered_by_network_cards_before_and_after_a_cycle(
    allocator: Allocator, driver: SimulatedDriver
) -> None:
    for tag in api.TAGS:
        allocator.alloc(GIB, tag=tag)
    for _ in range(2):
        assert driver.bytes_for_rdma() * allocator.scale == 5 * GIB
        allocator.sleep()
        allocator.wake()


@pytest.mark.parametrize("state", ["awake", "asleep", "partly asleep", "preparing", "freeing", "capturing"])
def test_a_process_that_just_ends_ends_cleanly(child, state: str) -> None:  # type: ignore[no-untyped-def]
    """Whatever is under way, and with nobody closing anything."""
    program = """
from allocator import Allocator
from allocator.simdriver import SimulatedDriver
driver, allocator = SimulatedDriver(), Allocator()
weights, cache = allocator.alloc(8 << 30), allocator.alloc(1 << 30, tag="kv_cache")
match state:
    case "asleep": allocator.sleep()
    case "partly asleep": allocator.sleep(bytes_wanted=1 << 30)
    case "preparing": allocator.prepare(wait=False)
    case "freeing": allocator.free(cache)
    case "capturing": allocator.capture_begin()
print("ends", flush=True)
"""
    engine = child(f"state = {state!r}\n" + program)
    assert engine.rest() == "ends"
    assert engine.process.returncode == 0


def test_loading_never_holds_much_more_than_what_is_live(driver: SimulatedDriver) -> None:
    """45 GiB, by a loader that makes a large temporary for each tensor, as quantization at load does."""
    with Allocator() as allocator:
        _load(allocator)


def _load(allocator: Allocator) -> None:
    live, peak = 0, 0
    for i in range(400):
        temporary = allocator.alloc((200 + 16 * (i % 5)) * MIB)
        live += temporary.nbytes
        peak = max(peak, live)
        live += allocator.alloc((96 + 16 * (i % 3)) * MIB).nbytes
        peak = max(peak, live)
        allocator.free(temporary)
        allocator.collect()
        live -= temporary.nbytes
    row = next(row for row in allocator.memory_usage() if row.tag == "weights")
    assert row.bytes_allocated == live
    assert row.bytes_peak <= 1.02 * peak
    assert row.bytes_mapped <= 1.03 * live
    allocator.sleep()
    allocator.wake()
    row = next(row for row in allocator.memory_usage() if row.tag == "weights")
    assert row.bytes_mapped == live  # a wake backs the live ranges alone


def test_cycles_with_failures_leave_device_and_host_as_after_the_first(
    plain: Allocator, driver: SimulatedDriver
) -> None:
    """Without packing: new content would have masters of other lengths, and those do not fit into the old places."""
    engine, process = Engine(plain, driver), psutil.Process()

    def cycle(n: int) -> None:
        if n % 3 == 0:
            with driver.faults(f"*@{n % 40 + 5}=999"), pytest.raises(api.AllocatorError):
                plain.wake()
        plain.wake()
        if n % 5 == 0:
            engine.load(n)
        plain.sleep()
        driver.clear_log()  # which is memory too

    plain.sleep()
    for n in range(60):
        cycle(n)
    gc.collect()
    held, resident = engine.held_bytes(), process.memory_info().rss
    for n in range(240):
        cycle(n)
    gc.collect()
    assert engine.held_bytes() == held
    assert process.memory_info().rss - resident < 1 << 20
    plain.wake()
    assert engine.intact()


def test_a_sleep_reports_the_bytes_that_the_device_gained(allocator: Allocator) -> None:
    """What the service compares with its own look at the device, so that a sleep that freed nothing is found out."""
    allocator.alloc(4 * GIB)
    allocator.alloc(2 * GIB, tag="kv_cache")
    before = allocator.device_memory().bytes_free
    report = allocator.sleep()
    assert allocator.device_memory().bytes_free - before == report.bytes_freed == 6 * GIB
    allocator.wake()
