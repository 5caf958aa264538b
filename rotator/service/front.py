"""The front door: allow-listed requests of clients to the gateway, everything else to the operators' side."""

from starlette.types import ASGIApp, Receive, Scope, Send

from rotator.service.gateway import Gateway


class Front:
    """One ASGI application. The service's own parts start and end outside it, so lifespan only says yes."""

    def __init__(self, gateway: Gateway, api: ASGIApp) -> None:
        self._gateway = gateway
        self._api = api

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
        elif scope["type"] == "websocket" or self._gateway.handles(scope["path"], scope["method"]):
            await self._gateway(scope, receive, send)
        else:
            await self._api(scope, receive, send)


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
