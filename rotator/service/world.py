"""Everything outside that the runners act on, handed over in one piece by the composition root."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from rotator.config import EngineConfig, FleetConfig
from rotator.ports import Devices, EngineControl, HostMemory, Launcher, LaunchSpec, Ledger
from rotator.ports_nodes import Nodes
from rotator.ports_watchdog import BLIND, Senses
from rotator.service.events import EventBus
from rotator.service.journal import Journal
from rotator.service.traffic import Traffic

Preflight = Callable[[EngineConfig, LaunchSpec], Awaitable[str | None]]
"""Why a launch would surely fail, in words with what mends it; None where nothing speaks against it. Never raises, and
is bounded by its implementer."""

OverlayCheck = Callable[[EngineConfig, str], Awaitable[str | None]]
"""How the files that an engine's workers run differ from its overlay bundle; None if they do not, or if it has none.
Asked with the engine's URL. Raises EngineError where it does not answer."""


@dataclass(slots=True)
class World:
    """``config`` is replaced as a whole by a reload; the rest stays for the service's life."""

    config: FleetConfig
    devices: Devices
    control: EngineControl
    launchers: Mapping[str, Launcher]
    ledger: Ledger
    journal: Journal
    traffic: Traffic
    bus: EventBus
    host: Callable[[], HostMemory]
    nodes: Nodes | None = None  # other machines
    senses: Senses = BLIND  # what the watchdog sees by
    preflight: Preflight | None = None
    overlay_check: OverlayCheck | None = None

    async def wrong_files(self, engine: EngineConfig, url: str) -> str | None:
        """See OverlayCheck; None where nothing checks."""
        return await self.overlay_check(engine, url) if self.overlay_check is not None else None
