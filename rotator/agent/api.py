"""The agent's routes under /v1: of the machine itself here, of its GPUs and of engines in files of their own."""

import secrets
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Query

from rotator import __version__
from rotator.adapters.blocking import off_loop
from rotator.adapters.host import read_host_memory
from rotator.adapters.machine import Machine, package_versions
from rotator.adapters.proctable import read_boot_id
from rotator.agent.api_engines import engine_routes
from rotator.agent.api_errors import error, tell_errors
from rotator.agent.api_gpus import gpu_routes
from rotator.agent.engines import Engines
from rotator.agent.settings import AgentConfig
from rotator.ports import Devices
from rotator.ports_watchdog import GpuReports

MEMORY_S = 1.0
VERSIONS_S = 20.0


def create_api(
    config: AgentConfig, devices: Devices, reports: GpuReports, engines: Engines, machine: Machine
) -> FastAPI:
    """The routes under /v1. Errors have the shape {"error": words}."""
    api = FastAPI(title="rotator agent", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    tell_errors(api)
    for routes in (
        node_routes(config, engines),
        gpu_routes(config, devices, reports),
        engine_routes(engines, machine),
    ):
        api.include_router(routes, prefix="/v1")
    return api


def node_routes(config: AgentConfig, engines: Engines) -> APIRouter:
    """The machine: who it is, its memory, the versions in its environments."""
    api, instance = APIRouter(), secrets.token_hex(8)

    @api.get("/node")
    async def node() -> dict[str, Any]:
        memory = await off_loop(read_host_memory, deadline_s=MEMORY_S, doing="reading the memory's size")
        return {
            "node": config.node,
            "instance": instance,
            "boot_id": read_boot_id(),
            "version": __version__,
            "host": asdict(memory),
            "engines": engines.all(),
        }

    @api.get("/versions")
    async def versions(environment: Annotated[str, Query(max_length=64)] = "default") -> Any:
        prefix = config.environments.get(environment)
        if prefix is None:
            return error(404, f"this agent's file names no environment '{environment}': add it to 'environments'")
        doing = f"reading the packages in {prefix}"
        return dict(await off_loop(lambda: package_versions(prefix), deadline_s=VERSIONS_S, doing=doing))

    return api
