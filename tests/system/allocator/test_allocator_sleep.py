"""Sleep and wake when nothing fails: what is kept, what is discarded, what is copied, what it costs the host."""

from collections.abc import Callable

import pytest

import allocator as api
from allocator import Allocator
from allocator.simdriver import SimulatedDriver

GIB = 1 << 30
MIB = 1 << 20
CHUNK = 32 * MIB  # masters are compared and copied by so much
Pattern = Callable[[int, int], bytes]


def test_level_1_keeps_weights_runtime_and_graphs_and_discards_the_rest(
    allocator: Allocator, driver: SimulatedDriver, pattern: Pattern
) -> None:
    segments = {tag: allocator.alloc(GIB, tag=tag) for tag in api.TAGS}
    for i, segment in enumerate(segments.values()):
        allocator.write(segment, pattern(i + 1, segment.content_nbytes))
    report = allocator.sleep()
    assert driver.bytes_used(own=True) == 0
    assert (report.bytes_freed, report.bytes_copied, report.bytes_discarded) == (5 * GIB, 3 * GIB, 2 * GIB)
    allocator.wake()
    kept = {tag for i, tag in enumerate(api.TAGS) if allocator.read(segments[tag]) == pattern(i + 1, GIB // 4096)}
    zeros = {tag for tag in api.TAGS if not any(allocator.read(segments[tag]))}
    assert kept == {"weights", "runtime", "cudagraph"}
    assert zeros == {"kv_cache", "workspace"}  # catalogue 7: never what another process left in those pages


def test_level_2_discards_weights_too_and_keeps_no_host_memory_for_them(
    allocator: Allocator, driver: SimulatedDriver
) -> None:
    weights = allocator.alloc(GIB)
    allocator.write(weights, b"content")
    allocator.prepare()
    allocator.sleep(level=2)
    assert driver.bytes_registered() == 0
    allocator.wake()
    assert not any(allocator.read(weights))


def test_addresses_stay_the_same_across_a_cycle(allocator: Allocator) -> None:
    segment = allocator.alloc(GIB)
    allocator.write(segment, b"before")
    allocator.sleep()
    allocator.wake()
    allocator.write(segment, b"afterwards")
    assert allocator.read(segment, 0, 10) == b"afterwards"


def test_an_unchanged_segment_is_copied_once_and_a_changed_one_again(allocator: Allocator) -> None:
    still, changing = allocator.alloc(GIB), allocator.alloc(GIB)
    assert allocator.sleep().bytes_copied == 2 * GIB
    allocator.wake()
    assert allocator.sleep().bytes_copied == 0
    allocator.wake()
    allocator.write(changing, b"\x01", offset=changing.content_nbytes - 1)
    report = allocator.sleep()
    assert (report.bytes_copied, report.bytes_unchanged) == (CHUNK, 2 * GIB - CHUNK)
    allocator.wake()
    assert allocator.read(changing, changing.content_nbytes - 1, 1) == b"\x01"
    assert allocator.read(still, 0, 4) == b"\xff" * 4


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda data: data[8:16] + data[:8] + data[16:], id="two words swapped"),
        pytest.param(lambda data: bytes([data[0] ^ 1]) + data[1:], id="a bit flipped"),
        pytest.param(lambda data: data[-8:] + data[:-8], id="everything shifted"),
        pytest.param(lambda data: data[:-1] + bytes([data[-1] ^ 128]), id="the last bit flipped"),
    ],
)
def test_no_small_change_slips_past_the_digest(
    allocator: Allocator, change: Callable[[bytes], bytes], pattern: Pattern
) -> None:
    segment = allocator.alloc(GIB + 4096 * 5)  # not a whole number of words
    content = pattern(3, segment.content_nbytes)
    allocator.write(segment, content)
    allocator.prepare()
    allocator.write(segment, change(content))
    assert allocator.sleep().bytes_copied > 0
    allocator.wake()
    assert allocator.read(segment) == change(content)


def test_after_prepare_the_first_sleep_copies_nothing(allocator: Allocator) -> None:
    segment = allocator.alloc(2 * GIB)
    allocator.write(segment, b"content")
    assert allocator.prepare().bytes_copied == 2 * GIB
    report = allocator.sleep()
    assert (report.bytes_copied, report.bytes_unchanged, report.bytes_freed) == (0, 2 * GIB, 2 * GIB)
    allocator.wake()
    assert allocator.read(segment, 0, 7) == b"content"


def test_masters_take_exactly_what_they_hold(plain: Allocator) -> None:
    """Catalogue 9: pinned sizes must not round up to a power of two."""
    for _ in range(5):
        plain.alloc(GIB + 144 * MIB)
    plain.sleep()
    host = plain.host_memory()
    assert 5 * (GIB + 144 * MIB) <= host.bytes_registered <= 1.01 * 5 * (GIB + 144 * MIB)
    assert host.bytes_used <= host.bytes_registered
    plain.wake()


def test_masters_outlive_the_wake_until_they_are_released(plain: Allocator, driver: SimulatedDriver) -> None:
    """Catalogue 11: host memory is accounted, and goes back on demand."""
    segment = plain.alloc(GIB)
    plain.sleep()
    plain.wake()
    assert plain.host_memory().bytes_used == GIB
    assert plain.release_masters() == GIB
    assert driver.bytes_registered() == 0
    plain.write(segment, b"content")
    plain.sleep()
    plain.wake()
    assert plain.read(segment, 0, 7) == b"content"


def test_masters_of_a_sleeping_tag_cannot_be_released(allocator: Allocator) -> None:
    segment = allocator.alloc(GIB)
    allocator.write(segment, b"content")
    allocator.sleep()
    assert allocator.release_masters() == 0
    allocator.wake()
    assert allocator.read(segment, 0, 7) == b"content"


def test_a_host_budget_that_is_too_small_leaves_everything_awake(driver: SimulatedDriver) -> None:
    with Allocator(host_budget_bytes=GIB, pack=False) as allocator:
        segment = allocator.alloc(2 * GIB)
        allocator.write(segment, b"content")
        with pytest.raises(api.HostMemoryExhausted) as caught:
            allocator.sleep()
        assert (caught.value.bytes_wanted, caught.value.bytes_free) == (2 * GIB, GIB)
        assert allocator.asleep_tags() == frozenset()
        assert allocator.read(segment, 0, 7) == b"content"
        allocator.sleep(level=2)


def test_tags_sleep_and_wake_on_their_own(allocator: Allocator, driver: SimulatedDriver) -> None:
    weights, cache = allocator.alloc(GIB), allocator.alloc(2 * GIB, tag="kv_cache")
    allocator.write(weights, b"content")
    assert allocator.sleep(tags=["kv_cache"]).bytes_freed == 2 * GIB
    assert allocator.asleep_tags() == {"kv_cache"}
    assert allocator.read(weights, 0, 7) == b"content"
    assert allocator.sleep().bytes_freed == GIB
    assert allocator.wake(tags=["weights"]).bytes == GIB
    assert allocator.read(weights, 0, 7) == b"content"
    with pytest.raises(api.TagAsleep):
        allocator.read(cache)
    assert allocator.wake().bytes == 2 * GIB


def test_both_devices_of_a_worker_sleep_together(allocator: Allocator, driver: SimulatedDriver) -> None:
    segments = [allocator.alloc(GIB, device=i) for i in range(2)]
    for i, segment in enumerate(segments):
        allocator.write(segment, bytes([i + 1]) * 8)
    allocator.sleep()
    assert [driver.bytes_used(i, own=True) for i in range(2)] == [0, 0]
    allocator.wake()
    assert [allocator.read(segment, 0, 1) for segment in segments] == [b"\x01", b"\x02"]


def test_double_operations_are_refused_and_change_nothing(allocator: Allocator, driver: SimulatedDriver) -> None:
    segment = allocator.alloc(GIB)
    allocator.write(segment, b"content")
    with pytest.raises(api.NotAsleep):
        allocator.wake()
    with pytest.raises(api.NotAsleep):
        allocator.wake(tags=["weights"])
    allocator.sleep()
    driver.clear_log()
    with pytest.raises(api.AlreadyAsleep):
        allocator.sleep()
    with pytest.raises(api.AlreadyAsleep):
        allocator.sleep(tags=["weights"])
    assert driver.log() == []
    allocator.wake()
    assert allocator.read(segment, 0, 7) == b"content"


def test_an_unknown_tag_or_level_changes_nothing(allocator: Allocator) -> None:
    """Upstream logs an unknown tag and answers 200 to a wake that did nothing."""
    allocator.alloc(GIB)
    allocator.sleep()
    for tags in (["wieghts"], []):
        with pytest.raises(api.UnknownTag):
            allocator.wake(tags=tags)  # type: ignore[arg-type]
    with pytest.raises(api.UsageError, match="level: 3"):
        allocator.sleep(level=3)
    assert allocator.asleep_tags() == set(api.TAGS)


def test_allocating_under_a_sleeping_tag_is_refused(allocator: Allocator) -> None:
    allocator.sleep()
    with pytest.raises(api.TagAsleep):
        allocator.alloc(GIB)
    allocator.wake()
    allocator.alloc(GIB)


def test_a_free_while_asleep_gives_back_the_address_and_the_master_alone(
    plain: Allocator, driver: SimulatedDriver
) -> None:
    """Catalogue 3: upstream unmaps what sleep has unmapped already."""
    gone, kept = plain.alloc(GIB), plain.alloc(GIB)
    plain.write(kept, b"content")
    plain.sleep()
    driver.clear_log()
    plain.free(gone)
    assert not {"cuMemUnmap", "cuMemRelease", "cuMemAddressFree"} & set(driver.log())
    with pytest.raises(api.ForeignPointer):
        plain.free(gone)
    assert plain.host_memory().bytes_used == GIB
    assert plain.wake().bytes == GIB
    assert plain.read(kept, 0, 7) == b"content"


def test_a_sleep_and_a_wake_make_few_large_driver_calls(plain: Allocator, driver: SimulatedDriver) -> None:
    """Ranks of one host contend in the driver: one access call and one unmap for a whole region."""
    with driver.faults("cuModuleGetFunction@2=500"):  # no copies by kernel, which probe the engine first
        plain.alloc(4 * GIB)
    plain.prepare()
    driver.clear_log()
    plain.sleep()
    # The weights' pool has 64 slabs; the other one is of the memory that the digests are put in.
    assert driver.log().count("cuMemUnmap") == 2
    assert driver.log().count("cuLaunchKernel") == 1
    assert driver.log().count("cuMemcpyDtoHAsync") == 1
    driver.clear_log()
    plain.wake()
    # By batches: copies into the first slabs start while the next ones are being mapped.
    batches = driver.log().count("cuMemSetAccess")
    assert 2 <= batches <= 64 // 4
    assert driver.log().count("cuMemcpyHtoDAsync") == batches


def test_weights_are_in_flight_before_the_cache_is_mapped(plain: Allocator, driver: SimulatedDriver) -> None:
    plain.alloc(GIB)
    plain.alloc(GIB, tag="kv_cache")
    plain.sleep()
    driver.clear_log()
    plain.wake()
    log = driver.log()
    last_create = len(log) - 1 - log[::-1].index("cuMemCreate")
    last_wait = len(log) - 1 - log[::-1].index("cuStreamSynchronize")
    assert log.index("cuMemcpyHtoDAsync") < last_create < last_wait
