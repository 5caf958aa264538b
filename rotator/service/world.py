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
