"""What the agent tells of its machine, and the two things it does there: learn of an engine's port, end an engine."""

import secrets
from dataclasses import asdict
from typing import Annotated, Any

import psutil
from fastapi import FastAPI, Query
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from rotator import __version__
from rotator.adapters.blocking import off_loop
from rotator.adapters.host import read_host_memory
from rotator.adapters.loopback import try_connect
from rotator.adapters.machine import Machine, Seen, package_versions
from rotator.adapters.proctable import read_boot_id
from rotator.agent.engines import Engines, TooMany
from rotator.agent.settings import AgentConfig
from rotator.config import ENGINE_NAME
from rotator.ports import DeviceError, Devices, DeviceTimeout, GpuInfo, LaunchError
from rotator.ports_watchdog import GpuReports

CONNECT_S = 1.0
VERSIONS_S = 20.0
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


def create_api(
    config: AgentConfig, devices: Devices, reports: GpuReports, engines: Engines, machine: Machine
) -> FastAPI:
    """The routes under /v1. Errors have the shape {"error": words}."""
    api = FastAPI(title="rotator agent", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    instance, known = secrets.token_hex(8), dict[str, GpuInfo]()
    api.add_exception_handler(DeviceTimeout, lambda _, e: _error(504, str(e)))
    api.add_exception_handler(DeviceError, lambda _, e: _error(502, str(e)))
    api.add_exception_handler(LaunchError, lambda _, e: _error(504, str(e)))

    @api.get("/v1/node")
    async def node() -> dict[str, Any]:
        memory = await off_loop(read_host_memory, deadline_s=CONNECT_S, doing="reading the memory's size")
        return {
            "node": config.node,
            "instance": instance,
            "boot_id": read_boot_id(),
            "version": __version__,
            "host": asdict(memory),
            "engines": engines.all(),
        }

    @api.get("/v1/gpus")
    async def gpus() -> list[dict[str, Any]]:
        found = await devices.inventory(deadline_s=config.read_deadline_s)
        known.update({info.id: info for info in found})
        return [asdict(info) for info in found]

    @api.get("/v1/gpu")
    async def gpu(id: Annotated[str, Query(max_length=128)]) -> Any:
        if id not in known:
            await gpus()
        if id not in known:
            return _error(404, f"there is no GPU {id} here")
        reading = await devices.read(id, deadline_s=config.read_deadline_s)
        return {**asdict(reading), "by_pid": None if reading.by_pid is None else list(reading.by_pid.items())}

    @api.get("/v1/reports")
    async def reports_(id: Annotated[str, Query(max_length=128)]) -> Any:
        """Xids since the last question, ECC errors, remapped rows, whether it is lost."""
        if id not in known:
            await gpus()
        if id not in known:
            return _error(404, f"there is no GPU {id} here")
        return asdict(await reports.health(id, deadline_s=config.read_deadline_s))

    @api.get("/v1/holders")
    async def holders(id: Annotated[str, Query(max_length=128)]) -> Any:
        """Who holds bytes of a GPU, with names: also processes that are no engine of ours."""
        if id not in known:
            return _error(404, f"there is no GPU {id} here")
        reading = await devices.read(id, deadline_s=config.read_deadline_s)
        held = sorted((reading.by_pid or {}).items(), key=lambda one: -one[1])
        return {"told": reading.by_pid is not None, "holders": [_holder(pid, size) for pid, size in held]}

    @api.put("/v1/engines")
    async def declare(body: Declared) -> Any:
        try:
            engines.declare(body.engine, body.port)
        except TooMany:
            return _error(409, "this agent knows too many engines already: restart it, or drop some")
        except ValueError as e:
            return _error(422, f"{e}: give the engine another")
        return {"engines": engines.all()}

    @api.delete("/v1/engines")
    async def drop(engine: Name) -> dict[str, Any]:
        engines.drop(engine)
        return {"engines": engines.all()}

    @api.get("/v1/engine")
    async def engine_(engine: Name) -> Any:
        """Whether something listens where the engine should."""
        port = engines.port(engine)
        if port is None:
            return _error(404, f"this agent knows no engine '{engine}'")
        answer = await try_connect("127.0.0.1", port, deadline_s=CONNECT_S)
        return {"answers": answer.value, "port": port}

    @api.get("/v1/processes")
    async def processes(engine: Name, job: Job = "") -> dict[str, Any]:
        found = await machine.processes(engine, port=engines.port(engine), job=job)
        return {"processes": _rows(found)}

    @api.post("/v1/kill")
    async def kill(body: Kill) -> dict[str, Any]:
        return {"left": _rows(await machine.kill(body.engine, job=body.job, grace_s=body.grace_s))}

    @api.get("/v1/versions")
    async def versions(environment: Annotated[str, Query(max_length=64)] = "default") -> Any:
        prefix = config.environments.get(environment)
        if prefix is None:
            return _error(404, f"this agent's file names no environment '{environment}': add it to 'environments'")
        return dict(
            await off_loop(
                lambda: package_versions(prefix), deadline_s=VERSIONS_S, doing=f"reading the packages in {prefix}"
            )
        )

    return api


def _error(status: int, words: str) -> JSONResponse:
    return JSONResponse({"error": words}, status)


def _rows(found: tuple[Seen, ...]) -> list[dict[str, Any]]:
    return [asdict(one) for one in found]


def _holder(pid: int, size: int) -> dict[str, Any]:
    try:
        name = psutil.Process(pid).name()
    except psutil.Error:
        name = "?"
    return {"pid": pid, "name": name, "bytes": size}
