"""``/v1/responses/{id}``: an answer that one engine keeps, asked of that engine, awake or not."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable

from rotator.service.channel import Lost
from rotator.service.exchange import Exchange
from rotator.service.pool import Unreachable
from rotator.service.proxy import Proxy
from rotator.service.responses import ApiError, server_error
from rotator.service.routes import Directory, Target
from rotator.service.traffic import Traffic
from rotator.service.upstream import Upstream

KNOWN_MAX = 65536
ASK_S = 5.0  # an engine that hangs does not keep the others' answers from their clients


class Stored:
    """Remembers which engine gave which answer; asks them all about one it never saw, without waking any."""

    def __init__(self, traffic: Traffic, directory: Directory, upstream: Upstream) -> None:
        self._traffic = traffic
        self._directory = directory
        self._upstream = upstream
        self._known: OrderedDict[str, tuple[str, str]] = OrderedDict()  # id -> engine, the name its client used

    def learn(self, ident: str, target: Target) -> None:
        self._known[ident] = (target.engine, target.requested)
        self._known.move_to_end(ident)
        if len(self._known) > KNOWN_MAX:
            self._known.popitem(last=False)

    async def serve(self, x: Exchange, proxy: Proxy, body: bytes, allows: Callable[[Target], bool]) -> None:
        """Raises ApiError (404 where no engine that the client may use has it) and EngineUnavailable."""
        ident = x.route.item
        target = self._remembered(ident) or await self._search(ident, allows)
        if not allows(target):
            raise _not_found(ident)
        ticket = self._traffic.visit(target.engine)
        x.id = ticket.id
        x.head.drop(b"accept-encoding")
        await proxy.carry(x, body, target, ticket)

    def _remembered(self, ident: str) -> Target | None:
        known = self._known.get(ident)
        if known is None:
            return None
        for target in self._directory.running():
            if target.engine == known[0]:
                return _as(target, known[1])
        return None

    async def _search(self, ident: str, allows: Callable[[Target], bool]) -> Target:
        targets = tuple(target for target in self._directory.running() if allows(target))
        answers = await asyncio.gather(*(self._has(target, ident) for target in targets))
        for target, has in zip(targets, answers, strict=True):
            if has:
                self.learn(ident, target)
                return target
        silent = [t.engine for t, has in zip(targets, answers, strict=True) if has is None]
        if silent:
            raise server_error(
                503, f"'{', '.join(silent)}' could not be asked about it: try again", "engine_silent", 1.0
            )
        raise _not_found(ident)

    async def _has(self, target: Target, ident: str) -> bool | None:
        """None where it does not answer."""
        try:
            async with asyncio.timeout(ASK_S):
                answer = await self._upstream.open("GET", target.url, f"/v1/responses/{ident}", b"", [], b"")
        except (TimeoutError, Unreachable, Lost):
            return None
        answer.close()
        return answer.status == 200


def _not_found(ident: str) -> ApiError:
    return ApiError(404, f"no engine here has a response '{ident}'", "response_not_found")


def _as(target: Target, requested: str) -> Target:
    return Target(target.engine, target.url, target.served_model, requested, target.overrides, target.fallback)
