"""An admitted request, carried to its engine and back."""

import asyncio
from collections.abc import Callable

from rotator.service.channel import EngineAnswer, Lost
from rotator.service.events import EventBus
from rotator.service.exchange import Exchange
from rotator.service.meter import Metered
from rotator.service.metrics import Metrics
from rotator.service.pool import Unreachable
from rotator.service.relay import Relay
from rotator.service.responses import server_error
from rotator.service.rewrite import Request, body_for
from rotator.service.routes import Dialect, Kind, Target
from rotator.service.traffic import EngineUnavailable, Ticket
from rotator.service.upstream import Upstream
from rotator.service.watch import FreeFlow

ALARM_EVERY_S = 1.0  # many requests meet a dead engine at once: the loop is told as often as this

Learn = Callable[[str, Target], None]


class Proxy:
    """``learn(id, target)`` hears of every answer that its engine keeps; ``metrics`` of its tokens."""

    def __init__(self, upstream: Upstream, bus: EventBus, keepalive_s: float, learn: Learn, metrics: Metrics) -> None:
        self.keepalive_s = keepalive_s
        self._upstream = upstream
        self._bus = bus
        self._learn = learn
        self._metrics = metrics
        self._alarmed_at_s: dict[str, float] = {}

    async def serve(self, x: Exchange, request: Request, target: Target, ticket: Ticket) -> None:
        """Carry an inference. Raises EngineUnavailable where nothing was sent, ApiError where it broke later."""
        if not x.id:
            x.id = ticket.id
        renames = target.requested != target.served_model
        if renames or request.stream:
            x.head.drop(b"accept-encoding")  # what we read or add to must not be compressed
        body = body_for(request, target.served_model, target)
        await self.carry(x, body, target, ticket)

    async def carry(self, x: Exchange, body: bytes, target: Target, ticket: Ticket) -> None:
        """Send one request with the ticket, which has left when this returns. Raises as ``serve``."""
        x.watch.listen_soon()
        ticket.on_cut(x.watch.cut)
        outcome, answer, head = "failed", None, x.head
        try:
            if x.trace is not None:
                head.forward = x.trace.sends(target.engine, ticket.model, x.id, head.forward)
            answer = await self._upstream.open(x.method, target.url, x.route.path, head.query, head.forward, body)
            outcome = await self._relay(x, answer, target, ticket).run()
        except Unreachable as e:
            self._alarm(target, str(e))
            raise EngineUnavailable(f"'{target.engine}' cannot be reached: {e}", ALARM_EVERY_S) from None
        except Lost as e:
            self._alarm(target, str(e))
            raise server_error(502, f"'{target.engine}' failed: {e}", "engine_failed") from None
        finally:
            if answer is not None:
                answer.close()
            outcome = "aborted" if ticket.cut else "client_left" if x.watch.left else outcome
            if x.trace is not None:
                x.trace.answered(outcome)
            ticket.leave(outcome)

    async def outside(self, x: Exchange, url: str, body: bytes, headers: dict[str, str], name: str | None) -> None:
        """Carry a request to an endpoint that is none of ours. Raises Unreachable, and ApiError where it broke."""
        x.watch.listen_soon()
        answer = None
        try:
            answer = await self._upstream.open_outside(url + x.route.path, headers, body)
            tags = x.tags(x.fallback or "", None)
            await Relay(x, answer, FreeFlow(), tags, name=name, keepalive_s=self.keepalive_s).run()
        except Lost as e:
            raise server_error(502, f"the fallback {x.fallback} failed: {e}", "fallback_failed") from None
        finally:
            if answer is not None:
                answer.close()

    def _relay(self, x: Exchange, answer: EngineAnswer, target: Target, ticket: Ticket) -> Relay:
        learn = None
        if x.dialect is Dialect.RESPONSES and x.method == "POST":
            learn = lambda ident: self._learn(ident, target)  # noqa: E731 # a closure, only on this route
        name = target.requested if target.requested != target.served_model else None
        tags = x.tags(target.engine, ticket)
        metered = Metered(self._metrics, ticket) if answer.status == 200 and x.route.kind is Kind.INFER else None
        return Relay(x, answer, ticket, tags, name=name, keepalive_s=self.keepalive_s, learn=learn, metered=metered)

    def _alarm(self, target: Target, reason: str) -> None:
        now_s = asyncio.get_running_loop().time()
        if now_s - self._alarmed_at_s.get(target.engine, -ALARM_EVERY_S) >= ALARM_EVERY_S:
            self._alarmed_at_s[target.engine] = now_s
            self._bus.publish("engine.unreachable", target.engine, url=target.url, reason=reason)
