"""The fleet file that a script's shape is served by."""

from typing import Any

from rotator.config import FleetConfig
from rotator.sim.faults.script import Shape

# Bounds as short as the rest here, and longer than any token takes.
WATCHDOG = {
    "every_s": 2.0,
    "stall_s": 10.0,
    "stall_young_s": 12.0,
    "young_s": 15.0,
    "stall_warned_s": 8.0,
    "probe_every_s": 20.0,
    "probe_deadline_s": 4.0,
    "evidence": {"deadline_s": 3.0},
}


def fleet_config(shape: Shape) -> FleetConfig:
    """The fleet file of a shape: deadlines short, so that virtual minutes hold many stories."""
    names = {e.name for e in shape.engines}
    engines = [
        {
            "name": e.name,
            "gpus": list(e.gpus),
            "command": ["vllm", "serve", "--port", "{port}", "--revision", f"{e.revision}"],
            "served_model": e.served_model or None,
            "sleep_levels": list(e.levels),
            "pin": e.pin,
            "preload": e.preload,
            "priority": e.priority,
            "start_deadline_s": 40.0,
            "wake_deadline_s": 12.0,
            "sleep_deadline_s": 12.0,
            "stop_grace_s": 3.0,
            "fallback": {"model": e.fallback} if e.fallback in names else None,
            "elastic": e.elastic,
            "disk": e.disk,
            "keeps_masters": e.keeps_masters,
            "footprint": {
                "awake_gib": e.planned_gib,
                "residue_gib": e.planned_residue_gib,
                "host_gib": e.host_gib,
                "kv_gib": e.kv_gib,
            },
        }
        for e in shape.engines
    ]
    return FleetConfig.model_validate(
        {
            "engines": engines,
            "host_memory_gib": shape.host_budget_gib,
            "devices": {"sample_every_s": 2.0, "read_deadline_s": 1.0},
            "gateway": {"wait_deadline_s": 90.0, "keepalive_s": 5.0, "freezes_max": 3},
            "policies": {"idle_sleep_s": shape.idle_sleep_s, "idle_sink_s": shape.idle_sink_s, "drain_bound_s": 3.0},
            "canary": {"deadline_s": 6.0},
            "recovery": {
                "backoff_first_s": 2.0,
                "backoff_max_s": 15.0,
                "vram_drain_deadline_s": 10.0,
                "health_every_s": 3.0,
                "health_failures_max": 3,
                "breaker_failures": 12,
                "on_shutdown": shape.on_shutdown,
                "shutdown_drain_s": 6.0,
            },
            "calendar": _calendar(shape),
            "ledger": {"deadline_s": 2.0},
            "watchdog": WATCHDOG,
        }
    )


def _calendar(shape: Shape) -> dict[str, Any]:
    """Engines that the file does not have are in none of its windows."""
    names = {e.name for e in shape.engines}
    windows = [
        {
            "name": w.name,
            "engines": sorted(names & set(w.engines)),
            "start": f"{w.minute} * * * *",
            "duration_h": w.duration_s / 3600.0,
            "priority": w.priority,
        }
        for w in shape.windows
        if names & set(w.engines)
    ]
    defaults = [name for name in shape.default_engines if name in names]
    return {"windows": windows, "default_engines": defaults, "default_after_s": 6.0 if defaults else None}
