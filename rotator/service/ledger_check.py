"""Ledger beside devices: do the rows that survive a crash say what the GPUs say?"""

from collections.abc import Mapping
from typing import Any

from rotator.core.values import GpuId
from rotator.ports import DeviceError, GpuReading, LedgerError
from rotator.service.accounting import gib, held_by, read_gpus
from rotator.service.loop import Loop
from rotator.service.operations import LedgerCheck

_SLACK_BYTES = 64 << 20  # a context grows a little while an engine serves
_SLACK_SHARE = 0.01
_ROWS_MAX = 1000


async def check_ledger(loop: Loop) -> LedgerCheck:
    """Read every GPU now, read the rows back from the ledger, compare by engine and in sum."""
    world = loop.world
    await loop.recorder.settled()
    try:
        readings = await read_gpus(world.devices, loop.fleet.gpus, world.config.devices.read_deadline_s)
        page = await world.ledger.query("residencies", filters={}, limit=_ROWS_MAX)
    except (DeviceError, LedgerError) as e:
        return LedgerCheck(False, (f"could not be compared: {e}",))
    differences = [*_engines(loop, readings, page.rows), *_sums(loop, readings, page.rows)]
    return LedgerCheck(not differences, tuple(differences))


def _engines(loop: Loop, readings: Mapping[GpuId, GpuReading], rows: tuple[Mapping[str, Any], ...]) -> list[str]:
    differences = []
    for row in rows:
        engine = loop.fleet.engines.get(row["engine"])
        if engine is None or row["gpu"] not in readings:
            continue
        held = held_by({row["gpu"]: readings[row["gpu"]]}, engine.pids)
        if held is not None and _differ(held[row["gpu"]], row["held_bytes"]):
            differences.append(
                f"{engine.name} holds {gib(held[row['gpu']])} on {row['gpu']}, the ledger says {gib(row['held_bytes'])}"
            )
    return differences


def _sums(loop: Loop, readings: Mapping[GpuId, GpuReading], rows: tuple[Mapping[str, Any], ...]) -> list[str]:
    differences = []
    for gpu, reading in readings.items():
        ledger = sum(row["held_bytes"] for row in rows if row["gpu"] == gpu) + loop.fleet.gpus[gpu].foreign_bytes
        if _differ(reading.used_bytes, ledger):
            differences.append(f"{gpu} uses {gib(reading.used_bytes)}, the ledger says {gib(ledger)}")
    return differences


def _differ(seen: int, ledger: int) -> bool:
    return abs(seen - ledger) > max(_SLACK_BYTES, _SLACK_SHARE * max(seen, ledger))
