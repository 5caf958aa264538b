"""What the agent tells of engines here, and the two things it does for them: learn of a port, end an engine."""

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field

from rotator.adapters.loopback import try_connect
from rotator.adapters.machine import Machine, Seen
from rotator.agent.api_errors import error
from rotator.agent.engines import Engines, TooMany
from rotator.config import ENGINE_NAME

CONNECT_S = 1.0
GRACE_MAX_S = 120.0

Name = Annotated[str, Query(pattern=ENGINE_NAME)]
Job = Annotated[str, Query(pattern=r"^[A-Za-z0-9._/@:-]{0,191}$")]


class Declared(BaseModel):
    """An engine's place, as the service tells it."""

    model_config = ConfigDict(extra="forbid")
    engine: str = Field(pattern=ENGINE_NAME)
    port: int = Field(ge=1024, le=65535)


class Kill(BaseModel):
    """Which engine is to end, and how long it may take before it is killed."""

    model_config = ConfigDict(extra="forbid")
    engine: str = Field(pattern=ENGINE_NAME)
    job: str = Field(default="", pattern=r"^[A-Za-z0-9._/@:-]{0,191}$")
    grace_s: float = Field(ge=0, le=GRACE_MAX_S)


def engine_routes(engines: Engines, machine: Machine) -> APIRouter:
    """Engines by name: where they listen, their processes, their end."""
    api = APIRouter()

    @api.put("/engines")
    async def declare(body: Declared) -> Any:
        try:
            engines.declare(body.engine, body.port)
        except TooMany:
            return error(409, "this agent knows too many engines already: restart it, or drop some")
        except ValueError as e:
            return error(422, f"{e}: give the engine another")
        return {"engines": engines.all()}

    @api.delete("/engines")
    async def drop(engine: Name) -> dict[str, Any]:
        engines.drop(engine)
        return {"engines": engines.all()}

    @api.get("/engine")
    async def engine_(engine: Name) -> Any:
        """Whether something listens where the engine should."""
        port = engines.port(engine)
        if port is None:
            return error(404, f"this agent knows no engine '{engine}'")
        answer = await try_connect("127.0.0.1", port, deadline_s=CONNECT_S)
        return {"answers": answer.value, "port": port}

    @api.get("/processes")
    async def processes(engine: Name, job: Job = "") -> dict[str, Any]:
        found = await machine.processes(engine, port=engines.port(engine), job=job)
        return {"processes": _rows(found)}

    @api.post("/kill")
    async def kill(body: Kill) -> dict[str, Any]:
        return {"left": _rows(await machine.kill(body.engine, job=body.job, grace_s=body.grace_s))}

    return api


def _rows(found: tuple[Seen, ...]) -> list[dict[str, Any]]:
    return [asdict(one) for one in found]
