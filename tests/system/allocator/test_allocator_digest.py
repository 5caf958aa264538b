"""The digest: whatever changes in a segment changes it, so a sleep never takes a changed segment for its master."""

import ctypes
import random
import struct
from collections.abc import Callable, Iterator

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, assume, given, settings

from allocator import Allocator, Segment
from allocator.simdriver import SimulatedDriver
from tests.system.allocator.driver_calls import PAGE, Calls, digest

MIB = 1 << 20
CHUNK = 512
Change = Callable[[bytes, int, int], bytes]


def flip_a_bit(data: bytes, at: int, other: int) -> bytes:
    place = at % len(data)
    return data[:place] + bytes([data[place] ^ 1 << other % 8]) + data[place + 1 :]


def _swap(data: bytes, at: int, other: int, size: int) -> bytes:
    places = max(1, len(data) // size)
    first, second = sorted((at % places * size, other % places * size))
    if first == second:
        return data
    low, high = data[first : first + size], data[second : second + size]
    return data[:first] + high + data[first + size : second] + low + data[second + size :]


def swap_two_words(data: bytes, at: int, other: int) -> bytes:
    return _swap(data, at, other, 8)


def swap_two_chunks(data: bytes, at: int, other: int) -> bytes:
    return _swap(data, at, other, CHUNK)


def shift_a_block(data: bytes, at: int, other: int) -> bytes:
    start, by = at % len(data), other % 64 + 1
    return data[:start] + (bytes(by) + data[start:])[: len(data) - start]


def cut_off(data: bytes, at: int, other: int) -> bytes:
    kept = at % len(data)
    return data[:kept] + bytes(len(data) - kept)


CHANGES = [flip_a_bit, swap_two_words, swap_two_chunks, shift_a_block, cut_off]


def noise(seed: int, nbytes: int) -> bytes:
    return random.Random(seed).randbytes(nbytes)


def mostly_one_word(word: bytes, nbytes: int, at: int) -> bytes:
    """As in a sparse or a freshly filled tensor: runs of one value, and one place where it is another."""
    run = (word * nbytes)[:nbytes]
    place = at % nbytes
    return run[:place] + bytes([run[place] ^ 0x5A]) + run[place + 1 :]


SIZES = st.integers(2 * CHUNK + 1, 4 * CHUNK)
CONTENT = st.one_of(
    st.builds(noise, st.integers(0, 1 << 16), SIZES),
    st.builds(mostly_one_word, st.binary(min_size=8, max_size=8), SIZES, st.integers(0, 1 << 16)),
)
PLACES = st.integers(0, 1 << 16)
QUICK = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


class Kernel:
    """The digest kernel on memory of its own."""

    def __init__(self, calls: Calls) -> None:
        self.calls, self.data, self.out = calls, calls.memory(PAGE), calls.memory(PAGE)
        self.module, self.function = calls.digest_kernel()

    def __call__(self, content: bytes) -> list[int]:
        ctypes.memmove(self.data, content, len(content))
        ctypes.memset(self.out, 0, PAGE)
        assert self.calls.launch(self.function, None, self.data, len(content), CHUNK, self.out) == 0
        self.calls.ok("cuCtxSynchronize")
        words = 2 * -(-len(content) // CHUNK)
        return list(struct.unpack(f"<{words}Q", ctypes.string_at(self.out, 8 * words)))

    def close(self) -> None:
        self.calls.close()
        self.calls.ok("cuModuleUnload", self.module)


@pytest.fixture
def kernel(driver: SimulatedDriver) -> Iterator[Kernel]:
    with driver.context():
        made = Kernel(Calls(driver))
        yield made
        made.close()


@QUICK
@given(content=CONTENT)
def test_the_kernel_computes_what_the_description_says(kernel: Kernel, content: bytes) -> None:
    expected = [word for at in range(0, len(content), CHUNK) for word in digest(content[at : at + CHUNK])]
    assert kernel(content) == expected


@pytest.mark.parametrize("change", CHANGES)
@QUICK
@given(content=CONTENT, at=PLACES, other=PLACES)
def test_every_change_of_content_changes_the_digest(
    kernel: Kernel, change: Change, content: bytes, at: int, other: int
) -> None:
    changed = change(content, at, other)
    assume(changed != content)
    before, after = kernel(content), kernel(changed)
    pairs = zip(before[::2], before[1::2], after[::2], after[1::2], strict=True)
    # Either word alone tells: a collision would need both.
    assert any(a != c and b != d for a, b, c, d in pairs)


@pytest.fixture
def segment(allocator: Allocator) -> Segment:
    return allocator.alloc(48 * MIB)


@pytest.mark.parametrize("change", CHANGES)
@settings(QUICK, max_examples=20)
@given(content=CONTENT, at=PLACES, other=PLACES)
def test_a_changed_segment_never_passes_for_its_master(
    allocator: Allocator, segment: Segment, change: Change, content: bytes, at: int, other: int
) -> None:
    whole = (content * (segment.content_nbytes // len(content) + 1))[: segment.content_nbytes]
    changed = change(whole, at, other)
    allocator.write(segment, whole)
    allocator.prepare()
    allocator.write(segment, changed)
    report = allocator.sleep()
    assert (report.bytes_copied > 0) == (changed != whole)
    allocator.wake()
    assert allocator.read(segment) == changed
