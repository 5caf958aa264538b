"""What vLLM calls in place of its CuMemAllocator, in every release from 0.19 to 0.33.

The calls and their callers are listed in docs/allocator-vllm.md. Behaviour is stock's wherever we add nothing: what a
level keeps, which tags a wake restores, that a second sleep or wake of the same tags does nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Final

from allocator.errors import AlreadyAsleep, NotAsleep
from allocator.torch_api import TorchAllocator
from allocator.values import SleepReport, Tag, WakeReport

logger = logging.getLogger("vllm.rotator_allocator")

# A wake by tag may leave only these asleep; every other tag comes back with any wake (vLLM 0.32 and newer ask for it,
# older ones have no other tags).
_DEFERRABLE: Final[frozenset[Tag]] = frozenset({"weights", "kv_cache"})
_TAGS: Final[dict[str, Tag]] = {
    "weights": "weights",
    "kv_cache": "kv_cache",
    "runtime": "runtime",
    "workspace": "workspace",
    "cudagraph": "cudagraph",
    "default": "runtime",  # stock's tag of a pool without one: kept at every level
}


class VllmAllocator:
    """Stands in `CuMemAllocator.instance`."""

    default_tag = "default"

    def __init__(self, torch_allocator: TorchAllocator, *, mixes_kv_cache: bool = False) -> None:
        """`mixes_kv_cache`: this release makes other tensors in the kv_cache pool too (vllm#53508)."""
        self.torch, self.mixes_kv_cache = torch_allocator, mixes_kv_cache
        self.last_sleep: SleepReport | None = None
        self.last_wake: WakeReport | None = None
        self.wall_s: dict[str, float] = {}  # of the last sleep and wake, torch's part included

    def use_memory_pool(self, tag: str | None = None) -> AbstractContextManager[None]:
        ours = _tag(tag or self.default_tag)
        return self.torch.region(ours, mixed=ours == "kv_cache" and self.mixes_kv_cache)

    @contextmanager
    def cudagraph_pool(self) -> Iterator[tuple[int, int]]:
        with self.torch.graph_pool() as pool:
            yield pool

    def sleep(self, offload_tags: Iterable[str] | str | None = None) -> None:
        """Everything sleeps. Weights are kept when they are among `offload_tags`; runtime and cudagraph always are."""
        offload = (self.default_tag,) if offload_tags is None else offload_tags
        offload = (offload,) if isinstance(offload, str) else tuple(offload)
        level = 1 if "weights" in offload else 2
        try:
            with self._timed("sleep"):
                self.last_sleep = self.torch.sleep(level, full_gc=False)  # a full one came after warm-up
        except AlreadyAsleep:
            logger.info("rotator: sleep: everything was asleep already")
            return
        _log("sleep", self.last_sleep)

    def sleep_bytes(self, bytes_wanted: int) -> SleepReport:
        """Give back at least so many bytes a device, KV cache first; the rest stays mapped and warm."""
        with self._timed("sleep"):
            self.last_sleep = self.torch.sleep(1, bytes_wanted=bytes_wanted, full_gc=False)
        _log("sleep by bytes", self.last_sleep)
        return self.last_sleep

    def wake_up(self, tags: Iterable[str] | None = None) -> None:
        named = None if tags is None else {_tag(tag) for tag in tags}
        wanted = {tag for tag in self.torch.asleep_tags() if named is None or tag in named or tag not in _DEFERRABLE}
        try:
            if named is not None and not wanted:
                raise NotAsleep("none of them sleeps")
            with self._timed("wake"):
                self.last_wake = self.torch.wake(None if named is None else sorted(wanted))
        except NotAsleep:
            logger.info("rotator: wake of %s: nothing of it was asleep", tags)
            return
        _log("wake", self.last_wake)

    def discard(self, tags: Iterable[str] | str) -> None:
        named = {_tag(tag) for tag in ((tags,) if isinstance(tags, str) else tags)}
        wanted = named & self._awake()
        if not wanted:
            logger.info("rotator: discard of %s: nothing of it was awake", tags)
            return
        _log("discard", self.torch.discard(sorted(wanted)))

    def get_current_usage(self) -> int:
        """Bytes in live segments, awake or asleep. Zero before the first load, as vLLM asserts."""
        return sum(row.bytes_allocated for row in self.torch.memory_usage() if row.tag != "staging")

    def release_pools(self) -> None:
        """vLLM calls this when a worker shuts down; the instance may serve another engine of the process after."""
        self.torch.release_pools()

    def close(self) -> None:
        self.release_pools()

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.wall_s[what] = time.perf_counter() - begun

    def _awake(self) -> set[Tag]:
        asleep = self.torch.asleep_tags()
        rows = self.torch.memory_usage()
        return {row.tag for row in rows if row.tag != "staging" and row.segments and row.tag not in asleep}


def _tag(name: str) -> Tag:
    """Ours for vLLM's. An unknown name is kept at every level rather than lost."""
    return _TAGS.get(name, "runtime")


def _log(what: str, report: object) -> None:
    logger.info("rotator: %s: %s", what, report)
