"""`Allocator`: a thin shim over the C library. It converts units and errors, and decides nothing else."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterable
from types import TracebackType

from allocator import _native, errors
from allocator.values import (
    OFFLOADED_BY_LEVEL,
    TAGS,
    DeviceMemory,
    HostMemory,
    Segment,
    SleepReport,
    Tag,
    TagUsage,
    WakeReport,
)

_SLAB_BYTES = 256 << 20
_ALL_TAGS = (1 << len(TAGS)) - 1

# By ra_code, from 1.
_ERRORS: tuple[type[errors.AllocatorError], ...] = (
    errors.DriverMissing,
    errors.DriverError,
    errors.OutOfMemory,
    errors.UnknownTag,
    errors.AlreadyAsleep,
    errors.NotAsleep,
    errors.ForeignPointer,
    errors.InvalidSize,
    errors.HostMemoryExhausted,
    errors.TagAsleep,
    errors.Capturing,
    errors.AddressesExhausted,
    errors.RollbackFailed,
    errors.AllocatorError,
)


class Allocator:
    """Segments of device memory that sleep and wake by tag. Safe to use from several threads.

    Units: sizes of memory (`alloc`, reports, usage, errors, budgets) are in *shown* bytes, the bytes that NVML shows.
    On a GPU these are plain bytes. On a simulated box with scale 4096, a segment of 60 GiB truly holds 15 MiB:
    `Segment.content_nbytes`. `read` and `write` move true content, so their offsets and lengths are in content bytes.
    Device memory is taken in whole slabs (`slab_bytes`), and a slab is never less than the device's granularity.
    """

    def __init__(
        self,
        driver: str | os.PathLike[str] | None = None,
        *,
        slab_bytes: int = _SLAB_BYTES,
        host_budget_bytes: int | None = None,
        prefault_threads: int | None = None,
    ) -> None:
        """Load the driver: `driver`, or the one that ROTATOR_CUDA_DRIVER names, or libcuda.so.1.

        Raises LibraryMissing, DriverMissing, DriverError.
        """
        self._library = _native.library()
        self._handle = ctypes.c_void_p()
        if slab_bytes <= 0:
            raise errors.InvalidSize("slab_bytes must be positive")
        self.scale, self.simulated = 1, False
        path = None if driver is None else os.fsencode(driver)
        scale, simulated = ctypes.c_uint64(1), ctypes.c_int(0)
        self._call("ra_scale", path, ctypes.byref(scale), ctypes.byref(simulated), handle=False)
        self.scale, self.simulated = scale.value, bool(simulated.value)
        budget = 0 if host_budget_bytes is None else max(1, self._real(host_budget_bytes))
        threads = prefault_threads or min(16, os.cpu_count() or 1)
        config = _native.Config(self._real(slab_bytes), budget, threads, 0)
        self._call("ra_open", path, ctypes.byref(config), ctypes.byref(self._handle), handle=False)

    def alloc(self, nbytes: int, *, device: int = 0, tag: Tag = "weights") -> Segment:
        """A new segment of `nbytes` shown bytes. Its content is undefined.

        Raises InvalidSize, UnknownTag, TagAsleep, OutOfMemory, AddressesExhausted, DriverError.
        """
        if nbytes <= 0:
            raise errors.InvalidSize(f"a segment needs at least one byte, not {nbytes}")
        content_nbytes, index, address = self._real(nbytes), self._index(tag), ctypes.c_uint64()
        self._call("ra_alloc", content_nbytes, device, index, ctypes.byref(address))
        return Segment(address.value, nbytes, tag, device, content_nbytes)

    def free(self, segment: Segment | int, *, stream: int | None = None) -> None:
        """Give a segment (or the one at an address) back, without waiting for kernels: its memory goes when they end.

        Raises ForeignPointer.
        """
        address = segment if isinstance(segment, int) else segment.address
        self._call("ra_free", address, stream)

    def write(self, segment: Segment, data: bytes | bytearray | memoryview, offset: int = 0) -> None:
        """Copy `data` to the segment at `offset`, both in content bytes.

        Raises ForeignPointer, TagAsleep, InvalidSize, DriverError.
        """
        content = bytes(data)
        self._check_offset(offset, len(content))
        self._call("ra_write", segment.address, offset, content, len(content))

    def read(self, segment: Segment, offset: int = 0, nbytes: int | None = None) -> bytes:
        """`nbytes` content bytes from `offset`, or all the rest.

        Raises ForeignPointer, TagAsleep, InvalidSize, DriverError.
        """
        length = segment.content_nbytes - offset if nbytes is None else nbytes
        self._check_offset(offset, length)
        buffer = ctypes.create_string_buffer(max(length, 1))
        self._call("ra_read", segment.address, offset, buffer, length)
        return buffer.raw[:length]

    def sleep(self, level: int = 1, tags: Iterable[Tag] | None = None) -> SleepReport:
        """Give device memory back: of `tags`, or of every tag that is awake.

        Level 1 keeps masters of weights, runtime and cudagraph; level 2 of runtime and cudagraph. All other content is
        discarded and reads as zeros after the wake. All of it happens or, on an error, none of it.

        Raises AlreadyAsleep, UnknownTag, Capturing, HostMemoryExhausted, DriverError, RollbackFailed.
        """
        if level not in OFFLOADED_BY_LEVEL:
            raise errors.UsageError(f"no such sleep level: {level} (there are 1 and 2)")
        offload, report = self._mask(OFFLOADED_BY_LEVEL[level]), _native.Report()
        self._call("ra_sleep", self._mask(tags), offload, int(tags is not None), ctypes.byref(report))
        return self._sleep_report(report)

    def wake(self, tags: Iterable[Tag] | None = None) -> WakeReport:
        """Take device memory again for `tags`, or for every tag that sleeps, and copy the masters back.

        On any error everything stays asleep with all its masters, and a retry can succeed.
        Raises NotAsleep, UnknownTag, Capturing, OutOfMemory (with bytes wanted and free), DriverError.
        """
        report = _native.Report()
        self._call("ra_wake", self._mask(tags), int(tags is not None), ctypes.byref(report))
        copied = self._shown(report.bytes_copied)
        return WakeReport(
            seconds=report.seconds,
            map_seconds=report.map_seconds,
            copy_seconds=report.copy_seconds,
            bytes=self._shown(report.bytes_device),
            bytes_copied=copied,
            bytes_discarded=self._shown(report.bytes_discarded),
            gib_s=copied / report.seconds / (1 << 30) if report.seconds > 0 else 0.0,
        )

    def prepare(self, tags: Iterable[Tag] | None = None) -> SleepReport:
        """Take masters of awake tags (by default those that level 1 keeps) ahead of a sleep.

        Raises UnknownTag, Capturing, HostMemoryExhausted, DriverError.
        """
        report = _native.Report()
        mask = self._mask(OFFLOADED_BY_LEVEL[1] if tags is None else tags)
        self._call("ra_prepare", mask, ctypes.byref(report))
        return self._sleep_report(report)

    def release_masters(self, tags: Iterable[Tag] | None = None) -> int:
        """Give back the host memory of awake tags' masters; returns bytes. Sleeping tags keep theirs."""
        nbytes = ctypes.c_uint64()
        self._call("ra_release_masters", self._mask(tags), ctypes.byref(nbytes))
        return self._shown(nbytes.value)

    def collect(self) -> int:
        """Wait for work in flight on freed segments and return all that is free; returns bytes."""
        nbytes = ctypes.c_uint64()
        self._call("ra_collect", ctypes.byref(nbytes))
        return self._shown(nbytes.value)

    def capture_begin(self) -> None:
        """A graph capture starts somewhere in the process: until it ends, frees wait without touching the driver."""
        self._call("ra_capture", 1)

    def capture_end(self) -> None:
        self._call("ra_capture", 0)

    def asleep_tags(self) -> frozenset[Tag]:
        mask = ctypes.c_uint32()
        self._call("ra_asleep_tags", ctypes.byref(mask), error=False)
        return frozenset(tag for i, tag in enumerate(TAGS) if mask.value >> i & 1)

    def memory_usage(self) -> tuple[TagUsage, ...]:
        """One row for each tag and device that was ever allocated on."""
        rows, count = (_native.Usage * 256)(), ctypes.c_size_t()
        self._call("ra_memory_usage", rows, len(rows), ctypes.byref(count), error=False)
        return tuple(sorted((self._usage(row) for row in rows[: count.value]), key=_by_tag_and_device))

    def host_memory(self) -> HostMemory:
        usage = _native.HostUsage()
        self._call("ra_host_memory", ctypes.byref(usage), error=False)
        registered, used, budget = usage.bytes_registered, usage.bytes_used, usage.bytes_budget
        return HostMemory(self._shown(registered), self._shown(used), self._shown(budget))

    def device_memory(self, device: int = 0) -> DeviceMemory:
        """What the driver says of a whole device, all processes together. Raises DriverError."""
        free, total = ctypes.c_uint64(), ctypes.c_uint64()
        self._call("ra_device_memory", device, ctypes.byref(free), ctypes.byref(total))
        return DeviceMemory(self._shown(free.value), self._shown(total.value))

    def close(self) -> None:
        """Give everything back. Segments are gone; further calls raise."""
        handle, self._handle = self._handle, ctypes.c_void_p()
        if handle:
            self._library.ra_close(handle, None)

    def __enter__(self) -> Allocator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, name: str, *arguments: object, handle: bool = True, error: bool = True) -> None:
        if handle and not self._handle:
            raise errors.UsageError("this allocator is closed")
        function: Callable[..., int] = getattr(self._library, name)
        result = _native.Error()
        before = (self._handle,) if handle else ()
        after = (ctypes.byref(result),) if error else ()
        code = function(*before, *arguments, *after)
        if code != 0:
            raise self._error(code, result)

    def _error(self, code: int, result: _native.Error) -> errors.AllocatorError:
        kind = _ERRORS[code - 1] if 0 < code <= len(_ERRORS) else errors.AllocatorError
        wanted, free = self._shown(result.bytes_wanted), self._shown(result.bytes_free)
        message = result.message.decode(errors="replace")
        if wanted:
            message += f" (bytes wanted {wanted}, bytes free {free})"
        call = result.call.decode(errors="replace")
        return kind(message, call=call, driver_code=result.driver_code, bytes_wanted=wanted, bytes_free=free)

    def _usage(self, row: _native.Usage) -> TagUsage:
        return TagUsage(
            tag=TAGS[row.tag],
            device=row.device,
            state="asleep" if row.asleep else "awake",
            segments=row.segments,
            bytes_allocated=self._shown(row.bytes_allocated),
            bytes_mapped=self._shown(row.bytes_mapped),
            bytes_deferred=self._shown(row.bytes_deferred),
            bytes_masters=self._shown(row.bytes_masters),
        )

    def _sleep_report(self, report: _native.Report) -> SleepReport:
        return SleepReport(
            seconds=report.seconds,
            fence_seconds=report.fence_seconds,
            copy_seconds=report.copy_seconds,
            unmap_seconds=report.map_seconds,
            bytes_freed=self._shown(report.bytes_device),
            bytes_copied=self._shown(report.bytes_copied),
            bytes_unchanged=self._shown(report.bytes_unchanged),
            bytes_discarded=self._shown(report.bytes_discarded),
            bytes_held=self._shown(report.bytes_held),
        )

    @staticmethod
    def _index(tag: str) -> int:
        if tag not in TAGS:
            raise errors.UnknownTag(f"unknown tag {tag!r}: there are {', '.join(TAGS)}")
        return TAGS.index(tag)

    def _mask(self, tags: Iterable[Tag] | None) -> int:
        if tags is None:
            return _ALL_TAGS
        mask = 0
        for tag in tags:
            mask |= 1 << self._index(tag)
        if mask == 0:
            raise errors.UnknownTag(f"no tag named: there are {', '.join(TAGS)}")
        return mask

    @staticmethod
    def _check_offset(offset: int, length: int) -> None:
        if offset < 0 or length < 0:
            raise errors.InvalidSize("the copy reaches past the end of the segment")

    def _real(self, shown_bytes: int) -> int:
        return -(-shown_bytes // self.scale)

    def _shown(self, real_bytes: int) -> int:
        return real_bytes * self.scale


def _by_tag_and_device(row: TagUsage) -> tuple[int, int]:
    return TAGS.index(row.tag), row.device
