"""The front door: allow-listed requests of clients to the gateway, everything else to the operators' side."""

from typing import Protocol

from starlette.types import ASGIApp, Receive, Scope, Send

from rotator.service.gateway import Gateway


class Page(Protocol):
    """The web page's side: an ASGI application that says which requests are its own."""

    def wants(self, scope: Scope) -> bool: ...

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None: ...


class Front:
    """One ASGI application. The service's own parts start and end outside it, so lifespan only says yes."""

    def __init__(self, gateway: Gateway, api: ASGIApp, page: Page | None = None) -> None:
        self._gateway = gateway
        self._api = api
        self._page = page

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
        elif scope["type"] == "http" and self._gateway.handles(scope["path"], scope["method"]):
            await self._gateway(scope, receive, send)
        elif self._page is not None and self._page.wants(scope):
            await self._page(scope, receive, send)
        elif scope["type"] == "websocket":
            await self._gateway(scope, receive, send)
        else:
            await self._api(scope, receive, send)


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
