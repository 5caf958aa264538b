"""The values that go in and out of an `Allocator`. All bytes are shown bytes unless a name says otherwise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Tag = Literal["weights", "kv_cache", "runtime", "workspace", "cudagraph"]

# In the order of `ra_tag` in csrc/api.h.
TAGS: tuple[Tag, ...] = ("weights", "kv_cache", "runtime", "workspace", "cudagraph")

# What a level keeps a master of. Everything else that sleeps is discarded.
OFFLOADED_BY_LEVEL: dict[int, frozenset[Tag]] = {
    1: frozenset({"weights", "runtime", "cudagraph"}),
    2: frozenset({"runtime", "cudagraph"}),
}


@dataclass(frozen=True, slots=True)
class Segment:
    """One block of device memory. `content_nbytes` is how many bytes it truly holds: `nbytes` on a GPU, and `nbytes`
    over the box's scale, rounded up, on a simulated one."""

    address: int
    nbytes: int
    tag: Tag
    device: int
    content_nbytes: int


@dataclass(frozen=True, slots=True)
class SleepReport:
    """What a sleep (or a prepare) did, and what each phase took.

    `bytes_unchanged` equalled their master and were not copied; `bytes_copied` were, `bytes_spilled` of them to disk.
    `bytes_kept` sleep but still are on the device, because no more was wanted back. `bytes_held` are unmapped, but the
    driver refused to take them back: `Allocator.collect` tries again.
    """

    seconds: float
    fence_seconds: float
    digest_seconds: float
    host_seconds: float
    copy_seconds: float
    unmap_seconds: float
    release_seconds: float
    bytes_freed: int
    bytes_copied: int
    bytes_spilled: int
    bytes_unchanged: int
    bytes_discarded: int
    bytes_kept: int
    bytes_held: int


@dataclass(frozen=True, slots=True)
class WakeReport:
    """What a wake did. `bytes` is the device memory taken, `bytes_copied` what came from masters (`bytes_spilled` of it
    from disk), and `gib_s` the latter over the whole wake's seconds."""

    seconds: float
    map_seconds: float
    copy_seconds: float
    bytes: int
    bytes_copied: int
    bytes_spilled: int
    bytes_discarded: int
    gib_s: float


@dataclass(frozen=True, slots=True)
class PrepareStatus:
    """How far masters being taken in the background are. `error` says why the last time ended early, else None."""

    running: bool
    bytes_done: int
    bytes_total: int
    seconds: float
    error: str | None


@dataclass(frozen=True, slots=True)
class TagUsage:
    """One tag on one device. `tag` is "staging" for the allocator's own memory while an operation runs.

    `bytes_mapped` are the device's bytes held for it, `bytes_peak` the most there ever were; `bytes_deferred` were
    freed and wait for work in flight or for their registration to end. Masters are in host memory (`bytes_masters`) or
    on disk (`bytes_spilled`).
    """

    tag: Tag | Literal["staging"]
    device: int
    state: Literal["awake", "asleep"]
    segments: int
    bytes_allocated: int
    bytes_mapped: int
    bytes_peak: int
    bytes_deferred: int
    bytes_masters: int
    bytes_spilled: int


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Host memory for masters. `bytes_budget` is 0 when unbounded; `bytes_limit` is what could be registered in all, as
    the budget, memlock, the control group and free memory stand now."""

    bytes_registered: int
    bytes_used: int
    bytes_budget: int
    bytes_shared_used: int
    bytes_limit: int
    bytes_spilled: int


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    bytes_free: int
    bytes_total: int
