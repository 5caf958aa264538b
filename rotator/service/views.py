"""Frozen copies of the loop's state for those who look."""

import time

from rotator.core.values import State
from rotator.ports import GpuReading
from rotator.ports_nodes import pid_there
from rotator.service.loop import Loop
from rotator.service.operations import EngineView, GpuView
from rotator.service.records import EngineRuntime, GpuRecord


def engine_view(loop: Loop, engine: EngineRuntime) -> EngineView:
    traffic, now = loop.world.traffic, loop.now_s()
    retry_in = engine.retry_at_s - now
    hold = loop.calendar.hold(engine.name)
    return EngineView(
        name=engine.name,
        aliases=engine.config.aliases,
        state=engine.state.value,
        depth=engine.depth.value if engine.depth else None,
        reason=engine.reason,
        since_wall_s=engine.since_wall_s,
        gpus=engine.gpus,
        gpu_indices=tuple(loop.fleet.gpus[g].info.index for g in engine.gpus),
        launcher=engine.config.launcher,
        url=engine.url,
        version=engine.version,
        pids=tuple(sorted(map(pid_there, engine.pids))),
        pinned=engine.pinned,
        priority=engine.config.priority,
        waiting=traffic.waiting(engine.name),
        in_flight=traffic.in_flight(engine.name),
        frozen=traffic.frozen(engine.name),
        eta_s=loop.eta_s(engine.name),
        awake_bytes=tuple(engine.awake_on(g) for g in engine.gpus),
        residue_bytes=tuple(engine.residue_on(g) for g in engine.gpus),
        held_bytes=tuple(engine.charge_on(g) for g in engine.gpus),
        host_bytes=engine.host_bytes,
        footprint_measured=all(g in engine.awake_bytes for g in engine.gpus),
        wake_s=engine.costs.wake_s,
        sleep_s=engine.costs.sleep_s,
        start_s=engine.costs.start_s,
        failures=engine.failures,
        retry_at_wall_s=time.time() + retry_in if engine.state is State.FAILED and retry_in > 0 else None,
        canary=engine.canary,
        wakes=engine.counters.wakes,
        sleeps=engine.counters.sleeps,
        bytes_moved=engine.counters.bytes_moved,
        log_path=engine.spec.log_path,
        notes=tuple(engine.notes.values()),
        held_by=hold.said if hold else "",
        held_until_wall_s=hold.ends_wall_s if hold else None,
        masters_bytes=engine.masters_bytes,
    )


def gpu_view(loop: Loop, gpu: GpuRecord) -> GpuView:
    id = gpu.info.id
    engines = [e for e in loop.fleet.engines.values() if id in e.gpus]
    claim = next((a.id for a in loop.active.values() if id in a.swap.gpus), None)
    reading: GpuReading | None = gpu.reading
    return GpuView(
        id=id,
        index=gpu.info.index,
        name=gpu.info.name,
        health=gpu.health.value,
        reason=gpu.unreadable or gpu.cordoned or "",
        total_bytes=gpu.info.total_bytes,
        used_bytes=reading.used_bytes if reading else None,
        foreign_bytes=gpu.foreign_bytes,
        reserve_bytes=gpu.reserve_bytes,
        by_engine={e.name: e.charge_on(id) for e in engines},
        ledger_bytes=sum(e.charge_on(id) for e in engines) + gpu.foreign_bytes,
        claimed_by=claim,
        read_at_wall_s=gpu.read_at_wall_s,
    )
