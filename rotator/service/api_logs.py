"""Engines' logs over REST: the last lines, and what comes, as plain text with secrets taken out."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse

from rotator.ports import EngineLogs
from rotator.service.api_events import LAST_EVENT
from rotator.service.api_gate import Need
from rotator.service.events import EventBus
from rotator.service.operations import Operations
from rotator.service.problems import ProblemError, responses
from rotator.service.resolve import find_engine

READERS_MAX = 64
LINES_MAX = 10_000
_EXAMPLE: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/plain": {"example": "INFO 11-21 11:05:00 [core.py:58] Initializing a V1 LLM engine\n"}}}
}


def logs_router(ops: Operations, logs: EngineLogs, events: EventBus, need: Need) -> APIRouter:
    """Scope operate: a log may hold what clients asked."""
    router = APIRouter(tags=["journal"], dependencies=[need("operate")])
    readers = 0

    async def counted(text: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
        nonlocal readers
        readers += 1
        try:
            async for chunk in text:
                yield chunk
        finally:
            readers -= 1
            await text.aclose()

    @router.get(
        "/engines/{name:path}/logs",
        summary="An engine's log",
        response_class=StreamingResponse,
        responses={**_EXAMPLE, **responses(404, 502, 503)},
    )
    async def log(
        request: Request,
        name: str,
        lines: Annotated[int, Query(ge=0, le=LINES_MAX, description="how many of the last lines")] = 200,
        follow: Annotated[bool, Query(description="go on with what is added, until you leave")] = False,
    ) -> StreamingResponse:
        """Of its launches here, the oldest line first; what looks like a secret is hidden."""
        view = find_engine(ops, name)
        if not view.log_path:
            detail = f"{view.name} is attached: whoever started it has its log"
            raise ProblemError(404, "no-log", "No log here", detail)
        if readers >= READERS_MAX:
            raise ProblemError(503, "too-many-readers", "Too many readers", f"{readers} read logs already: close one")
        whole = _text(logs.read(view.log_path, lines=lines, follow=follow), events)
        text = need.while_allowed(request, "operate", whole)
        first = await anext(text)  # what cannot be read is told as a problem, before the answer begins
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(counted(_after(first, text)), media_type="text/plain", headers=headers)

    return router


async def _text(batches: AsyncGenerator[tuple[str, ...]], events: EventBus) -> AsyncGenerator[bytes]:
    """Lines as bytes until the reader goes or the service stops."""
    begun = events.last_id
    async with aclosing(batches):
        async for batch in batches:
            yield "".join(f"{line}\n" for line in batch).encode()
            if any(e.kind == LAST_EVENT for e in events.since(begun)):
                return


async def _after(first: bytes, rest: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    yield first
    async with aclosing(rest):
        async for chunk in rest:
            if chunk:
                yield chunk
