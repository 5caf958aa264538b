"""Sleeping by bytes wanted: as much as the other engine needs, what is cheapest to restore first."""

from collections.abc import Callable

import pytest

import allocator as api
from allocator import Allocator
from allocator.simdriver import SimulatedDriver

GIB = 1 << 30
MIB = 1 << 20
SLAB = 64 * MIB
Pattern = Callable[[int, int], bytes]


@pytest.fixture
def weights(allocator: Allocator, pattern: Pattern) -> api.Segment:
    made = allocator.alloc(4 * GIB)
    allocator.write(made, pattern(1, made.content_nbytes))
    return made


@pytest.fixture
def cache(allocator: Allocator) -> api.Segment:
    made = allocator.alloc(6 * GIB, tag="kv_cache")
    allocator.write(made, b"\x07" * made.content_nbytes)
    return made


def mapped(allocator: Allocator) -> dict[str, int]:
    return {row.tag: row.bytes_mapped for row in allocator.memory_usage()}


def test_the_cache_goes_before_the_weights_and_no_more_of_it_than_wanted(
    allocator: Allocator, weights: api.Segment, cache: api.Segment, pattern: Pattern
) -> None:
    report = allocator.sleep(bytes_wanted=2 * GIB)
    assert 2 * GIB <= report.bytes_freed < 2 * GIB + SLAB
    assert (report.bytes_copied, report.bytes_kept) == (0, 10 * GIB - report.bytes_freed)
    assert mapped(allocator) == {"weights": 4 * GIB, "kv_cache": 6 * GIB - report.bytes_freed}
    assert allocator.asleep_tags() == set(api.TAGS)
    woken = allocator.wake()
    assert (woken.bytes, woken.bytes_copied) == (report.bytes_freed, 0)
    assert allocator.read(weights) == pattern(1, weights.content_nbytes)
    found = allocator.read(cache)
    lost = report.bytes_freed // allocator.scale
    assert (found.count(0), found.count(7)) == (lost, len(found) - lost)


def test_weights_follow_when_the_cache_is_not_enough_and_only_what_went_is_copied(
    allocator: Allocator, weights: api.Segment, cache: api.Segment, pattern: Pattern
) -> None:
    report = allocator.sleep(bytes_wanted=7 * GIB)
    assert 7 * GIB <= report.bytes_freed < 7 * GIB + 2 * SLAB
    assert report.bytes_copied == report.bytes_freed - 6 * GIB
    assert allocator.wake().bytes_copied == report.bytes_copied
    assert allocator.read(weights) == pattern(1, weights.content_nbytes)


def test_a_deeper_sleep_goes_on_where_the_first_one_stopped(
    allocator: Allocator, weights: api.Segment, cache: api.Segment, pattern: Pattern, driver: SimulatedDriver
) -> None:
    freed = [allocator.sleep(bytes_wanted=nbytes).bytes_freed for nbytes in (GIB, 6 * GIB, 2 * GIB)]
    freed.append(allocator.sleep().bytes_freed)
    assert sum(freed) == 10 * GIB
    assert driver.bytes_used(own=True) == 0
    with pytest.raises(api.AlreadyAsleep):
        allocator.sleep(bytes_wanted=GIB)
    allocator.wake()
    assert allocator.read(weights) == pattern(1, weights.content_nbytes)


def test_a_chunk_that_lost_a_part_is_not_read_again(allocator: Allocator, pattern: Pattern) -> None:
    """After the first wake slots lie from the pool's start, and chunks from each segment's: they overlap by halves."""
    small, large = allocator.alloc(16 * MIB), allocator.alloc(GIB)
    allocator.sleep()
    allocator.wake()
    for turn in range(3):
        for i, segment in enumerate((small, large)):
            allocator.write(segment, pattern(turn + i, segment.content_nbytes))
        for _ in range(5):
            allocator.sleep(bytes_wanted=16 * MIB * (turn + 1))
        allocator.wake()
        for i, segment in enumerate((small, large)):
            assert allocator.read(segment) == pattern(turn + i, segment.content_nbytes), f"turn {turn}"


def test_more_than_there_is_means_all_of_it(allocator: Allocator, weights: api.Segment, cache: api.Segment) -> None:
    assert allocator.sleep(bytes_wanted=90 * GIB).bytes_freed == 10 * GIB


def test_bytes_are_wanted_on_each_device(allocator: Allocator, driver: SimulatedDriver) -> None:
    for device in range(2):
        allocator.alloc(3 * GIB, device=device, tag="kv_cache")
    assert allocator.sleep(bytes_wanted=GIB).bytes_freed == 2 * GIB
    assert [driver.bytes_used(device, own=True) * allocator.scale for device in range(2)] == [2 * GIB, 2 * GIB]
    allocator.wake()


def test_what_was_kept_cannot_be_used_before_the_wake(
    allocator: Allocator, weights: api.Segment, cache: api.Segment
) -> None:
    allocator.sleep(bytes_wanted=GIB)
    for segment in (weights, cache):
        with pytest.raises(api.TagAsleep):
            allocator.read(segment)
    with pytest.raises(api.TagAsleep):
        allocator.alloc(GIB)
    assert allocator.wake(tags=["weights"]).bytes == 0
    allocator.read(weights)


def test_a_free_while_partly_asleep_gives_back_what_was_kept(
    allocator: Allocator, weights: api.Segment, cache: api.Segment, driver: SimulatedDriver
) -> None:
    allocator.sleep(bytes_wanted=GIB)
    allocator.free(cache)
    assert mapped(allocator)["kv_cache"] == 0
    assert driver.bytes_used(own=True) * allocator.scale == 4 * GIB
    assert allocator.wake().bytes == 0


def test_two_engines_whose_weights_fit_together_swap_by_handing_over_their_caches_alone(
    driver: SimulatedDriver, pattern: Pattern
) -> None:
    """No weights move: what one engine's cache gives back is what the other's takes."""
    with Allocator() as first, Allocator() as second:
        engines = []
        for i, allocator in enumerate((first, second)):
            held = allocator.alloc(30 * GIB)
            allocator.write(held, pattern(i, held.content_nbytes))
            cache = allocator.alloc(30 * GIB, tag="kv_cache")
            if i == 0:
                first.sleep(bytes_wanted=30 * GIB)
            engines.append((allocator, held, cache))
        moved = []
        for turn in range(4):
            asleep, awake = engines[turn % 2][0], engines[1 - turn % 2][0]
            moved.append(awake.sleep(bytes_wanted=30 * GIB).bytes_copied)
            moved.append(asleep.wake().bytes_copied)
            assert driver.bytes_used(own=True) * asleep.scale == 90 * GIB
            assert asleep.read(engines[turn % 2][1]) == pattern(turn % 2, 30 * GIB // asleep.scale)
        assert moved == [0] * 8


@pytest.mark.parametrize("nbytes", [0, -1])
def test_no_bytes_wanted_is_refused_and_says_how_to_ask_for_all(
    allocator: Allocator, weights: api.Segment, nbytes: int
) -> None:
    with pytest.raises(api.InvalidSize, match="leave it out"):
        allocator.sleep(bytes_wanted=nbytes)
    assert allocator.asleep_tags() == frozenset()
