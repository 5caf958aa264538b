"""What happens, as a stream: a bounded ring that any number of readers follow, each at its own pace."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

RING_MAX = 2048


@dataclass(frozen=True, slots=True)
class Event:
    """``kind`` is dotted, coarse to fine: engine.awake, swap.begun, swap.phase, canary.failed, gpu.unknown, …"""

    id: int
    at_wall_s: float
    kind: str
    engine: str | None = None
    data: dict[str, Any] = field(default_factory=dict)


class EventBus:
    """Publishing never blocks and never fails. A reader that falls behind the ring loses the oldest events and sees
    the gap in the ids: no reader can make the service hold more than RING_MAX events."""

    def __init__(self, wall: Callable[[], float] = time.time) -> None:
        self._wall = wall
        self._ring: deque[Event] = deque(maxlen=RING_MAX)
        self._last_id = 0
        self._wakeups: set[asyncio.Event] = set()

    def publish(self, kind: str, engine: str | None = None, **data: Any) -> Event:
        self._last_id += 1
        event = Event(self._last_id, self._wall(), kind, engine, data)
        self._ring.append(event)
        for wakeup in self._wakeups:
            wakeup.set()
        return event

    @property
    def last_id(self) -> int:
        return self._last_id

    def since(self, after_id: int) -> tuple[Event, ...]:
        """Events with an id greater than ``after_id`` that the ring still holds, oldest first."""
        return tuple(e for e in self._ring if e.id > after_id)

    async def follow(self, after_id: int | None = None) -> AsyncIterator[Event]:
        """Yield events after ``after_id`` (from now on where None) until the reader stops."""
        seen = self._last_id if after_id is None else after_id
        wakeup = asyncio.Event()
        self._wakeups.add(wakeup)
        try:
            while True:
                wakeup.clear()
                for event in self.since(seen):
                    seen = event.id
                    yield event
                if seen >= self._last_id:
                    await wakeup.wait()
        finally:
            self._wakeups.discard(wakeup)
