"""What the agent tells of its GPUs."""

from dataclasses import asdict
from typing import Annotated, Any

import psutil
from fastapi import APIRouter, Query

from rotator.agent.api_errors import error
from rotator.agent.settings import AgentConfig
from rotator.ports import Devices, GpuInfo
from rotator.ports_watchdog import GpuReports

Gpu = Annotated[str, Query(max_length=128)]


def gpu_routes(config: AgentConfig, devices: Devices, reports: GpuReports) -> APIRouter:
    """Inventory, readings, the driver's reports and who holds bytes."""
    api, known, bound_s = APIRouter(), dict[str, GpuInfo](), config.read_deadline_s

    @api.get("/gpus")
    async def gpus() -> list[dict[str, Any]]:
        found = await devices.inventory(deadline_s=bound_s)
        known.update({info.id: info for info in found})
        return [asdict(info) for info in found]

    async def is_known(id: str) -> bool:
        if id not in known:
            await gpus()
        return id in known

    @api.get("/gpu")
    async def gpu(id: Gpu) -> Any:
        if not await is_known(id):
            return _unknown(id)
        reading = await devices.read(id, deadline_s=bound_s)
        return {**asdict(reading), "by_pid": None if reading.by_pid is None else list(reading.by_pid.items())}

    @api.get("/reports")
    async def reports_(id: Gpu) -> Any:
        """Xids since the last question, ECC errors, remapped rows, whether it is lost."""
        if not await is_known(id):
            return _unknown(id)
        return asdict(await reports.health(id, deadline_s=bound_s))

    @api.get("/holders")
    async def holders(id: Gpu) -> Any:
        """Who holds bytes of a GPU, with names: also processes that are no engine of ours."""
        if not await is_known(id):
            return _unknown(id)
        reading = await devices.read(id, deadline_s=bound_s)
        held = sorted((reading.by_pid or {}).items(), key=lambda one: -one[1])
        return {"told": reading.by_pid is not None, "holders": [_holder(pid, size) for pid, size in held]}

    return api


def _unknown(id: str) -> Any:
    return error(404, f"there is no GPU {id} here")


def _holder(pid: int, size: int) -> dict[str, Any]:
    try:
        name = psutil.Process(pid).name()
    except psutil.Error:
        name = "?"
    return {"pid": pid, "name": name, "bytes": size}
