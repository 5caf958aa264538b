"""Attached engines wherever they are: on this machine by ``attach``, on another through its agent."""

import asyncio
import contextlib
from collections.abc import Mapping
from typing import Any

from rotator.adapters.agents import Agents
from rotator.adapters.attach import LAUNCHER, REFUSALS_MAX, WATCH_EVERY_S, AttachLauncher
from rotator.core.values import EngineName
from rotator.ports import Handle, LaunchError, LaunchSpec, NodeError

ASK_S = 3.0


class FleetAttach(AttachLauncher):
    """A Launcher. An agent that does not answer says nothing about an engine: it counts as alive meanwhile."""

    def __init__(self, agents: Agents) -> None:
        super().__init__()
        self._agents = agents
        self._nodes: dict[EngineName, tuple[str, ...]] = {}
        self._pids_seen: dict[EngineName, frozenset[int]] = {}

    async def find(self, spec: LaunchSpec, ref: Mapping[str, Any] | None) -> Handle | None:
        node = self._agents.place(spec.url)
        if node is None:
            return await super().find(spec, ref)
        self._nodes[spec.engine] = spec.nodes
        try:
            answer = await self._agents.answers(spec.engine, node, deadline_s=ASK_S)
        except NodeError as e:
            raise LaunchError(str(e)) from None
        return Handle(spec.engine, LAUNCHER, spec.url, {"node": node, "port": spec.port}) if answer == "yes" else None

    async def is_alive(self, handle: Handle) -> bool:
        node = self._agents.place(handle.url)
        if node is None:
            return await super().is_alive(handle)
        try:
            return await self._agents.answers(handle.engine, node, deadline_s=ASK_S) != "refused"
        except NodeError:
            return True

    async def wait_exit(self, handle: Handle) -> str:
        if self._agents.place(handle.url) is None:
            return await super().wait_exit(handle)
        refusals = 0
        while refusals < REFUSALS_MAX:
            await asyncio.sleep(WATCH_EVERY_S)
            refusals = 0 if await self.is_alive(handle) else refusals + 1
        return f"gone: {handle.url} refused {REFUSALS_MAX} connections in a row (attached: its log is where it runs)"

    async def pids(self, handle: Handle) -> frozenset[int]:
        """On all its nodes, by its mark and its port; while an agent is away, those that were last seen."""
        nodes = self._nodes.get(handle.engine)
        if self._agents.place(handle.url) is None or nodes is None:
            return await super().pids(handle)
        with contextlib.suppress(NodeError):
            self._pids_seen[handle.engine] = await self._agents.pids(handle.engine, nodes, deadline_s=ASK_S)
        return self._pids_seen.get(handle.engine, frozenset())
