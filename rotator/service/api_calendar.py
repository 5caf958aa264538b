"""The calendar over REST: what it holds, and reservations for once."""

from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import ConfigDict, Field

from rotator.service import api_examples
from rotator.service.api_commands import merged
from rotator.service.api_gate import Need
from rotator.service.api_models import Wire
from rotator.service.operations import CalendarView, EntryView, Operations
from rotator.service.problems import invalid, responses
from rotator.service.resolve import find_engine

ENGINES_MAX = 64


class ReservationFields(Wire):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"engines": ["glm-5.1"], "start": "2026-11-22T09:00:00+01:00", "duration_s": 7200, "note": "evaluation"}
            ]
        }
    )

    engines: list[str] | None = Field(
        default=None, min_length=1, max_length=ENGINES_MAX, description="names or aliases, awake together"
    )
    start: datetime | None = Field(
        default=None, description="ISO 8601, without a zone in the calendar's; or Unix seconds; absent: now"
    )
    end: datetime | None = Field(default=None, description="like start; or give duration_s")
    duration_s: float | None = Field(default=None, gt=0, description="seconds from the start; or give end")
    priority: int | None = Field(
        default=None, ge=-100, le=100, description="windows of a lower priority yield to it; 0 if absent"
    )
    note: str | None = Field(default=None, max_length=200, description="shown wherever the reservation is")


def calendar_router(ops: Operations, need: Need) -> APIRouter:
    router = APIRouter(tags=["calendar"])
    shown: dict[int | str, dict[str, Any]] = {**api_examples.ok(api_examples.RESERVATION), **responses(404, 503)}

    @router.get(
        "/calendar",
        summary="Windows, reservations and default engines",
        dependencies=[need("infer")],
        responses={**api_examples.ok(api_examples.CALENDAR), **responses()},
    )
    async def calendar() -> CalendarView:
        """Windows that are in force, and the next time of each."""
        return ops.calendar()

    @router.get(
        "/reservations",
        summary="Reservations that have not ended",
        dependencies=[need("infer")],
        responses={**api_examples.ok([api_examples.RESERVATION]), **responses()},
    )
    async def reservations() -> list[EntryView]:
        return list(ops.reservations())

    @router.post(
        "/reservations",
        summary="Keep engines awake once",
        dependencies=[need("operate")],
        responses={**api_examples.ok(api_examples.RESERVATION), **responses(404, 409, 413, 415, 503)},
    )
    async def reserve(query: Annotated[ReservationFields, Query()], body: ReservationFields | None = None) -> EntryView:
        """They are woken at the start and not evicted until the end. What does not fit beside other reservations,
        pinned engines, and windows of its own or a higher priority, is refused (409) with what it collides with."""
        fields = merged(query, body)
        if not fields.engines:
            raise invalid(["engines: is missing: say which models to keep awake"])
        if (fields.end is None) == (fields.duration_s is None):
            raise invalid(["end: give exactly one of 'end' and 'duration_s'"])
        return await ops.reserve(
            [find_engine(ops, name).name for name in fields.engines],
            start=fields.start,
            end=fields.end,
            duration_s=fields.duration_s,
            priority=fields.priority or 0,
            note=fields.note or "",
        )

    @router.delete(
        "/reservations/{id}", summary="Take a reservation back", dependencies=[need("operate")], responses=shown
    )
    async def unreserve(id: int) -> EntryView:
        """Answers with what it was. Its engines stay as they are until something needs their place."""
        return await ops.unreserve(id)

    return router
