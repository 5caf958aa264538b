"""Hands incidents on to whoever is to be told outside, as they are published."""

from collections.abc import Callable, Mapping
from typing import Any

from rotator.service.events import EventBus

Tell = Callable[[str, str, str | None, Mapping[str, Any]], None]
"""Event, a name that is the same at every attempt, engine, the incident. Must not block."""

_KINDS = ("incident.opened", "incident.closed")


async def call_out(bus: EventBus, tell: Tell) -> None:
    """For ever. What was published while this fell behind the bus's ring is lost to it, as to every reader."""
    async for event in bus.follow():
        if event.kind in _KINDS:
            data = dict(event.data)
            incident = {"kind": data.pop("of", ""), "engine": event.engine, **data}
            tell(event.kind, f"{data['id']}/{event.kind.removeprefix('incident.')}", event.engine, incident)
