"""Other machines as the service needs them: each has an agent, through which its GPUs, memory and engines are reached.

Process ids of several machines would collide, so those of a node carry its number (1, 2, ... in the file's order) in
their upper bits. The service's own machine is node "" with number 0: its ids are what the system says.
"""

import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from rotator.core.values import EngineName, GpuId
from rotator.ports import HostMemory, NodeRecord

HERE = ""
TOKEN_HEADER = "x-rotator-agent-token"  # noqa: S105 - a header's name; not Authorization: that is the engine's own
_NODE_SHIFT = 32


def pid_of_node(number: int, pid: int) -> int:
    """A process id that no other machine of the fleet has."""
    return number << _NODE_SHIFT | pid


def pid_there(pid: int) -> int:
    """The process id as its own machine knows it."""
    return pid & ((1 << _NODE_SHIFT) - 1)


def node_of(gpu: GpuId) -> str:
    """The machine that a GPU is in."""
    return gpu.rpartition("/")[0]


def nodes_of(gpus: Sequence[GpuId]) -> tuple[str, ...]:
    """The machines of these GPUs, the first one's first, each once."""
    return tuple(dict.fromkeys(node_of(gpu) for gpu in gpus))


@dataclass(frozen=True, slots=True)
class Door:
    """What is shown at a URL: to an agent, certificates (None: plain, on loopback) and a word ("": none); to the engine
    there, its own API key ("": it asks for none)."""

    tls: ssl.SSLContext | None
    token: str
    key: str = field(default="", repr=False)

    @property
    def headers(self) -> dict[str, str]:
        shown = {TOKEN_HEADER: self.token} if self.token else {}
        return {**shown, "authorization": f"Bearer {self.key}"} if self.key else shown


Doors = Callable[[str], Door | None]
"""The door of the agent or engine whose URL this is or begins; None where nothing is to be shown."""

UNREACHABLE_HEADER = "x-rotator-unreachable"
"""In an agent's answer: the engine did not get the request (``unsent``) or broke off (``lost``); no engine says it."""


class Nodes(Protocol):
    """``adapters/agents.py``. What it remembers is from its last ``look``."""

    @property
    def names(self) -> tuple[str, ...]: ...

    def known(self, node: str) -> NodeRecord: ...

    def remember(self, records: Sequence[NodeRecord]) -> None:
        """Take over what an earlier life of the service knew."""
        ...

    async def look(self, *, deadline_s: float) -> tuple[NodeRecord, ...]:
        """Ask every agent; returns those nodes of which something changed. Never raises."""
        ...

    async def host(self, node: str, *, deadline_s: float) -> HostMemory:
        """Its memory now. Raises NodeError."""
        ...

    def declare(self, node: str, engine: EngineName, port: int) -> str:
        """Let the node's agent know where an engine listens (now, and again whenever the agent was restarted). Returns
        the URL at which the engine is reached from here."""
        ...

    def forget(self, engine: EngineName) -> None:
        """The engine is no longer part of the fleet."""
        ...
