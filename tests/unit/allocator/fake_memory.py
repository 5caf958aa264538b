"""A double of `allocator.Allocator` without a library: addresses, tags and states, and what was asked of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from allocator.errors import AlreadyAsleep, NotAsleep, OutOfMemory
from allocator.values import TAGS, HostMemory, PrepareStatus, SleepReport, Tag, TagUsage, WakeReport


def report(**given: int) -> SleepReport:
    """0.1 s and what is given."""
    return SleepReport(**{**dict.fromkeys(SleepReport.__slots__, 0), "seconds": 0.1, **given})  # type: ignore[arg-type]


@dataclass
class FakeMemory:
    segments: dict[int, tuple[Tag, int]] = field(default_factory=dict)
    asleep: set[Tag] = field(default_factory=set)
    calls: list[tuple[Any, ...]] = field(default_factory=list)
    progress: PrepareStatus = field(default_factory=lambda: PrepareStatus(False, 0, 0, 0.0, None))
    captures: int = 0
    wakes_to_refuse: int = 0
    closed: bool = False

    def malloc(self, function: str, nbytes: int) -> int:
        tag = function.removeprefix("rotator_malloc_")
        if tag == "kv_cache_mixed":
            tag = "runtime" if nbytes <= 20 << 20 else "kv_cache"
        assert tag in TAGS
        address = (1 << 40) + sum(size for _, size in self.segments.values()) + (len(self.calls) << 32)
        self.calls.append(("malloc", tag, nbytes))
        self.segments[address] = (tag, nbytes)  # type: ignore[assignment]  # checked above
        return address

    def free(self, address: int) -> None:
        self.calls.append(("free", self.segments.pop(address)[0]))

    def nbytes(self, tag: Tag) -> int:
        return sum(size for owner, size in self.segments.values() if owner == tag)

    def asked(self, name: str) -> list[tuple[Any, ...]]:
        return [call[1:] for call in self.calls if call[0] == name]

    # -- as allocator.Allocator --

    def sleep(
        self, level: int = 1, tags: Iterable[Tag] | None = None, *, bytes_wanted: int | None = None
    ) -> SleepReport:
        self.calls.append(("sleep", level, None if tags is None else tuple(tags), bytes_wanted))
        awake = {tag for tag, _ in self.segments.values()} - self.asleep
        if not awake:
            raise AlreadyAsleep("all of it sleeps")
        self.asleep |= {"kv_cache"} if bytes_wanted is not None else awake if tags is None else set(tags)
        return report(bytes_freed=1)

    def wake(self, tags: Iterable[Tag] | None = None) -> WakeReport:
        wanted = self.asleep if tags is None else set(tags)
        self.calls.append(("wake", None if tags is None else tuple(sorted(wanted))))
        if not wanted:
            raise NotAsleep("nothing sleeps")
        if self.wakes_to_refuse:
            self.wakes_to_refuse -= 1
            raise OutOfMemory("the device is full", bytes_wanted=2, bytes_free=1)
        self.asleep = self.asleep - wanted
        return WakeReport(0.1, 0.0, 0.1, 1, 1, 0, 0, 10.0)

    def prepare(self, tags: Iterable[Tag] | None = None, *, wait: bool = True) -> SleepReport | None:
        self.calls.append(("prepare", wait))
        return report(bytes_copied=1) if wait else None

    def prepare_status(self) -> PrepareStatus:
        return self.progress

    def discard(self, tags: Iterable[Tag]) -> SleepReport:
        self.calls.append(("discard", tuple(tags)))
        self.asleep |= set(tags)
        return report(bytes_discarded=1)

    def release_masters(self, tags: Iterable[Tag] | None = None) -> int:
        self.calls.append(("release_masters", tags))
        return 0

    def place_masters(self, where: str) -> int:
        self.calls.append(("place_masters", where))
        return 0

    def collect(self) -> int:
        self.calls.append(("collect",))
        return 0

    def capture_begin(self) -> None:
        self.captures += 1

    def capture_end(self) -> None:
        self.captures -= 1

    def asleep_tags(self) -> frozenset[Tag]:
        return frozenset(self.asleep)

    def memory_usage(self) -> tuple[TagUsage, ...]:
        tags = sorted({tag for tag, _ in self.segments.values()})
        return tuple(
            TagUsage(tag, 0, "asleep" if tag in self.asleep else "awake", 1, *[self.nbytes(tag)] * 3, 0, 0, 0)
            for tag in tags
        )

    def host_memory(self) -> HostMemory:
        return HostMemory(0, 0, 0, 0, 0, 0)

    def close(self) -> None:
        self.closed = True
