"""An engine's answer, passed on to the client: as it is, or with the model's name that the client asked for.

What a broken engine leaves behind never looks whole: an answer that was not begun becomes an error, one that was
begun loses its connection.
"""

import re
from collections.abc import Callable

from rotator.service.channel import Answer
from rotator.service.exchange import Exchange, answer_headers
from rotator.service.meter import Meter, Metered
from rotator.service.responses import Header, comment, foreign_error_event
from rotator.service.rewrite import Events, rename_json
from rotator.service.watch import Flow, Stall

WHOLE_BYTES_MAX = 1 << 20  # answers up to this are read whole before they are begun, so that a death is a clean error
RENAME_BYTES_MAX = 64 << 20  # larger JSON answers keep the engine's own name for the model
ERROR_BYTES_MAX = 64 << 10
_ID = re.compile(rb'"id"\s*:\s*"([A-Za-z0-9_-]{1,256})"')


class Relay:
    """``name`` replaces the model's name in the answer; None leaves every byte. ``learn`` hears the answer's id.
    ``metered`` is who counts the tokens of a model's answer."""

    __slots__ = ("_answer", "_flow", "_keepalive_s", "_learn", "_metered", "_name", "_tags", "_x")

    def __init__(
        self,
        x: Exchange,
        answer: Answer,
        flow: Flow,
        tags: list[Header],
        *,
        name: str | None,
        keepalive_s: float,
        learn: Callable[[str], None] | None = None,
        metered: Metered | None = None,
    ) -> None:
        self._x = x
        self._answer = answer
        self._flow = flow
        self._tags = tags
        self._name = name
        self._keepalive_s = keepalive_s
        self._learn = learn
        self._metered = metered

    async def run(self) -> str:
        """Pass the answer on to its end; returns the request's outcome. Raises Lost and Cut."""
        answer = self._answer
        streams = answer.kind.startswith("text/event-stream") and not answer.encoded
        if self._x.started:
            return await self._append(streams)
        if streams:
            await self._start()
            await self._pump_events(Events(self._name))
            await self._x.end()
        else:
            await self._pass_body()
        return "failed" if answer.status >= 500 else "ok"

    async def _start(self, length: int | None = None) -> None:
        if not self._flow.flowing:
            await self._flow.wait_flow()
        headers = answer_headers(self._answer.headers, length=length)
        if self._flow.freezes:
            headers.append((b"x-rotator-stalled-ms", b"%d" % (self._flow.stalled_s * 1000)))
        await self._x.start(self._answer.status, headers + self._tags)

    async def _append(self, streams: bool) -> str:
        """The answer to a client that was already sent notices: events, or an error as the last event."""
        x, answer = self._x, self._answer
        if answer.status == 200 and streams:
            x.clean = False
            await self._pump_events(Events(self._name))
            await x.end()
            return "ok"
        said = b""
        while len(said) < ERROR_BYTES_MAX and (chunk := await answer.readany()):
            said += chunk
        if not self._flow.flowing:
            await self._flow.wait_flow()
        await x.end(foreign_error_event(answer.status, said, x.dialect))
        return "failed" if answer.status >= 500 else "ok"

    async def _pass_body(self) -> None:
        answer, length = self._answer, self._answer.length
        renames = self._name is not None and answer.kind.startswith("application/json") and not answer.encoded
        if (length is not None and length <= WHOLE_BYTES_MAX) or (renames and (length or 0) <= RENAME_BYTES_MAX):
            body = await self._read_whole()
            if body is not None:
                self._heard(body)
                if self._metered is not None:
                    self._metered.whole(body)
                if renames and self._name is not None:
                    body = rename_json(body, self._name)
                await self._start(len(body))
                return await self._x.end(body)
            return None
        await self._start(length)
        return await self._pump()

    async def _read_whole(self) -> bytes | None:
        """The body; or None when it grew over all bounds and was passed on as it came instead."""
        if self._answer.length is not None:
            return await self._answer.read()
        parts, size = [], 0
        while chunk := await self._answer.readany():
            parts.append(chunk)
            size += len(chunk)
            if size > RENAME_BYTES_MAX:
                await self._start()
                await self._x.write(b"".join(parts))
                await self._pump()
                return None
        return b"".join(parts)

    async def _pump(self) -> None:
        x, flow, read = self._x, self._flow, self._answer.readany
        while chunk := await read():
            if not flow.flowing:
                await flow.wait_flow()
            if self._learn is not None:
                self._heard(chunk)
            await x.write(chunk)
        if not flow.flowing:
            await flow.wait_flow()
        await x.end()

    async def _pump_events(self, events: Events) -> None:
        """Whole events go down as they come. While the stream stands still, comments keep its connection alive."""
        x, metered = self._x, self._metered
        x.events = events
        if metered is None:
            return await self._pass_events(events, None)
        meter = Meter(metered, x.watch.clock)
        try:
            return await self._pass_events(events, meter)
        finally:
            meter.end()

    async def _pass_events(self, events: Events, meter: Meter | None) -> None:
        x, flow, read = self._x, self._flow, self._answer.readany
        told = 0  # freezes that the client was told of
        with Stall(flow, self._keepalive_s) as stall:
            while (chunk := await stall.wait(read)) != b"":
                if chunk is None:
                    await self._keep_alive(events)
                    continue
                between = events.whole
                if data := events.feed(chunk):
                    if meter is not None:
                        meter.events(data)
                    if self._learn is not None:
                        self._heard(data)
                    if not flow.flowing:
                        await self._hold(stall, events)
                    if flow.freezes > told and between:
                        told = flow.freezes
                        await x.write(comment(f"rotator stalled_s={flow.stalled_s:.1f} freezes={told}"))
                    await x.write(data)
            if not flow.flowing:
                await self._hold(stall, events)
        if rest := events.flush():
            await x.write(rest)

    async def _hold(self, stall: Stall, events: Events) -> None:
        async def flows() -> bool:
            await self._flow.wait_flow()
            return True

        while await stall.wait(flows) is None:
            await self._keep_alive(events)

    async def _keep_alive(self, events: Events) -> None:
        if events.whole:
            await self._x.write(comment("frozen"))

    def _heard(self, first: bytes) -> None:
        if self._learn is not None and (found := _ID.search(first, 0, ERROR_BYTES_MAX)):
            self._learn(found[1].decode())
            self._learn = None
