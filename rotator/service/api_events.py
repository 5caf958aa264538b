"""Events as server-sent events: one generator a reader, which waits on the bus and on nothing else."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass

import orjson

from rotator.service.events import Event, EventBus

READERS_MAX = 256
LAST_EVENT = "service.stopping"  # a stream ends after it, so that nobody holds up the service's end


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which events a reader asked for. ``kinds`` match whole or as a prefix before a dot: swap matches swap.begun."""

    kinds: Sequence[str] = ()
    engines: Sequence[str] = ()

    def matches(self, event: Event) -> bool:
        kind_fits = not self.kinds or any(event.kind == k or event.kind.startswith(f"{k}.") for k in self.kinds)
        return kind_fits and (not self.engines or event.engine in self.engines)


def resume_after(bus: EventBus, given: str | None) -> int | None:
    """The id to go on after. One that was not yet given out is an earlier life's: then everything that is kept."""
    if given is None or not given.isdecimal():
        return None
    return int(given) if int(given) <= bus.last_id else 0


async def stream(bus: EventBus, wanted: Wanted, after_id: int | None, keepalive_s: float) -> AsyncGenerator[bytes]:
    """Server-sent events until the reader goes or the service stops; a comment where nothing happens for a while."""
    start = bus.last_id if after_id is None else after_id
    yield b": stream open\n\n"
    async with aclosing(_with_pauses(bus, start, keepalive_s)) as events:
        async for event in events:
            if event is None:
                yield b": nothing new\n\n"
            elif wanted.matches(event) or event.kind == LAST_EVENT:
                yield encode(event)
            if event is not None and event.kind == LAST_EVENT:
                return


def encode(event: Event) -> bytes:
    body = orjson.dumps(
        {"id": event.id, "at_wall_s": event.at_wall_s, "kind": event.kind, "engine": event.engine, "data": event.data},
        default=str,
        option=orjson.OPT_NON_STR_KEYS,
    )
    return b"id: %d\nevent: %s\ndata: %s\n\n" % (event.id, event.kind.encode(), body)


async def _with_pauses(bus: EventBus, after_id: int, pause_s: float) -> AsyncGenerator[Event | None]:
    """The bus's events, and None for each ``pause_s`` without one. The wait itself is never cancelled by a pause:
    that would end the bus's generator."""
    events = aiter(bus.follow(after_id))
    coming = asyncio.ensure_future(anext(events))
    try:
        while True:
            done, _ = await asyncio.wait({coming}, timeout=pause_s)
            if not done:
                yield None
                continue
            event = coming.result()
            coming = asyncio.ensure_future(anext(events))
            yield event
    finally:
        coming.cancel()
        with suppress(asyncio.CancelledError, StopAsyncIteration):
            await coming
