"""The routes that only look: engines, GPUs, the queue, plans, the ledger, events."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Annotated, Literal

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import StreamingResponse

from rotator.core.values import Command, CommandKind
from rotator.service import api_events, api_examples
from rotator.service.api_gate import Need
from rotator.service.api_models import LedgerCheckModel, LedgerTable, PlanModel
from rotator.service.events import EventBus
from rotator.service.operations import EngineView, GpuView, Operations, QueueEntry
from rotator.service.problems import ProblemError, invalid, responses
from rotator.service.resolve import find_engine

Table = Literal[
    "gpus",
    "engines",
    "residencies",
    "leases",
    "transitions",
    "decisions",
    "reservations",
    "incidents",
    "baselines",
    "vram_samples",
    "requests",
    "nodes",
    "lives",
]
_LEDGER_OWN = ("table", "limit", "cursor")


def state_router(ops: Operations, need: Need) -> APIRouter:
    """What a client may see too: its key needs scope infer."""
    router = APIRouter(tags=["state"], dependencies=[need("infer")], responses=responses())

    @router.get("/engines", summary="Every engine and its state", responses=api_examples.ok(api_examples.ENGINES))
    async def engines() -> list[EngineView]:
        return list(ops.engines())

    @router.get("/gpus", summary="Every GPU and who holds its bytes", responses=api_examples.ok(api_examples.GPUS))
    async def gpus() -> list[GpuView]:
        return list(ops.gpus())

    @router.get("/queue", summary="Requests that wait for their model", responses=api_examples.ok(api_examples.QUEUE))
    async def queue() -> list[QueueEntry]:
        return list(ops.queue())

    @router.get(
        "/plan",
        summary="What would be done now, and why everything else waits",
        responses={**api_examples.ok(api_examples.PLAN), **responses(404)},
    )
    async def plan(
        model: Annotated[str | None, Query(description="as if an operator asked to wake it; absent: as it is")] = None,
    ) -> PlanModel:
        now_s = asyncio.get_running_loop().time()
        wish = () if model is None else (Command(CommandKind.WAKE, find_engine(ops, model).name, issued_at_s=now_s),)
        return PlanModel.of(ops.plan_for(*wish), now_s)

    @router.get(
        "/engines/{name:path}",
        summary="One engine, by name or alias",
        responses={**api_examples.ok(api_examples.ENGINES[0]), **responses(404)},
    )
    async def engine(name: str) -> EngineView:
        return find_engine(ops, name)

    return router


def journal_router(ops: Operations, events: EventBus, need: Need, keepalive_s: float) -> APIRouter:
    """What happened: scope operate."""
    router = APIRouter(tags=["journal"], dependencies=[need("operate")])

    @router.get("/ledger", summary="Rows of one table of the ledger, newest first", responses=responses(503))
    async def ledger(
        request: Request,
        table: Annotated[Table, Query(description="which table")] = "transitions",
        limit: Annotated[int, Query(ge=1, le=1000, description="rows a page")] = 100,
        cursor: Annotated[str | None, Query(description="next_cursor of the page before")] = None,
    ) -> LedgerTable:
        """Any further query parameter filters by a column of that name: `/ledger?table=transitions&engine=glm-5.1`."""
        filters = {k: v for k, v in request.query_params.items() if k not in _LEDGER_OWN}
        try:
            page = await ops.ledger_rows(table, filters, limit, cursor)
        except ValueError as e:  # a filter or cursor that the table does not know
            raise invalid([f"query: {e}"]) from None
        return LedgerTable(table=table, rows=[dict(row) for row in page.rows], next_cursor=page.next_cursor)

    @router.get(
        "/ledger/check", summary="Read every GPU now and compare with the ledger", responses=responses(502, 503, 504)
    )
    async def ledger_check() -> LedgerCheckModel:
        check = await ops.check_ledger()
        return LedgerCheckModel(matches=check.matches, differences=list(check.differences))

    _events_route(router, events, need, keepalive_s)
    return router


def _events_route(router: APIRouter, events: EventBus, need: Need, keepalive_s: float) -> None:
    readers = 0

    async def counted(stream: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
        nonlocal readers
        readers += 1
        try:
            async for chunk in stream:
                yield chunk
        finally:
            readers -= 1
            await stream.aclose()

    @router.get(
        "/events",
        summary="What happens, as server-sent events",
        response_class=StreamingResponse,
        responses={**api_examples.EVENTS, **responses(503)},
    )
    async def follow(
        request: Request,
        kind: Annotated[list[str] | None, Query(max_length=32, description="a kind, or its part before a dot")] = None,
        engine: Annotated[list[str] | None, Query(max_length=32, description="only events of this engine")] = None,
        after: Annotated[str | None, Query(description="like Last-Event-ID; 0: everything that is kept")] = None,
        last_event_id: Annotated[str | None, Header(description="go on after this event's id")] = None,
    ) -> StreamingResponse:
        """Follows from now on, or after the given id. A gap in the ids says that the reader was too slow."""
        if readers >= api_events.READERS_MAX:
            detail = f"{readers} readers follow already: close one"
            raise ProblemError(503, "too-many-readers", "Too many readers", detail)
        resume = api_events.resume_after(events, last_event_id if last_event_id is not None else after)
        wanted = api_events.Wanted(kind or (), engine or ())
        stream = need.while_allowed(request, "operate", api_events.stream(events, wanted, resume, keepalive_s))
        body = counted(stream)
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(body, media_type="text/event-stream", headers=headers)
