"""`TorchAllocator`: torch tensors in memory that sleeps. torch is imported when the first region opens, not before.

    memory = allocator.TorchAllocator()
    with memory.region("weights"):
        model = build()
    memory.prepare()  # masters now, so that the first sleep copies nothing
    memory.sleep()
    memory.wake()

What it relies on in torch (2.10 or newer, checked when the first region opens):

- A region is one `torch.cuda.MemPool` over the C function of its tag, so a segment's tag cannot change with what the
  thread does later. Routing is per thread: tensors that another thread makes meanwhile are not in the region.
- When a region ends its pool object is dropped, its tensors live on. torch then gives back what the pool had cached,
  and later, on `empty_cache`, what dies after. Without that a loader's temporaries would stay for ever.
- torch keeps a bare pointer to a pool's allocator object, so ours are never destroyed.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import TracebackType
from typing import Any, Literal, Protocol

from allocator import _native
from allocator.core import Allocator
from allocator.errors import (
    AllocatorError,
    Capturing,
    NestedRegion,
    OutOfMemory,
    TagAsleep,
    TorchUnsupported,
    UnknownTag,
    UsageError,
)
from allocator.torch_settings import Settings
from allocator.values import TAGS, HostMemory, PrepareStatus, SleepReport, Tag, TagUsage, WakeReport

TORCH_MIN = (2, 10)
_PROBE_BYTES = 512


class Memory(Protocol):
    """What this file and the plugin ask of an `allocator.Allocator`."""

    def sleep(
        self, level: int = 1, tags: Iterable[Tag] | None = None, *, bytes_wanted: int | None = None
    ) -> SleepReport: ...
    def wake(self, tags: Iterable[Tag] | None = None) -> WakeReport: ...
    def prepare(self, tags: Iterable[Tag] | None = None, *, wait: bool) -> SleepReport | None: ...
    def prepare_status(self) -> PrepareStatus: ...
    def discard(self, tags: Iterable[Tag]) -> SleepReport: ...
    def release_masters(self, tags: Iterable[Tag] | None = None) -> int: ...
    def place_masters(self, where: Literal["host", "disk"]) -> int: ...
    def collect(self) -> int: ...
    def capture_begin(self) -> None: ...
    def capture_end(self) -> None: ...
    def asleep_tags(self) -> frozenset[Tag]: ...
    def memory_usage(self) -> tuple[TagUsage, ...]: ...
    def host_memory(self) -> HostMemory: ...
    def close(self) -> None: ...


class _Pool:
    """A torch pool that goes when we say so. torch asks a pool for its id only; frames and tracebacks that hold on to
    this object must not keep the true one, whose end inside another region would abort the process."""

    def __init__(self, held: Any) -> None:
        self.held: Any = held
        self.id: tuple[int, int] = held.id


class TorchAllocator:
    """Regions, graph pools and sleep for torch. One at a time in a process: torch's functions serve one allocator."""

    def __init__(self, memory: Memory | None = None, *, trim: bool = True) -> None:
        """Serve `memory`, or a new `Allocator`. `trim=False` keeps the pools of ended regions and what they cached.

        Raises UsageError when another one serves torch in this process, and what `Allocator` raises.
        """
        self.memory: Memory = Allocator() if memory is None else memory
        _bind(self.memory)
        self._trims = trim
        self._torch: Any = None
        self._functions: dict[str, Any] = {}
        self._retired: list[_Pool] = []
        self._graph_pool: _Pool | None = None
        self._nests: bool | None = None
        self._regions = threading.local()
        self._lock = threading.RLock()
        self._busy = 0  # open regions and captures, of all threads
        self._uncapture: Callable[[], None] | None = None
        self._closed = False
        atexit.register(_close_at_exit, weakref.ref(self))

    # -- where tensors go --

    @contextmanager
    def region(self, tag: Tag = "weights", *, mixed: bool = False) -> Iterator[None]:
        """Tensors that this thread makes inside belong to `tag`. Regions nest, also within their own tag.

        `mixed` is for a kv_cache region in which other things are made too: tensors of up to 10 MiB get the tag runtime
        and so are kept by every sleep.

        Raises UnknownTag, TagAsleep, NestedRegion (this torch would use the outer pool), TorchUnsupported.
        """
        self._check_tag(tag)
        if mixed and tag != "kv_cache":
            raise UsageError("only a kv_cache region can be mixed")
        if mixed:
            self._check_tag("runtime")
        torch = self._open_torch()
        pool = _Pool(torch.cuda.MemPool(self._function(f"{tag}_mixed" if mixed else tag).allocator()))
        depth = getattr(self._regions, "depth", 0)
        try:
            with self._expandable.without_expandable_segments(), self._routed(torch, pool, depth):
                yield
        finally:
            self._retired.append(pool)
            self.trim()

    @contextmanager
    def _routed(self, torch: Any, pool: _Pool, depth: int) -> Iterator[None]:
        self._regions.depth = depth + 1
        self._enter()
        try:
            # A capture keeps the pools that it meets (torch 2.14), so it must meet the true one.
            with torch.cuda.use_mem_pool(pool.held if torch.cuda.is_current_stream_capturing() else pool):
                if depth:
                    self._check_nesting(torch, pool)
                yield
        finally:
            self._leave()
            self._regions.depth = depth

    @contextmanager
    def graph_pool(self) -> Iterator[tuple[int, int]]:
        """The id of the pool for CUDA graphs, for `torch.cuda.graph(graph, pool=...)`. What a capture allocates in it
        has the tag `cudagraph`, which every sleep keeps. One pool for all graphs, as they share it while they replay.

        Raises TagAsleep, TorchUnsupported.
        """
        self._check_tag("cudagraph")
        torch = self._open_torch()
        if self._graph_pool is None:
            self._graph_pool = _Pool(torch.cuda.MemPool(self._function("cudagraph").allocator()))
        with self._expandable.without_expandable_segments():
            yield self._graph_pool.id

    def trim(self) -> int:
        """Give back what ended regions have cached and nothing uses; returns bytes. Waits for work in flight on it."""
        if self._trims:
            self._drop_retired()
        try:
            return self.memory.collect()
        except Capturing:  # a capture holds some of it: the next call gives it back
            return 0

    def release_pools(self) -> None:
        """Let go of every pool, those of graphs too. Memory goes back as its tensors and graphs die. Safe to repeat."""
        if self._graph_pool is not None:
            self._retired.append(self._graph_pool)
            self._graph_pool = None
        self._drop_retired()
        gc.collect()
        if self._torch is not None and self._torch.cuda.is_initialized():
            self._torch.cuda.empty_cache()
        self.memory.collect()

    # -- sleep and wake --

    def sleep(
        self,
        level: int = 1,
        tags: Iterable[Tag] | None = None,
        *,
        bytes_wanted: int | None = None,
        full_gc: bool = False,
    ) -> SleepReport:
        """Give device memory back, see `Allocator.sleep`. Dead tensors go first, so that nobody keeps masters of them.

        They are looked for among young objects only, unless `full_gc`: a full collection takes 0.06 s with torch alone,
        and tenths of a second in a large process, which is longer than a sleep. Raises what `Allocator.sleep` raises,
        and torch's error when work in flight had failed.
        """
        self.synchronize()
        self.drop_dead(full_gc=full_gc)
        if bytes_wanted is None:
            return self.memory.sleep(level, tags)
        return self.memory.sleep(level, tags, bytes_wanted=bytes_wanted)

    def wake(self, tags: Iterable[Tag] | None = None) -> WakeReport:
        """Take it again, see `Allocator.wake`. Tries once more without torch's cache when the device is too full."""
        wanted = None if tags is None else tuple(tags)
        try:
            return self.memory.wake(wanted)
        except OutOfMemory:
            self.drop_dead(full_gc=True)
            return self.memory.wake(wanted)

    def prepare(self, tags: Iterable[Tag] | None = None, *, wait: bool = True) -> SleepReport | None:
        """Take masters ahead of the first sleep, see `Allocator.prepare`. `wait=False` returns at once with None."""
        return self.memory.prepare(tags, wait=True) if wait else self.memory.prepare(tags, wait=False)

    def prepare_status(self) -> PrepareStatus:
        return self.memory.prepare_status()

    def discard(self, tags: Iterable[Tag]) -> SleepReport:
        """Give the device memory of awake tags back without masters; they are asleep after, and wake as zeros."""
        self.synchronize()
        return self.memory.discard(tags)

    def release_masters(self, tags: Iterable[Tag] | None = None) -> int:
        return self.memory.release_masters(tags)

    def place_masters(self, where: Literal["host", "disk"]) -> int:
        """Where masters go from now on; "disk" moves those there are, see `Allocator.place_masters`."""
        return self.memory.place_masters(where)

    def asleep_tags(self) -> frozenset[Tag]:
        return self.memory.asleep_tags()

    def memory_usage(self) -> tuple[TagUsage, ...]:
        return self.memory.memory_usage()

    def host_memory(self) -> HostMemory:
        return self.memory.host_memory()

    def synchronize(self) -> None:
        """Wait for all work on the devices in use. Raises torch's error when some of it had failed."""
        if self._torch is not None and self._torch.cuda.is_initialized():
            for device in sorted({row.device for row in self.memory.memory_usage()}):
                self._torch.cuda.synchronize(device)

    def drop_dead(self, *, full_gc: bool = True) -> int:
        """Collect garbage and empty torch's cache; returns the bytes of ours that went."""
        gc.collect(2 if full_gc else 1)
        if self._trims:
            self._drop_retired()
        if self._torch is not None and self._torch.cuda.is_initialized():
            self._torch.cuda.empty_cache()
        return self.trim()

    # -- the end --

    def close(self) -> None:
        """Drop the pools, then the allocator with all its memory: tensors in it are unusable after. Safe to repeat."""
        if self._closed:
            return
        self._closed = True
        self._let_go()
        self.memory.close()

    def __enter__(self) -> TorchAllocator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _let_go(self) -> None:
        self.synchronize()
        self.release_pools()
        if self._uncapture is not None:
            self._uncapture()
            self._uncapture = None

    def at_exit(self) -> None:
        """Pools before the allocator (pytorch#145168). The allocator itself stays while tensors live, for they are
        freed after this; unless its background thread runs, which must not outlive the interpreter."""
        if self._closed:
            return
        self._closed = True
        self._let_go()
        idle = not any(row.segments for row in self.memory.memory_usage())
        if idle or self.memory.prepare_status().running:
            self.memory.close()

    # -- torch --

    def _open_torch(self) -> Any:
        """torch, once it is known to do what a region needs. Raises TorchUnsupported, UsageError."""
        if self._closed:
            raise UsageError("this allocator is closed")
        if self._torch is None:
            torch = _import_torch()
            _check_torch(torch)
            torch.cuda.current_device()  # opens the device: pools need it
            self._expandable = Settings(torch)
            self._uncapture = _bracket_captures(torch, self._capture_begins, self._capture_ended)
            self._torch = torch
        return self._torch

    def _enter(self) -> None:
        with self._lock:
            self._busy += 1

    def _leave(self) -> None:
        with self._lock:
            self._busy -= 1

    def _drop_retired(self) -> None:
        # torch aborts the process when a pool goes while any thread allocates from one or captures.
        with self._lock:
            if self._busy == 0:
                for pool in self._retired:
                    pool.held = None
                self._retired.clear()

    def _capture_begins(self) -> None:
        self._enter()
        self.memory.capture_begin()

    def _capture_ended(self) -> None:
        self.memory.capture_end()
        self._leave()

    def _function(self, name: str) -> Any:
        function = self._functions.get(name)
        if function is None:
            path = str(_native.library_path("librotator_alloc.so"))
            function = self._torch.cuda.memory.CUDAPluggableAllocator(path, f"rotator_malloc_{name}", "rotator_free")
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(function))  # torch has a bare pointer to it until the very end
            self._functions[name] = function
        return function

    def _check_tag(self, tag: Tag) -> None:
        if tag not in TAGS:
            raise UnknownTag(f"unknown tag {tag!r}: there are {', '.join(TAGS)}")
        if tag in self.memory.asleep_tags():
            raise TagAsleep(f"{tag} is asleep: wake it before more is allocated under it")

    def _check_nesting(self, torch: Any, pool: _Pool) -> None:
        """Ask this torch which of two nested pools it uses: releases differ. The answer is asked for once."""
        if self._nests is None:
            probe = torch.empty(_PROBE_BYTES, dtype=torch.uint8, device="cuda")
            address = probe.data_ptr()
            segments = ((segment["address"], segment["total_size"]) for segment in pool.held.snapshot())
            self._nests = any(start <= address < start + size for start, size in segments)
        if not self._nests:
            raise NestedRegion(
                f"torch {torch.__version__} allocates from the outermost of nested pools, so this region's tensors "
                "would sleep as the outer one's: end that region first, or use a newer torch"
            )


def _bind(memory: Memory) -> None:
    """Have torch's functions serve this allocator. Raises UsageError when they serve another."""
    handle = getattr(memory, "_handle", None)
    if handle is not None and _native.library().ra_torch_bind(handle) != 0:
        raise UsageError("another allocator serves torch in this process: close it first")


def _import_torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise TorchUnsupported("torch is not installed here") from error
    return torch


def _check_torch(torch: Any) -> None:
    """Raises TorchUnsupported with what to do."""
    release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if release < TORCH_MIN:
        raise TorchUnsupported(
            f"torch {torch.__version__} is too old for memory pools that can be given back: use 2.10"
        )
    if torch.version.cuda is None or not torch.cuda.is_available():
        raise TorchUnsupported("torch sees no CUDA device")
    backend = torch.cuda.memory.get_allocator_backend()
    if backend != "native":
        raise TorchUnsupported(f"torch's allocator backend {backend} has no memory pools: start without `backend:`")


def _bracket_captures(torch: Any, begins: Callable[[], None], ended: Callable[[], None]) -> Callable[[], None]:
    """Tell of every graph capture, whoever makes it: recording a fence would spoil it. Returns what undoes this."""
    graph = torch.cuda.CUDAGraph
    begin, end = graph.capture_begin, graph.capture_end

    @wraps(begin)
    def capture_begin(self: Any, *args: Any, **kwargs: Any) -> Any:
        begins()
        try:
            return begin(self, *args, **kwargs)
        except BaseException:
            ended()
            raise

    @wraps(end)
    def capture_end(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return end(self, *args, **kwargs)
        finally:
            ended()

    def undo() -> None:
        graph.capture_begin, graph.capture_end = begin, end

    graph.capture_begin, graph.capture_end = capture_begin, capture_end
    return undo


def _close_at_exit(reference: weakref.ref[TorchAllocator]) -> None:
    allocator = reference()
    if allocator is None:
        return
    try:
        allocator.at_exit()
    except (AllocatorError, RuntimeError):  # the process ends: its exit code must not say otherwise
        return
