"""What of an engine is there, asked of the machines themselves: its processes here, its nodes' agents elsewhere."""

import asyncio
import contextlib
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from rotator.adapters import exits
from rotator.adapters.blocking import off_loop
from rotator.adapters.loopback import LOOPBACK, Answer, try_connect
from rotator.adapters.nomad_nodes import Agents, in_words
from rotator.adapters.nomad_pids import AllocationProcesses
from rotator.adapters.proctable import Proc
from rotator.core.values import EngineName
from rotator.ports import Handle, LaunchError, NodeError

KILL_S = 15.0
CONNECT_S = 2.0
PIDS_S = 5.0
POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class NomadRef:
    """An engine's job and the allocations that it is: ``tasks`` are theirs, in order. ``port`` is 0 where it listens on
    another machine, one of ``nodes``."""

    job_id: str
    allocs: tuple[str, ...]
    tasks: tuple[str, ...] = ()
    launch: str = ""
    port: int = 0
    nodes: tuple[str, ...] = ("",)
    log_path: str = ""

    @classmethod
    def of(cls, ref: Mapping[str, Any] | None) -> Self | None:
        """None where it is none of ours: a damaged record counts as lost."""
        try:
            assert ref is not None  # noqa: S101 # caught below
            return cls(
                str(ref["job_id"]),
                tuple(map(str, ref["allocs"])),
                tuple(map(str, ref["tasks"])),
                str(ref.get("launch", "")),
                int(ref.get("port", 0)),
                tuple(map(str, ref.get("nodes") or ("",))),
                str(ref.get("log_path", "")),
            )
        except (AssertionError, KeyError, TypeError, ValueError):
            return None

    @property
    def is_remote(self) -> bool:
        return any(self.nodes)


def ref_of(handle: Handle) -> NomadRef:
    ref = NomadRef.of(handle.ref)
    if ref is None:
        raise LaunchError(f"engine '{handle.engine}': its record names no Nomad job: find it again")
    return ref


class Presence:
    """Every method raises LaunchError where this machine does not answer in time."""

    def __init__(self, agents: Agents | None, processes: AllocationProcesses) -> None:
        self._agents = agents
        self._processes = processes
        self._reading = asyncio.Lock()
        self._seen: dict[EngineName, frozenset[int]] = {}  # process ids on other nodes

    async def pids(self, engine: EngineName, ref: NomadRef) -> frozenset[int]:
        """Its process ids; of other nodes as they were last seen, while an agent is away."""
        if ref.is_remote and self._agents is not None:
            with contextlib.suppress(NodeError):
                self._seen[engine] = await self._agents.pids(engine, ref.nodes, deadline_s=PIDS_S)
            return self._seen.get(engine, frozenset())
        return frozenset(proc.pid for proc in await self.local(engine, frozenset(ref.allocs), ref.port or None))

    async def local(self, engine: EngineName, allocs: frozenset[str], port: int | None = None) -> tuple[Proc, ...]:
        async with self._reading:
            return await off_loop(
                lambda: self._processes.of(allocs, port),
                deadline_s=PIDS_S,
                doing=f"listing the processes of engine '{engine}'",
            )

    async def is_there(self, engine: EngineName, ref: NomadRef) -> bool:
        """Whether anything of it runs. A machine that cannot tell says nothing: yes."""
        if ref.is_remote and self._agents is not None:
            try:
                found = await self._agents.processes(engine, ref.nodes, job=ref.job_id, deadline_s=PIDS_S)
            except NodeError:
                return True
            return any(found.values())
        with contextlib.suppress(LaunchError):
            if await self.local(engine, frozenset(ref.allocs)):
                return True
        if not ref.port:
            return ref.is_remote
        return await try_connect(LOOPBACK, ref.port, deadline_s=CONNECT_S) is not Answer.REFUSED

    async def end(self, engine: EngineName, ref: NomadRef, allocs: frozenset[str]) -> None:
        """What Nomad has ended is gone; what it lost sight of is ended here, for nobody else will. Raises LaunchError
        naming the processes that stay."""
        self._seen.pop(engine, None)
        if ref.is_remote:
            await self._end_remote(engine, ref)
            return
        give_up_at_s = asyncio.get_running_loop().time() + KILL_S
        while left := await self.local(engine, allocs):
            if asyncio.get_running_loop().time() >= give_up_at_s:
                names = ", ".join(f"{proc.pid} ({proc.name}, state {proc.state})" for proc in left)
                raise LaunchError(f"engine '{engine}': Nomad ended its allocation, but still there are: {names}")
            for proc in left:
                exits.send(proc.identity, signal.SIGKILL)
            await asyncio.sleep(POLL_S)

    async def _end_remote(self, engine: EngineName, ref: NomadRef) -> None:
        if self._agents is None:
            return
        try:
            left = await self._agents.kill(engine, ref.nodes, job=ref.job_id, grace_s=0.0, deadline_s=KILL_S + PIDS_S)
        except NodeError as e:
            raise LaunchError(f"engine '{engine}': nobody can say whether something of it is left: {e}") from None
        if words := in_words(left):
            raise LaunchError(f"engine '{engine}': Nomad ended its allocations, but {words}")
