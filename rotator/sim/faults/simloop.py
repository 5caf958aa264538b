"""The event loop of a fault simulation: virtual time, connections in memory, and every task with its life."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from rotator.sim.clock import VirtualTimeLoop
from rotator.sim.faults.world import LIFE

TICK_S = 1e-6
Connect = Callable[[asyncio.Protocol, int], Awaitable[asyncio.Transport]]


class SimLoop(VirtualTimeLoop):
    """``connect`` carries what the service's own code connects to engines by host and port."""

    def __init__(self) -> None:
        super().__init__(polls=False)
        self.connect: Connect | None = None
        self.set_task_factory(_make_task)

    def call_at(  # type: ignore[override]  # its own types are not written down in all releases
        self, when: float, callback: Any, *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        """A timer always moves the clock, be it by a little: who waits for the rest of a rounding error gets on."""
        return super().call_at(max(when, self.time() + TICK_S), callback, *args, context=context)

    async def create_connection(
        self, protocol_factory: Callable[[], Any], host: Any = None, port: Any = None, **_: Any
    ) -> tuple[asyncio.Transport, Any]:
        if self.connect is None:
            raise ConnectionRefusedError(111, "Connection refused")
        protocol = protocol_factory()
        return await self.connect(protocol, port), protocol


def _make_task(loop: asyncio.AbstractEventLoop, work: Any, **more: Any) -> "asyncio.Task[Any]":
    task: asyncio.Task[Any] = asyncio.Task(work, loop=loop, **more)
    life = LIFE.get()
    if life is not None:
        life.adopt(task)
    return task
