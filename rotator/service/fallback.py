"""Where a request goes when its model cannot be had: one hop, and everybody is told."""

import asyncio
from collections.abc import Mapping
from dataclasses import replace

from rotator.config import FallbackConfig
from rotator.service.events import EventBus
from rotator.service.exchange import Exchange
from rotator.service.metrics import Metrics
from rotator.service.pool import Unreachable
from rotator.service.proxy import Proxy
from rotator.service.quotas import Quotas
from rotator.service.responses import comment, refusal
from rotator.service.rewrite import Request, body_for
from rotator.service.routes import Directory, Target
from rotator.service.traffic import ClientQueueFull, EngineUnavailable, QueueFull, Ticket, Traffic, WaitExpired

Refused = QueueFull | WaitExpired | EngineUnavailable


class Fallback:
    """``environ`` holds the outside endpoints' keys under the names that the configuration gives."""

    def __init__(
        self,
        traffic: Traffic,
        directory: Directory,
        proxy: Proxy,
        bus: EventBus,
        metrics: Metrics,
        environ: Mapping[str, str],
        quotas: Quotas,
    ) -> None:
        self._traffic = traffic
        self._directory = directory
        self._proxy = proxy
        self._bus = bus
        self._metrics = metrics
        self._environ = environ
        self._quotas = quotas

    async def serve(self, x: Exchange, request: Request, target: Target, why: Refused, until_s: float | None) -> None:
        """Serve it elsewhere. ``until_s`` is when the client's patience ends, on the loop's clock.
        Raises ApiError: the first refusal where there is no fallback or it cannot be had either."""
        if target.fallback is None or isinstance(why, ClientQueueFull) or not self._may(x, target.fallback):
            raise refusal(why)
        to = _name(target.fallback)
        x.fallback = to
        self._metrics.fell_back(request.model, to)
        self._bus.publish("gateway.fallback", target.engine, model=request.model, to=to, reason=str(why))
        if x.started:  # its headers are gone: the notices say it instead
            await x.write(comment(f"rotator fallback={to}"))
        try:
            if target.fallback.model is not None:
                await self._model(x, request, target.fallback.model, until_s)
            else:
                await self._outside(x, request, target.fallback)
        except (QueueFull, WaitExpired, EngineUnavailable, Unreachable) as e:
            error = refusal(why)
            error.message += f"; its fallback {to} cannot be had either: {e}"
            raise error from None

    def _may(self, x: Exchange, fallback: FallbackConfig) -> bool:
        """Whether its key is for the model of ours that would serve instead; one outside belongs to the model."""
        target = self._directory.resolve(fallback.model) if fallback.model is not None else None
        return target is None or self._quotas.allows(x.client, target)

    async def _model(self, x: Exchange, request: Request, model: str, until_s: float | None) -> None:
        target = self._directory.resolve(model)
        if target is None:
            raise EngineUnavailable("it is not configured any more")
        ticket = self._traffic.try_enter(target.engine, model, x.client)
        if ticket is None:
            ticket = await self._enter(x, target, model, until_s)
            target = self._directory.resolve(model) or target  # a started engine has a new address
        await self._proxy.serve(x, request, replace(target, requested=request.model), ticket)

    async def _enter(self, x: Exchange, target: Target, model: str, until_s: float | None) -> Ticket:
        left_s = None if until_s is None else until_s - asyncio.get_running_loop().time()
        if left_s is not None and left_s <= 0:
            raise EngineUnavailable("it is not awake, and no time is left to wait for it")
        x.watch.listen()
        if x.trace is not None:
            x.trace.waits(target.engine)
        ticket = await self._traffic.enter(target.engine, model, deadline_s=left_s, request_id=x.id, client=x.client)
        if x.trace is not None:
            x.trace.admitted()
        return ticket

    async def _outside(self, x: Exchange, request: Request, config: FallbackConfig) -> None:
        passed = {b"content-type", b"accept"}  # nothing that the client meant for us alone
        headers = {name.decode(): value.decode("latin-1") for name, value in x.head.forward if name in passed}
        if config.api_key_env is not None:
            if (key := self._environ.get(config.api_key_env)) is None:
                raise Unreachable(f"environment variable {config.api_key_env} is not set: it must hold the key")
            headers["Authorization"] = f"Bearer {key}"
        there = config.upstream_model or request.model
        name = request.model if there != request.model else None
        await self._proxy.outside(x, str(config.url).rstrip("/"), body_for(request, there), headers, name)


def _name(config: FallbackConfig) -> str:
    if config.model is not None:
        return config.model
    return (config.url.host if config.url is not None else None) or "outside"
