"""Bytes seen on the GPUs, and what they prove. Status codes prove nothing: these judgements decide."""

import asyncio
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from rotator.core.values import GpuId
from rotator.ports import DeviceError, Devices, GpuReading

_POLL_FIRST_S = 0.02
_POLL_MOST_S = 0.25


@dataclass(frozen=True, slots=True)
class Judgement:
    """``held`` is what the engine still holds on each GPU, by process where the driver tells, else by difference."""

    ok: bool
    reason: str
    held: Mapping[GpuId, int]


async def read_gpus(devices: Devices, gpus: Iterable[GpuId], deadline_s: float) -> dict[GpuId, GpuReading]:
    """Read these GPUs at once. Raises DeviceError if any of them cannot be read."""
    wanted = tuple(gpus)
    readings = await asyncio.gather(*(devices.read(gpu, deadline_s=deadline_s) for gpu in wanted))
    return dict(zip(wanted, readings, strict=True))


def used(readings: Mapping[GpuId, GpuReading]) -> dict[GpuId, int]:
    return {gpu: reading.used_bytes for gpu, reading in readings.items()}


def held_by(readings: Mapping[GpuId, GpuReading], pids: Collection[int]) -> dict[GpuId, int] | None:
    """Bytes that these processes hold on each GPU, or None where the driver does not tell bytes by process, or where
    none of the processes is known (an attached engine, another pid namespace)."""
    if not pids or any(reading.by_pid is None for reading in readings.values()):
        return None
    return {
        gpu: sum(size for pid, size in (reading.by_pid or {}).items() if pid in pids)
        for gpu, reading in readings.items()
    }


@dataclass(frozen=True, slots=True)
class SleepExpectation:
    """What a sleep must leave: ``residue`` where it was measured before, else a share of ``awake`` must go."""

    awake: Mapping[GpuId, int]
    residue: Mapping[GpuId, int]
    tolerance_bytes: int
    first_frees_min: float

    def most_left(self, gpu: GpuId) -> int:
        if gpu in self.residue:
            return self.residue[gpu] + self.tolerance_bytes
        return int(self.awake[gpu] * (1.0 - self.first_frees_min))


def judge_sleep(
    expected: SleepExpectation,
    before: Mapping[GpuId, GpuReading],
    after: Mapping[GpuId, GpuReading],
    pids: Collection[int],
) -> Judgement:
    """Are the bytes back on every GPU?"""
    held = held_by(after, pids)
    if held is None:
        freed = {gpu: before[gpu].used_bytes - after[gpu].used_bytes for gpu in after}
        held = {gpu: max(0, expected.awake[gpu] - freed[gpu]) for gpu in after}
    for gpu, left in held.items():
        most = expected.most_left(gpu)
        if left > most:
            text = f"it said it sleeps, but still holds {gib(left)} on {gpu} where at most {gib(most)} may stay"
            return Judgement(False, text, held)
    return Judgement(True, "bytes are back", held)


async def verify_sleep(
    devices: Devices,
    expected: SleepExpectation,
    before: Mapping[GpuId, GpuReading],
    pids: Collection[int],
    *,
    read_deadline_s: float,
    patience_s: float,
) -> Judgement:
    """Judge at once, and again until the bytes are back or ``patience_s`` is over: a driver may free late."""
    loop = asyncio.get_running_loop()
    give_up_at = loop.time() + patience_s
    pause = _POLL_FIRST_S
    while True:
        after = await read_gpus(devices, before, read_deadline_s)
        judgement = judge_sleep(expected, before, after, pids)
        if judgement.ok or loop.time() >= give_up_at:
            return judgement
        await asyncio.sleep(pause)
        pause = min(2 * pause, _POLL_MOST_S)


async def wait_drained(
    devices: Devices,
    gpus: Collection[GpuId],
    pids: Collection[int],
    *,
    most_used: Mapping[GpuId, int],
    read_deadline_s: float,
    patience_s: float,
) -> str | None:
    """Wait until a killed engine's bytes are gone from every GPU. Returns None, or in words what is still held.

    By process where the driver tells; else until ``used`` is back to ``most_used``.
    """
    loop = asyncio.get_running_loop()
    give_up_at = loop.time() + patience_s
    pause = _POLL_FIRST_S
    while True:
        try:
            left = _left(await read_gpus(devices, gpus, read_deadline_s), pids, most_used)
        except DeviceError as e:
            left = str(e)
        if left is None or loop.time() >= give_up_at:
            return left
        await asyncio.sleep(pause)
        pause = min(2 * pause, _POLL_MOST_S)


def _left(readings: Mapping[GpuId, GpuReading], pids: Collection[int], most_used: Mapping[GpuId, int]) -> str | None:
    held = held_by(readings, pids)
    if held is None:
        held = {gpu: max(0, readings[gpu].used_bytes - most_used.get(gpu, 0)) for gpu in readings}
        slack = 64 << 20
    else:
        slack = 0
    parts = [f"{gib(size)} on {gpu}" for gpu, size in held.items() if size > slack]
    return "; ".join(parts) or None


def gib(size: int) -> str:
    return f"{size / (1 << 30):.2f} GiB"
