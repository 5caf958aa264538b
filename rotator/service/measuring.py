"""What must be followed to be counted: swaps and incidents as they are published, the event loop's own lateness, and
whether the ledger still says what devices say."""

import asyncio
import logging
import time
from collections.abc import Callable

from rotator.service.events import Event, EventBus
from rotator.service.ledger_check import check_ledger
from rotator.service.loop import Loop
from rotator.service.metric_fleet import FleetGauges
from rotator.service.metrics import Metrics

_log = logging.getLogger(__name__)
LAG_EVERY_S = 1.0
COMPARE_EVERY_S = 60.0
COMPARE_DEADLINE_S = 30.0


async def measure(loop: Loop, metrics: Metrics, wall: Callable[[], float] = time.time) -> None:
    """For ever. Nothing waits for it, and it changes nothing."""
    gauges = FleetGauges(loop, wall)
    metrics.registry.register(gauges)
    try:
        await asyncio.gather(follow(loop.world.bus, metrics), time_the_loop(metrics), _compare(loop, gauges, wall))
    finally:
        metrics.registry.unregister(gauges)


async def follow(bus: EventBus, metrics: Metrics) -> None:
    """Count what is published from now on. Gaps, where the ring was faster, are counted as such."""
    last = bus.last_id
    async for event in bus.follow():
        if event.id > last + 1:
            metrics.events_missed(event.id - last - 1)
        last = event.id
        _count(event, metrics)


def _count(event: Event, metrics: Metrics) -> None:
    if event.kind == "swap.ended":
        metrics.swap_ended(event.data["phases_s"], event.data["error"] is not None)
    elif event.kind == "incident.opened":
        metrics.incident_opened(event.data["of"])


async def time_the_loop(metrics: Metrics) -> None:
    clock = asyncio.get_running_loop().time
    while True:
        due_s = clock() + LAG_EVERY_S
        await asyncio.sleep(LAG_EVERY_S)
        metrics.lagged(max(0.0, clock() - due_s))


async def _compare(loop: Loop, gauges: FleetGauges, wall: Callable[[], float]) -> None:
    """Only at rest: while a swap is under way rows and devices differ because they must."""
    while True:
        await asyncio.sleep(COMPARE_EVERY_S)
        if loop.adopting or loop.active or not loop.world.ledger.healthy:
            continue
        bus, before = loop.world.bus, loop.world.bus.last_id
        try:
            async with asyncio.timeout(COMPARE_DEADLINE_S):
                check = await check_ledger(loop)
        except TimeoutError:
            _log.warning("ledger and devices could not be compared within %g s", COMPARE_DEADLINE_S)
            continue
        if not any(event.kind == "swap.begun" for event in bus.since(before)):
            gauges.checked = (check, wall())
