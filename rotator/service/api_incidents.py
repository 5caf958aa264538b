"""The routes that tell of incidents, and give out their evidence."""

from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query
from fastapi.responses import StreamingResponse

from rotator.ports import Incident
from rotator.service import api_examples
from rotator.service.api_gate import Need
from rotator.service.api_models import IncidentDetail
from rotator.service.operations import Operations
from rotator.service.problems import responses

_ID = Path(max_length=200, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="as GET /incidents tells it")
_BUNDLE: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "A tar archive, gzipped",
        "content": {"application/gzip": {"schema": {"type": "string", "format": "binary"}, "example": "(bytes)"}},
    }
}


def incident_router(ops: Operations, need: Need) -> APIRouter:
    router = APIRouter(tags=["journal"])

    @router.get(
        "/incidents",
        summary="What went wrong, newest first",
        dependencies=[need("operate")],
        responses={**api_examples.ok(api_examples.INCIDENTS), **responses()},
    )
    async def incidents(
        open: Annotated[bool, Query(description="only those that are not over")] = False,
        engine: Annotated[str | None, Query(description="only of this one")] = None,
        limit: Annotated[int, Query(ge=1, le=1000, description="at most so many")] = 100,
    ) -> list[Incident]:
        """Older ones than the service remembers are in `/ledger?table=incidents`."""
        found = [
            i for i in ops.incidents() if engine in (None, i.engine) and not (open and i.closed_wall_s is not None)
        ]
        return found[:limit]

    @router.get(
        "/incidents/{id}",
        summary="One incident, and what its bundle holds",
        dependencies=[need("operate")],
        responses={**api_examples.ok(api_examples.INCIDENT), **responses(404)},
    )
    async def incident(id: Annotated[str, _ID]) -> IncidentDetail:
        found, manifest = await ops.incident(id)
        return IncidentDetail.of(found, manifest)

    @router.get(
        "/incidents/{id}/bundle",
        summary="Its evidence as tar.gz",
        dependencies=[need("admin")],
        response_class=StreamingResponse,
        responses={**_BUNDLE, **responses(404)},
    )
    async def bundle(id: Annotated[str, _ID]) -> StreamingResponse:
        """Stacks of its processes, logs, what GPUs and ledger told. Secrets are hidden, but read it before you give it
        away."""
        body = await _begun(ops.bundle(id))
        headers = {"Content-Disposition": f'attachment; filename="{id}.tar.gz"', "Cache-Control": "no-store"}
        return StreamingResponse(body, media_type="application/gzip", headers=headers)

    return router


async def _begun(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The same pieces, with the first one had: what is not there is refused before an answer has begun."""
    first = await anext(pieces, b"")

    async def rest() -> AsyncIterator[bytes]:
        yield first
        async for piece in pieces:
            yield piece

    return rest()
