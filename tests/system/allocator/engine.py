"""An allocator that stands for an engine: one of everything, on two devices, with content that is known."""

import random
import threading
import time
from collections.abc import Callable

from allocator import Allocator, Segment
from allocator.simdriver import SimulatedDriver

MIB = 1 << 20


def pattern(seed: int, nbytes: int) -> bytes:
    """Content that is easy to tell apart: by seed, and by position."""
    block = bytes((seed * 37 + i * 11) % 251 for i in range(997))
    return (block * (nbytes // len(block) + 1))[:nbytes]


# A sign, and the upper seven bits of an exponent: half of the values have the largest, a quarter the next, and so on.
_UPPER_BYTES = bytes(byte & 0x80 | (61 - (7 - (byte & 0x7F).bit_length())) for byte in range(256))


def weights_like(seed: int, nbytes: int) -> bytes:
    """bf16 values whose exponents are spread about as those of trained weights are."""
    source = random.Random(seed)
    content = bytearray(nbytes + nbytes % 2)
    content[0::2] = source.randbytes(len(content) // 2)
    content[1::2] = source.randbytes(len(content) // 2).translate(_UPPER_BYTES)
    return bytes(content[:nbytes])


def until(holds: Callable[[], bool], timeout_s: float = 30) -> None:
    deadline, pause = time.monotonic() + timeout_s, threading.Event()
    while not holds():
        assert time.monotonic() < deadline, "did not come about in time"
        pause.wait(0.001)


class Engine:
    """`kept` has masters at level 1, packed ones and others, `caches` are discarded."""

    def __init__(self, allocator: Allocator, driver: SimulatedDriver, unit_bytes: int = 80 * MIB) -> None:
        self.allocator, self.driver = allocator, driver
        self.kept: dict[Segment, bytes] = {}
        for i, (tag, device) in enumerate([("weights", 0), ("weights", 0), ("weights", 1), ("runtime", 1)]):
            segment = allocator.alloc((i + 1) * unit_bytes, device=device, tag=tag)  # type: ignore[arg-type]
            self.kept[segment] = b""
        self.caches = [allocator.alloc(2 * unit_bytes + 32 * MIB, device=device, tag="kv_cache") for device in range(2)]
        self.load(1)

    def load(self, seed: int) -> None:
        """New content everywhere: masters of the old are worth nothing."""
        for i, segment in enumerate(self.kept):
            made = weights_like if i % 2 == 0 else pattern
            self.kept[segment] = made(seed + i, segment.content_nbytes)
            self.allocator.write(segment, self.kept[segment])
        self.warm_cache()

    def warm_cache(self) -> None:
        for cache in self.caches:
            self.allocator.write(cache, b"\x07" * cache.content_nbytes)

    def intact(self) -> bool:
        return all(self.allocator.read(segment) == content for segment, content in self.kept.items())

    def cache_bytes(self) -> set[int]:
        return {byte for cache in self.caches for byte in self.allocator.read(cache)}

    def device_bytes(self) -> list[int]:
        return [self.driver.bytes_used(i, own=True) for i in range(2)]

    def held_bytes(self) -> list[int]:
        """Of both devices and of the host."""
        return [*self.device_bytes(), self.driver.bytes_registered()]

    def calls_of(self, operation: Callable[[], object]) -> list[str]:
        self.driver.clear_log()
        operation()
        return self.driver.log()

    def prepare_in_background(self) -> str | None:
        """Runs to its end; returns the error it met."""
        self.allocator.prepare(wait=False)
        until(lambda: not self.allocator.prepare_status().running)
        return self.allocator.prepare_status().error
