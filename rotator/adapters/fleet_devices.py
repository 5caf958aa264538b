"""GPUs of several machines as one: this one's by its driver, the others' by their agents."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from rotator.adapters.agents import AgentRefused, Agents
from rotator.adapters.devices import NvmlDevices
from rotator.config import FleetConfig
from rotator.core.gpu_faults import GpuHealth
from rotator.core.values import GpuId
from rotator.ports import DeviceError, Devices, DeviceTimeout, GpuInfo, GpuReading, NodeError
from rotator.ports_nodes import HERE, node_of, pid_of_node
from rotator.ports_watchdog import GpuReports

T = TypeVar("T")
_log = logging.getLogger(__name__)


async def looked_through(fleet: FleetConfig, look: Callable[[Devices], Awaitable[T]]) -> T:
    """What ``look`` returns of the fleet's GPUs, wherever they are: for commands that ask once. Raises ConfigError."""
    agents = Agents(fleet.nodes)
    try:
        return await look(FleetDevices(own_devices(fleet), agents))
    finally:
        await agents.close()


def own_devices(fleet: FleetConfig) -> Devices | None:
    """This machine's GPUs; None where the fleet file uses none of them."""
    return None if fleet.devices.gpus == () else NvmlDevices()


class FleetDevices:
    """Devices whose ids are ``<node>/<UUID>`` for other nodes' GPUs. ``here`` is None where this machine's own are not
    to be used. A lost agent makes its GPUs unreadable, and nobody else's."""

    def __init__(self, here: Devices | None, agents: Agents) -> None:
        self._here = here
        self._agents = agents

    async def inventory(self, *, deadline_s: float) -> tuple[GpuInfo, ...]:
        """Of every machine that answers: a node that does not is left out with a warning. Raises DeviceError where this
        machine's own fail."""
        own = await self._here.inventory(deadline_s=deadline_s) if self._here is not None else ()
        others = await asyncio.gather(*(self._inventory(node, deadline_s) for node in self._agents.names))
        return (*own, *(info for found in others for info in found))

    async def read(self, gpu: GpuId, *, deadline_s: float) -> GpuReading:
        node = node_of(gpu)
        if node == HERE:
            if self._here is None:
                raise DeviceError(f"{gpu}: 'devices.gpus' is empty: this machine's own GPUs are not to be used")
            return await self._here.read(gpu, deadline_s=deadline_s)
        query = {"id": gpu.rpartition("/")[2]}
        try:
            told = await self._agents.call(node, "GET", "/v1/gpu", query=query, deadline_s=deadline_s)
            return self._reading(gpu, node, told)
        except AgentRefused as e:
            raise (DeviceTimeout if e.status == 504 else DeviceError)(str(e)) from None
        except NodeError as e:
            raise DeviceError(str(e)) from None
        except (KeyError, TypeError, ValueError):
            raise DeviceError(f"node {node}: its agent is of another release: install the same") from None

    async def _inventory(self, node: str, deadline_s: float) -> tuple[GpuInfo, ...]:
        try:
            told = await self._agents.call(node, "GET", "/v1/gpus", deadline_s=deadline_s)
            return tuple(_info(node, row) for row in told)
        except NodeError as e:
            _log.warning("left out of the inventory: %s", e)
        except (KeyError, TypeError, ValueError):
            _log.warning("left out of the inventory: node %s: its agent is of another release", node)
        return ()

    def _reading(self, gpu: GpuId, node: str, told: Mapping[str, Any]) -> GpuReading:
        number, by_pid = self._agents.number(node), told["by_pid"]
        return GpuReading(
            id=gpu,
            used_bytes=int(told["used_bytes"]),
            total_bytes=int(told["total_bytes"]),
            by_pid=None if by_pid is None else {pid_of_node(number, int(pid)): int(size) for pid, size in by_pid},
            utilization=told["utilization"],
        )


class FleetReports:
    """What GPUs report of themselves, wherever they are (``ports_watchdog.GpuReports``)."""

    def __init__(self, here: GpuReports, agents: Agents) -> None:
        self._here = here
        self._agents = agents

    async def health(self, gpu: GpuId, *, deadline_s: float) -> GpuHealth:
        node = node_of(gpu)
        if node == HERE:
            return await self._here.health(gpu, deadline_s=deadline_s)
        query = {"id": gpu.rpartition("/")[2]}
        try:
            told = await self._agents.call(node, "GET", "/v1/reports", query=query, deadline_s=deadline_s)
            return GpuHealth(**{**told, "id": gpu, "xids": tuple(told["xids"])})
        except AgentRefused as e:
            raise (DeviceTimeout if e.status == 504 else DeviceError)(str(e)) from None
        except NodeError as e:
            raise DeviceError(str(e)) from None
        except (KeyError, TypeError):
            raise DeviceError(f"node {node}: its agent is of another release: install the same") from None


def _info(node: str, row: Mapping[str, Any]) -> GpuInfo:
    major, minor = row["compute_capability"]
    info = GpuInfo(
        id=str(row["id"]),
        index=int(row["index"]),
        name=str(row["name"]),
        total_bytes=int(row["total_bytes"]),
        compute_capability=(int(major), int(minor)),
        pci_bus_id=str(row["pci_bus_id"]),
        unified_memory=bool(row["unified_memory"]),
    )
    return replace(info, id=f"{node}/{info.id}", node=node)
