"""`Allocator`: a thin shim over the C library. It converts units and errors, and decides nothing else."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Literal, overload

from allocator import _native, errors
from allocator.values import (
    OFFLOADED_BY_LEVEL,
    TAGS,
    DeviceMemory,
    HostMemory,
    PrepareStatus,
    Segment,
    SleepReport,
    Tag,
    TagUsage,
    WakeReport,
)

# Larger handles cost more to create, smaller ones more to map and unmap: docs/allocator.md.
_SLAB_BYTES = 256 << 20
# Masters are compared and copied by so much: large enough for the link's full speed, small enough for staging.
_CHUNK_BYTES = 32 << 20
# Of the time, so that serving loses no more than 2 %: docs/allocator.md.
_LINK_SHARE = 0.1
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
    errors.Registered,
    errors.MasterLost,
    errors.BudgetFileError,
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
        chunk_bytes: int = _CHUNK_BYTES,
        host_budget_bytes: int | None = None,
        spill_dir: str | os.PathLike[str] | None = None,
        budget_file: str | os.PathLike[str] | None = None,
        prefault_threads: int | None = None,
        link_share: float = _LINK_SHARE,
        digest: bool = True,
        pack: bool = True,
    ) -> None:
        """Load the driver: `driver`, or the one that ROTATOR_CUDA_DRIVER names, or libcuda.so.1.

        slab_bytes: the largest single piece of device memory.
        chunk_bytes: masters are compared and copied by so much.
        host_budget_bytes: bound on host memory for masters.
        spill_dir: where masters go that do not fit host memory.
        budget_file: a bound that processes share; its first line is `rotator-host-budget 1 <bytes>`.
        link_share: the part of the time, above 0 and up to 1, that a prepare in the background may be busy.
        digest: False makes every sleep copy.
        pack: masters of bf16 weights take about 0.7 of their bytes, without loss; False takes all as they are.

        Raises LibraryMissing, DriverMissing, DriverError, InvalidSize, HostMemoryExhausted, BudgetFileError.
        """
        self._library = _native.library()
        self._handle = ctypes.c_void_p()
        if slab_bytes <= 0 or chunk_bytes <= 0:
            raise errors.InvalidSize("slab_bytes and chunk_bytes must be positive")
        if not 0 < link_share <= 1:
            raise errors.UsageError(f"link_share is a part of the time, above 0 and up to 1, not {link_share}")
        self.scale, self.simulated = 1, False
        path = None if driver is None else os.fsencode(driver)
        scale, simulated = ctypes.c_uint64(1), ctypes.c_int(0)
        self._call("ra_scale", path, ctypes.byref(scale), ctypes.byref(simulated), handle=False)
        self.scale, self.simulated = scale.value, bool(simulated.value)
        self._check_budget(host_budget_bytes)
        config = _native.Config(
            slab_bytes=self._real(slab_bytes),
            chunk_bytes=self._real(chunk_bytes),
            host_budget_bytes=0 if host_budget_bytes is None else max(1, self._real(host_budget_bytes)),
            prefault_threads=prefault_threads or min(16, os.cpu_count() or 1),
            use_digest=int(digest),
            use_packing=int(pack),
            link_share_permille=max(1, round(link_share * 1000)),
            spill_directory=None if spill_dir is None else os.fsencode(spill_dir),
            budget_file=None if budget_file is None else os.fsencode(budget_file),
        )
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

    def sleep(
        self, level: int = 1, tags: Iterable[Tag] | None = None, *, bytes_wanted: int | None = None
    ) -> SleepReport:
        """Give device memory back: of `tags`, or of every tag that is awake.

        Level 1 keeps masters of weights, runtime and cudagraph; level 2 of runtime and cudagraph. All other content is
        discarded and reads as zeros after the wake. All of it happens or, on an error, none of it.

        bytes_wanted: give back at least so much on each device (or all there is), what is cheapest to restore first:
        discarded tags, then the weights. All the tags sleep, but what was not wanted stays on the device with its
        content, costs the wake nothing, and can be had by another sleep.

        Raises AlreadyAsleep, UnknownTag, Registered, Capturing, HostMemoryExhausted, DriverError, RollbackFailed.
        """
        self._check_level(level)
        if bytes_wanted is not None and bytes_wanted <= 0:
            raise errors.InvalidSize(f"bytes_wanted must be positive, not {bytes_wanted}: leave it out for everything")
        wanted = 0 if bytes_wanted is None else self._real(bytes_wanted)
        offload, report = self._mask(OFFLOADED_BY_LEVEL[level]), _native.Report()
        self._call("ra_sleep", self._mask(tags), offload, int(tags is not None), wanted, ctypes.byref(report))
        return self._sleep_report(report)

    def discard(self, tags: Iterable[Tag]) -> SleepReport:
        """Give the device memory of `tags` back and forget its content: it reads as zeros after the wake.

        Raises as `sleep`.
        """
        report = _native.Report()
        self._call("ra_sleep", self._mask(tags), 0, 1, 0, ctypes.byref(report))
        return self._sleep_report(report)

    def wake(self, tags: Iterable[Tag] | None = None) -> WakeReport:
        """Take device memory again for `tags`, or for every tag that sleeps, and copy the masters back.

        On any error everything stays asleep with all its masters, and a retry can succeed.
        Raises NotAsleep, UnknownTag, Capturing, OutOfMemory (with bytes wanted and free), MasterLost, DriverError.
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
            bytes_spilled=self._shown(report.bytes_spilled),
            bytes_discarded=self._shown(report.bytes_discarded),
            gib_s=copied / report.seconds / (1 << 30) if report.seconds > 0 else 0.0,
        )

    @overload
    def prepare(self, tags: Iterable[Tag] | None = None, *, wait: Literal[True] = True) -> SleepReport: ...
    @overload
    def prepare(self, tags: Iterable[Tag] | None = None, *, wait: bool) -> SleepReport | None: ...
    def prepare(self, tags: Iterable[Tag] | None = None, *, wait: bool = True) -> SleepReport | None:
        """Take masters of awake tags (by default those that level 1 keeps) ahead of a sleep.

        wait=True: now, at the link's full speed, with the device's work finished first. wait=False: in the background
        while kernels run, at `link_share` of the link and the lowest priority; returns None at once, see
        `prepare_status`. A sleep in the meantime takes what is missing.

        Raises UnknownTag, Capturing, HostMemoryExhausted, DriverError (wait=False: only UnknownTag).
        """
        mask = self._mask(OFFLOADED_BY_LEVEL[1] if tags is None else tags)
        if not wait:
            self._call("ra_prepare_start", mask)
            return None
        report = _native.Report()
        self._call("ra_prepare", mask, ctypes.byref(report))
        return self._sleep_report(report)

    def prepare_status(self) -> PrepareStatus:
        """How far `prepare(wait=False)` is."""
        state = _native.PrepareState()
        self._call("ra_prepare_status", ctypes.byref(state), error=False)
        error = state.message.decode(errors="replace") if state.code else None
        done, total = self._shown(state.bytes_done), self._shown(state.bytes_total)
        return PrepareStatus(bool(state.running), done, total, state.seconds, error)

    def pin(self, segment: Segment | int) -> None:
        """The memory (at an address anywhere in a segment) is registered for IPC or RDMA, which no fence sees: until
        `unpin` was called as often, it does not sleep and, when freed, stays mapped.

        Raises ForeignPointer, TagAsleep.
        """
        self._call("ra_pin", segment if isinstance(segment, int) else segment.address)

    def unpin(self, segment: Segment | int) -> None:
        """The registration has ended. Raises ForeignPointer, Registered (when it is not pinned)."""
        self._call("ra_unpin", segment if isinstance(segment, int) else segment.address)

    def place_masters(self, where: Literal["host", "disk"]) -> int:
        """Where masters go from now on. "disk" also moves those there are out of host memory; returns the bytes moved.

        Raises UsageError, HostMemoryExhausted (no spill directory, or it is full; what was not moved is as it was).
        """
        if where not in ("host", "disk"):
            raise errors.UsageError(f"masters go to 'host' or 'disk', not to {where!r}")
        moved = ctypes.c_uint64()
        self._call("ra_place_masters", int(where == "disk"), ctypes.byref(moved))
        return self._shown(moved.value)

    def set_host_budget(self, nbytes: int | None) -> None:
        """Bound host memory for masters from now on (None: no bound); those taken stay. Raises InvalidSize."""
        self._check_budget(nbytes)
        self._call("ra_set_host_budget", 0 if nbytes is None else max(1, self._real(nbytes)))

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
        return HostMemory(
            bytes_registered=self._shown(usage.bytes_registered),
            bytes_used=self._shown(usage.bytes_used),
            bytes_budget=self._shown(usage.bytes_budget),
            bytes_shared_used=self._shown(usage.bytes_shared_used),
            bytes_limit=self._shown(usage.bytes_limit),
            bytes_spilled=self._shown(usage.bytes_spilled),
        )

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
            tag=TAGS[row.tag] if row.tag < len(TAGS) else "staging",
            device=row.device,
            state="asleep" if row.asleep else "awake",
            segments=row.segments,
            bytes_allocated=self._shown(row.bytes_allocated),
            bytes_mapped=self._shown(row.bytes_mapped),
            bytes_peak=self._shown(row.bytes_peak),
            bytes_deferred=self._shown(row.bytes_deferred),
            bytes_masters=self._shown(row.bytes_masters),
            bytes_spilled=self._shown(row.bytes_spilled),
        )

    def _sleep_report(self, report: _native.Report) -> SleepReport:
        return SleepReport(
            seconds=report.seconds,
            fence_seconds=report.fence_seconds,
            digest_seconds=report.digest_seconds,
            host_seconds=report.host_seconds,
            copy_seconds=report.copy_seconds,
            unmap_seconds=report.map_seconds,
            release_seconds=report.release_seconds,
            bytes_freed=self._shown(report.bytes_device),
            bytes_copied=self._shown(report.bytes_copied),
            bytes_spilled=self._shown(report.bytes_spilled),
            bytes_unchanged=self._shown(report.bytes_unchanged),
            bytes_discarded=self._shown(report.bytes_discarded),
            bytes_kept=self._shown(report.bytes_kept),
            bytes_held=self._shown(report.bytes_held),
        )

    @staticmethod
    def _check_level(level: int) -> None:
        if level not in OFFLOADED_BY_LEVEL:
            raise errors.UsageError(f"no such sleep level: {level} (there are 1 and 2)")

    @staticmethod
    def _check_budget(nbytes: int | None) -> None:
        if nbytes is not None and nbytes < 0:
            raise errors.InvalidSize(f"a host budget cannot be negative: {nbytes}; None means no bound")

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
    return len(TAGS) if row.tag == "staging" else TAGS.index(row.tag), row.device
