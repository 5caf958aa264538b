"""The data plane: a raw ASGI application that carries clients' requests to the engines behind their models.

A request for an engine that is awake takes the short way: one look at its body for the model's name, one ticket, bytes
through. Everything else (waiting, notices, fallback, errors) is beside that way, in files of its own.
"""

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any

import aiohttp

from rotator.config import GatewayConfig
from rotator.ports_nodes import Doors
from rotator.service.bodies import Bodies
from rotator.service.events import EventBus
from rotator.service.exchange import ClientGone, Exchange, Head, plain_dialect
from rotator.service.fallback import Fallback
from rotator.service.keys import Authorize, Guard, Identify
from rotator.service.metrics import Metrics
from rotator.service.notices import Notices
from rotator.service.proxy import Proxy
from rotator.service.quotas import Quotas
from rotator.service.realtime import Realtime
from rotator.service.responses import ApiError, Receive, Scope, Send, refusal, send_json, server_error
from rotator.service.rewrite import Request, read_request
from rotator.service.routes import Directory, Kind, NoRoute, Target, is_ours, is_realtime, match, raw_path_of
from rotator.service.stored import Stored
from rotator.service.tracing import Traces
from rotator.service.traffic import Cut, EngineUnavailable, QueueFull, Ticket, Traffic, WaitExpired
from rotator.service.upstream import Upstream, open_session

_log = logging.getLogger(__name__)
_MIB = 1 << 20
_ASKED = frozenset((b"host", b"origin", b"sec-fetch-site", b"authorization", b"x-api-key"))  # by keys.Keys


class Gateway:
    """``authorize`` and ``guard`` are those of ``keys.Keys``; None lets everybody in. ``identify`` names the client
    that a request is of, so that none takes another's share of a line. ``session`` makes the pool of
    connections to engines (``upstream.open_session`` where absent); ``doors`` has what engines and agents want to see.
    ``quotas`` bounds clients; ``bodies_bytes_max`` is what large request bodies may hold together;
    ``traces`` makes spans of requests."""

    def __init__(
        self,
        *,
        traffic: Traffic,
        directory: Directory,
        config: GatewayConfig,
        bus: EventBus,
        metrics: Metrics,
        authorize: Authorize | None = None,
        guard: Guard | None = None,
        identify: Identify | None = None,
        session: Callable[[], aiohttp.ClientSession] | None = None,
        environ: Mapping[str, str] | None = None,
        doors: Doors = lambda _: None,
        quotas: Quotas | None = None,
        bodies_bytes_max: int = 1 << 30,
        traces: Traces | None = None,
    ) -> None:
        self._traffic = traffic
        self._directory = directory
        self._traces = traces
        self._authorize = authorize
        self._guard = guard
        self._identify = identify
        self._upstream = Upstream(
            session or (lambda: open_session(self._config.upstream_connect_s)), config.upstream_connect_s, doors
        )
        self._quotas = quotas or Quotas()
        self._bodies = Bodies(bodies_bytes_max)
        self._stored = Stored(traffic, directory, self._upstream)
        self._proxy = Proxy(self._upstream, bus, config.keepalive_s, self._stored.learn, metrics)
        self._notices = Notices(traffic, directory)
        outside = os.environ if environ is None else environ
        self._fallback = Fallback(traffic, directory, self._proxy, bus, metrics, outside, self._quotas)
        self._realtime = Realtime(traffic, directory, self._upstream, bus, self._quotas)
        self._since_wall_s = int(time.time())
        self.reconfigure(config)

    def reconfigure(self, config: GatewayConfig) -> None:
        """Take new numbers for requests to come."""
        self._config = config
        self._body_bytes_max = int(config.body_max_mib * _MIB)
        self._proxy.keepalive_s = config.keepalive_s
        self._upstream.pool.connect_s = config.upstream_connect_s

    @staticmethod
    def handles(path: str, method: str = "GET") -> bool:
        """Whether a path is the data plane's: also where it then says 404, in its clients' error shape."""
        return is_ours(path)

    async def close(self) -> None:
        await self._upstream.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "websocket":
            denial = self._denied("GET", scope)
            client = self._identify(_credentials(scope)) if self._identify is not None else ""
            await self._realtime.serve(scope, receive, send, denial, is_realtime(raw_path_of(scope)), client)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        x = Exchange(scope, receive, send, plain_dialect(raw_path_of(scope)), self._bodies)
        try:
            await self._answer(x, scope, send)
        except ApiError as e:
            await x.fail(e)
        except (QueueFull, WaitExpired, EngineUnavailable, Cut) as e:
            await x.fail(refusal(e))
        except ClientGone:
            return
        except asyncio.CancelledError:
            if not x.watch.absorb():
                raise
            if x.watch.reason is not None:
                await x.fail(refusal(Cut(x.watch.reason)))
        except Exception:
            _log.exception("a request failed in the gateway", extra=x.log_fields())
            await x.fail(server_error(500, "the gateway failed on this request: its log says why", "internal_error"))
        finally:
            x.watch.stop()
            x.forget_body()
            if x.trace is not None:
                x.trace.end(x.status)

    async def _answer(self, x: Exchange, scope: Scope, send: Send) -> None:
        if denial := self._denied(x.method, scope):
            raise denial
        route = match(x.method, raw_path_of(scope))
        if isinstance(route, NoRoute):
            raise _no_route(x.method, scope["path"], route)
        x.route, x.dialect = route, route.dialect
        x.head = Head(scope["headers"], scope["query_string"])
        if self._identify is not None:
            x.client = self._identify(_credentials(scope))
        if route.kind is Kind.INFER:
            if self._traces is not None:
                x.trace = self._traces.begin(x.method, route.path, x.head.forward)
            with self._quotas.request(x.client):
                await self._infer(x)
        elif route.kind is Kind.STORED:
            with self._quotas.request(x.client):
                body = await x.body(self._body_bytes_max)
                await self._stored.serve(x, self._proxy, body, lambda target: self._quotas.allows(x.client, target))
        elif route.kind is Kind.MODELS:
            rows = [self._model_row(target) for target in self._targets(x.client)]
            await send_json(send, 200, {"object": "list", "data": rows}, [])
        else:
            await send_json(send, 200, self._model_row(self._find(route.item, x.client)), [])

    # -- inference ---------------------------------------------------------------------------------------------------

    async def _infer(self, x: Exchange) -> None:
        request = read_request(await x.body(self._body_bytes_max), x.head.content_type)
        target = self._find(request.model, x.client)
        until_s = None
        if x.head.deadline_s is not None:
            until_s = asyncio.get_running_loop().time() + x.head.deadline_s
        try:
            ticket = self._traffic.try_enter(target.engine, request.model, x.client)
            if ticket is None:
                ticket = await self._wait(x, request, target)
                target = self._directory.resolve(request.model) or target  # a started engine has a new address
            await self._proxy.serve(x, request, target, ticket)
        except (QueueFull, WaitExpired, EngineUnavailable) as e:
            await self._fallback.serve(x, request, target, e, until_s)

    async def _wait(self, x: Exchange, request: Request, target: Target) -> Ticket:
        x.id = self._traffic.new_id()
        x.eta_s = self._traffic.eta_s(target.engine)
        x.watch.listen()
        if x.trace is not None:
            x.trace.waits(target.engine)
        if x.head.notices is not None and request.stream:
            ticket = await self._notices.enter(x, target, request.model, x.head.deadline_s)
        else:
            ticket = await self._traffic.enter(
                target.engine, request.model, deadline_s=x.head.deadline_s, request_id=x.id, client=x.client
            )
        if x.trace is not None:
            x.trace.admitted()
        return ticket

    def _find(self, model: str, client: str) -> Target:
        """A model that is not for this client is none that there is."""
        target = self._directory.resolve(model)
        if target is None or not self._quotas.allows(client, target):
            raise unknown_model(model, self._targets(client))
        return target

    def _targets(self, client: str) -> list[Target]:
        return [target for target in self._directory.targets() if self._quotas.allows(client, target)]

    # -- what needs no engine ----------------------------------------------------------------------------------------

    def _model_row(self, target: Target) -> dict[str, Any]:
        engine = target.engine
        state, eta_s = self._directory.state(engine), self._traffic.eta_s(engine)
        return {
            "id": target.requested,
            "object": "model",
            "created": self._since_wall_s,
            "owned_by": "rotator",
            "rotator": {"engine": engine, "state": state, "eta_s": eta_s},
        }

    def _denied(self, method: str, scope: Scope) -> ApiError | None:
        if self._authorize is None and self._guard is None:
            return None
        headers = _credentials(scope)
        denial = self._guard(method, headers) if self._guard is not None else None
        if denial is None and self._authorize is not None:
            denial = self._authorize(headers, "infer")
        if denial is None:
            return None
        code = "invalid_api_key" if denial.status == 401 else "forbidden"
        return ApiError(denial.status, str(denial), code, "authentication_error", closes=True)


def _credentials(scope: Scope) -> dict[str, str]:
    return {n.decode(): v.decode("latin-1") for n, v in scope["headers"] if n in _ASKED}


def unknown_model(model: str, targets: Iterable[Target]) -> ApiError:
    names = [target.requested for target in targets]
    near = get_close_matches(model[:256], names, n=3, cutoff=0.5)
    hint = f"close: {', '.join(near)}" if near else "GET /v1/models lists them"
    return ApiError(404, f"there is no model '{model[:256]}'; {hint}", "model_not_found", param="model")


def _no_route(method: str, path: str, route: NoRoute) -> ApiError:
    shown = path[:200]
    if route.allowed:
        allowed = ", ".join(route.allowed)
        return ApiError(405, f"{shown} takes {allowed}, not {method}", "method_not_allowed", allow=route.allowed)
    return ApiError(404, f"there is no {method} {shown} here", "unknown_url")
