"""A rank's memory on a device, held through our own allocator: real segments, real sleeps, on the simulated driver."""

import os

from allocator import Allocator, errors
from allocator.values import Segment, Tag
from rotator.demo.memory import KV, TAGS, WEIGHTS, DeviceFault, OutOfDeviceMemory

_RESIDUE_SLAB_BYTES = 16 << 20


class AllocatorMemory:
    """One rank on one device. Bytes are shown bytes; the content that can be read and written is as much as the
    simulated device really holds of them."""

    def __init__(self, *, device: int, weights_bytes: int, kv_bytes: int, residue_bytes: int) -> None:
        """Take the memory, content undefined. Raises OutOfDeviceMemory, DeviceFault."""
        self._device = device
        self._residue: list[Segment] = []
        try:
            self._sleepable = Allocator()
            self._lasting = Allocator(slab_bytes=_RESIDUE_SLAB_BYTES)
            if residue_bytes > 0:
                self.grow_residue(residue_bytes)
            self._segments: dict[str, Segment] = {
                WEIGHTS: self._sleepable.alloc(weights_bytes, device=device, tag="weights"),
                KV: self._sleepable.alloc(kv_bytes, device=device, tag="kv_cache"),
            }
        except errors.AllocatorError as e:
            raise _fault(e) from e

    def content_bytes(self, tag: str) -> int:
        return self._segments[tag].content_nbytes

    def write(self, tag: str, offset: int, data: bytes) -> None:
        try:
            self._sleepable.write(self._segments[tag], data, offset)
        except errors.AllocatorError as e:
            raise _fault(e) from e

    def read(self, tag: str, offset: int, size: int) -> bytes:
        try:
            return self._sleepable.read(self._segments[tag], offset, size)
        except errors.AllocatorError as e:
            raise _fault(e) from e

    def sleep(self, level: int) -> None:
        try:
            self._sleepable.sleep(level)
        except errors.AllocatorError as e:
            raise _fault(e) from e

    def free(self, size: int) -> None:
        try:
            self._sleepable.sleep(1, bytes_wanted=size)
        except errors.AllocatorError as e:
            raise _fault(e) from e

    def wake(self, tags: frozenset[str]) -> None:
        due: list[Tag] = [tag for tag in self._sleepable.asleep_tags() if tag in tags]
        if not due:
            return
        try:
            self._sleepable.wake(due)
        except errors.AllocatorError as e:
            raise _fault(e) from e

    def asleep(self) -> frozenset[str]:
        return TAGS & self._sleepable.asleep_tags()

    def grow_residue(self, size: int) -> None:
        try:
            self._residue.append(self._lasting.alloc(size, device=self._device, tag="runtime"))
        except errors.AllocatorError as e:
            raise _fault(e) from e

    def close(self) -> None:
        self._sleepable.close()
        self._lasting.close()


def ordinals(gpus: tuple[int, ...]) -> tuple[int, ...]:
    """The driver's device numbers for these GPU indices: what CUDA_VISIBLE_DEVICES leaves is counted from 0."""
    if os.environ.get("CUDA_VISIBLE_DEVICES"):
        return tuple(range(len(gpus)))
    return gpus


def _fault(error: errors.AllocatorError) -> DeviceFault:
    if isinstance(error, errors.OutOfMemory):
        return OutOfDeviceMemory(f"CUDA out of memory: {error}")
    if isinstance(error, errors.TagAsleep):
        return DeviceFault(f"CUDA error: an illegal memory access was encountered ({error})")
    return DeviceFault(f"CUDA error: {error}")
