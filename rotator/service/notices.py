"""Loading notices: a streaming client that asks for them hears why it waits, as valid SSE from the first byte on."""

import asyncio

from rotator.service.exchange import Exchange
from rotator.service.responses import Header, comment, reasoning_chunk
from rotator.service.routes import Dialect, Directory, Target
from rotator.service.traffic import Ticket, Traffic

LOOK_EVERY_S = 0.25  # a change of the engine's state is told within this
TELL_EVERY_S = 2.0

_WORDS = {
    "starting": "is starting",
    "draining": "is changing places",
    "falling_asleep": "is going to sleep first",
    "asleep": "sleeps and waits for its turn",
    "waking": "is waking up",
    "stopped": "is not running yet",
    "stopping": "is being stopped first",
    "failed": "failed and is tried again",
    "quarantined": "is quarantined",
    "awake": "is awake",
}


class Notices:
    def __init__(self, traffic: Traffic, directory: Directory) -> None:
        self._traffic = traffic
        self._directory = directory

    async def enter(self, x: Exchange, target: Target, model: str, deadline_s: float | None) -> Ticket:
        """``Traffic.enter`` with the answer begun and notices written meanwhile. Raises what that raises."""
        await self.begin(x, target)
        entering = asyncio.ensure_future(
            self._traffic.enter(target.engine, model, deadline_s=deadline_s, request_id=x.id, client=x.client)
        )
        try:
            await self._tell(x, target, entering)
            return await entering
        except BaseException:
            if entering.done() and not entering.cancelled() and entering.exception() is None:
                entering.result().leave("client_left")
            raise
        finally:
            entering.cancel()

    async def begin(self, x: Exchange, target: Target) -> None:
        if not x.started:
            headers: list[Header] = [
                (b"content-type", b"text/event-stream; charset=utf-8"),
                (b"cache-control", b"no-cache"),
            ]
            x.clean = True
            await x.start(200, headers + x.tags(target.engine, None))

    async def _tell(self, x: Exchange, target: Target, entering: asyncio.Future[Ticket]) -> None:
        clock = asyncio.get_running_loop().time
        began_s = clock()
        told_state, told_at_s = "", began_s
        while not entering.done():
            state, now_s = self._directory.state(target.engine), clock()
            if state != told_state or now_s - told_at_s >= TELL_EVERY_S:
                told_state, told_at_s = state, now_s
                await x.write(self._notice(x, target, state, now_s - began_s))
            await asyncio.wait((entering,), timeout=LOOK_EVERY_S)

    def _notice(self, x: Exchange, target: Target, state: str, waited_s: float) -> bytes:
        eta_s = self._traffic.eta_s(target.engine)
        eta = "unknown" if eta_s is None else f"{eta_s:.0f} s"
        if x.head.notices == "reasoning" and x.dialect is Dialect.CHAT:
            text = f"{target.requested} {_WORDS.get(state, state)}; ready in: {eta}\n"
            return reasoning_chunk(x.id, target.requested, text)
        eta_field = "" if eta_s is None else f" eta_s={eta_s:.1f}"
        return comment(f"rotator engine={target.engine} state={state} waited_s={waited_s:.1f}{eta_field}")
