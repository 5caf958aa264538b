"""Masters in host memory or on disk, at the owner's word."""

from collections.abc import Callable
from pathlib import Path

import pytest

import allocator as api
from allocator import Allocator
from allocator.simdriver import SimulatedDriver

GIB = 1 << 30
Pattern = Callable[[int, int], bytes]


@pytest.fixture
def spilling(driver: SimulatedDriver, tmp_path: Path) -> Allocator:
    return Allocator(slab_bytes=64 << 20, spill_dir=tmp_path)


def test_masters_go_to_disk_when_told_and_content_survives(spilling: Allocator, pattern: Pattern) -> None:
    with spilling as allocator:
        segment = allocator.alloc(GIB)
        content = pattern(1, segment.content_nbytes)
        allocator.write(segment, content)
        allocator.place_masters("disk")
        report = allocator.sleep()
        assert report.bytes_spilled == report.bytes_copied > 0
        assert allocator.host_memory().bytes_registered == 0
        allocator.wake()
        assert allocator.read(segment) == content


def test_a_sleeper_moves_its_masters_from_host_memory_to_disk(spilling: Allocator, pattern: Pattern) -> None:
    with spilling as allocator:
        segment = allocator.alloc(GIB)
        content = pattern(2, segment.content_nbytes)
        allocator.write(segment, content)
        allocator.sleep()
        assert allocator.host_memory().bytes_used > 0
        assert allocator.place_masters("disk") == GIB
        assert (allocator.host_memory().bytes_registered, allocator.host_memory().bytes_spilled) == (0, GIB)
        assert allocator.wake().bytes_spilled == GIB
        assert allocator.read(segment) == content
        assert allocator.sleep().bytes_copied == 0, "a master on disk serves later sleeps too"


def test_masters_come_back_to_host_memory_when_told(spilling: Allocator) -> None:
    with spilling as allocator:
        segment = allocator.alloc(GIB)
        allocator.place_masters("disk")
        allocator.place_masters("host")
        allocator.write(segment, b"anew")
        assert allocator.sleep().bytes_spilled == 0


def test_disk_without_a_directory_is_refused_with_what_to_do(allocator: Allocator) -> None:
    with pytest.raises(api.HostMemoryExhausted, match="spill directory"):
        allocator.place_masters("disk")
    with pytest.raises(api.UsageError, match="'host' or 'disk'"):
        allocator.place_masters("attic")  # type: ignore[arg-type]
