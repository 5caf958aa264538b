"""What the page's process is told: all views in one answer, the stream of events, rows of the ledger. Actions and dry
runs go to the operators' REST, with the viewer's own session: the page's process has no authority of its own.

Reached only over a socket in a folder that nobody else may open.
"""

import time
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from rotator.ports import LedgerError
from rotator.service import api_events
from rotator.service.events import EventBus
from rotator.service.operations import Operations

KEEPALIVE_S = 5.0
QUEUE_MAX = 200  # waiting requests that are told one by one; the rest is in the engines' counts
INCIDENTS_MAX = 60
_ROWS_MAX = 1000
_TABLES = ("transitions", "vram_samples")


class Feed:
    """The ASGI application on the private socket."""

    def __init__(self, ops: Operations, events: EventBus, api: ASGIApp) -> None:
        self._ops = ops
        self._events = events
        self._app = Starlette(
            routes=[
                Route("/feed/look", self._look),
                Route("/feed/events", self._follow),
                Route("/feed/rows/{table}", self._rows),
                Mount("/", api),
            ]
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)

    async def _look(self, _: Request) -> Response:
        return Response(orjson.dumps(self.look(), option=orjson.OPT_NON_STR_KEYS), media_type="application/json")

    def look(self) -> dict[str, Any]:
        """Everything that the page shows of now. ``last_event`` is the newest event that it reflects."""
        queue = self._ops.queue()
        return {
            "last_event": self._events.last_id,
            "wall_s": time.time(),
            "info": self._ops.info(),
            "readiness": self._ops.readiness(),
            "engines": self._ops.engines(),
            "gpus": self._ops.gpus(),
            "queue": queue[:QUEUE_MAX],
            "queue_length": len(queue),
            "calendar": self._ops.calendar(),
            "incidents": self._ops.incidents()[:INCIDENTS_MAX],
        }

    async def _follow(self, request: Request) -> Response:
        after = api_events.resume_after(self._events, request.query_params.get("after"))
        body = api_events.stream(self._events, api_events.Wanted(), after, KEEPALIVE_S)
        return StreamingResponse(body, media_type="text/event-stream")

    async def _rows(self, request: Request) -> Response:
        table = request.path_params["table"]
        if table not in _TABLES:
            return JSONResponse({"detail": f"the page does not read {table}"}, 404)
        filters = dict(request.query_params)
        limit, cursor = min(_ROWS_MAX, int(filters.pop("limit", "100"))), filters.pop("cursor", None)
        try:
            page = await self._ops.ledger_rows(table, filters, limit, cursor)
        except LedgerError as e:
            return JSONResponse({"detail": str(e)}, 503)
        except ValueError as e:
            return JSONResponse({"detail": str(e)}, 422)
        rows = [
            {str(name): value for name, value in row.items()} for row in page.rows
        ]  # names may be the database's own
        return Response(orjson.dumps({"rows": rows, "next_cursor": page.next_cursor}, default=str))
