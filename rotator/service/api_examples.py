"""Examples for the OpenAPI description: values as a running service gives them."""

from typing import Any

_GIB = 1 << 30

ENGINES: list[dict[str, Any]] = [
    {
        "name": "glm-5.1",
        "aliases": ["glm"],
        "state": "awake",
        "depth": None,
        "reason": "woken for 3 waiting requests",
        "since_wall_s": 1767225600.0,
        "gpus": ["GPU-0", "GPU-1"],
        "gpu_indices": [0, 1],
        "launcher": "process",
        "url": "http://127.0.0.1:8411",
        "version": "0.26.0",
        "pids": [4711],
        "pinned": False,
        "priority": 0,
        "waiting": 0,
        "in_flight": 3,
        "frozen": 0,
        "eta_s": 0.0,
        "awake_bytes": [80 * _GIB, 80 * _GIB],
        "residue_bytes": [2 * _GIB, 2 * _GIB],
        "held_bytes": [80 * _GIB, 80 * _GIB],
        "host_bytes": 140 * _GIB,
        "footprint_measured": True,
        "wake_s": 1.9,
        "sleep_s": 1.1,
        "start_s": 88.0,
        "failures": 0,
        "retry_at_wall_s": None,
        "canary": "passed",
        "wakes": 12,
        "sleeps": 11,
        "bytes_moved": 1540 * _GIB,
        "log_path": "/var/lib/rotator/logs/glm-5.1.log",
        "notes": [],
        "held_by": "reservation 3 (evaluation)",
        "held_until_wall_s": 1767232800.0,
        "masters_bytes": 0,
    }
]

INCIDENTS: list[dict[str, Any]] = [
    {
        "id": "20260101T000000Z-glm-5-1",
        "opened_wall_s": 1767225600.0,
        "kind": "wedged",
        "severity": "serious",
        "reason": "/health says 200, but no token, step or KV block moved for 121 s with 3 requests there, "
        "and a probe went unanswered",
        "engine": "glm-5.1",
        "gpu": None,
        "action": "its admission is closed, evidence is taken, then it is killed and started again",
        "advice": "",
        "outcome": "back in service",
        "closed_wall_s": 1767225720.0,
        "count": 1,
        "bundle_bytes": 482133,
    }
]

INCIDENT: dict[str, Any] = {
    "incident": INCIDENTS[0],
    "items": [{"name": "log.txt", "bytes": 48211, "cut_from_bytes": None}],
    "missing": [{"what": "process 4711: py-spy", "why": "py-spy is not installed"}],
}

RESERVATION: dict[str, Any] = {
    "id": 3,
    "name": None,
    "engines": ["glm-5.1"],
    "begins_wall_s": 1767225600.0,
    "ends_wall_s": 1767232800.0,
    "begins": "Thu 2026-01-01 01:00 CET",
    "ends": "Thu 2026-01-01 03:00 CET",
    "priority": 0,
    "note": "evaluation",
    "in_force": True,
    "waived": [],
}

CALENDAR: dict[str, Any] = {
    "timezone": "Europe/Berlin",
    "windows": [
        {
            **RESERVATION,
            "id": None,
            "name": "office",
            "engines": ["dsv4-flash"],
            "begins_wall_s": 1767340800.0,
            "ends_wall_s": 1767373200.0,
            "begins": "Fri 2026-01-02 09:00 CET",
            "ends": "Fri 2026-01-02 18:00 CET",
            "note": "",
            "in_force": False,
        }
    ],
    "reservations": [RESERVATION],
    "default_engines": ["dsv4-flash"],
    "default_after_s": 900.0,
}

GPUS: list[dict[str, Any]] = [
    {
        "id": "GPU-0",
        "index": 0,
        "name": "NVIDIA RTX PRO 6000 Blackwell",
        "health": "ok",
        "reason": "",
        "total_bytes": 96 * _GIB,
        "used_bytes": 83 * _GIB,
        "foreign_bytes": _GIB,
        "reserve_bytes": _GIB,
        "by_engine": {"glm-5.1": 80 * _GIB, "dsv4-flash": 2 * _GIB},
        "ledger_bytes": 82 * _GIB,
        "claimed_by": None,
        "read_at_wall_s": 1767225600.0,
    }
]

QUEUE: list[dict[str, Any]] = [
    {
        "id": "r-17",
        "model": "glm",
        "engine": "glm-5.1",
        "waited_s": 1.4,
        "deadline_in_s": 598.6,
        "eta_s": 2.2,
    }
]

PLAN: dict[str, Any] = {
    "swaps": [
        {
            "evict": [
                {
                    "action": "sleep",
                    "engine": "dsv4-flash",
                    "reason": "cheapest to bring back of those in the way",
                    "level": 1,
                    "force": False,
                    "drain_bound_s": 5.0,
                    "expected_s": 1.1,
                    "bytes_per_gpu": {"GPU-0": -78 * _GIB},
                    "depth": None,
                }
            ],
            "admit": {
                "action": "wake",
                "engine": "glm-5.1",
                "reason": "an operator asked for it",
                "level": None,
                "force": False,
                "drain_bound_s": 0.0,
                "expected_s": 1.9,
                "bytes_per_gpu": {"GPU-0": 78 * _GIB},
                "depth": None,
            },
            "reason": "glm-5.1 is wanted and does not fit beside dsv4-flash",
            "gpus": ["GPU-0"],
            "expected_s": 3.0,
            "command": {"kind": "wake", "engine": "glm-5.1", "level": None, "force": False},
        }
    ],
    "blocked": [],
    "look_again_in_s": None,
    "summary": [
        "sleep dsv4-flash (1.1 s): cheapest to bring back of those in the way",
        "wake glm-5.1 (1.9 s): an operator asked for it",
    ],
}

_EVENT_STREAM = """id: 42
event: engine.awake
data: {"id":42,"at_wall_s":1767225600.0,"kind":"engine.awake","engine":"glm-5.1","data":{"seconds":1.9}}

"""

EVENTS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Events, each with its id; comments where nothing happens for a while",
        "content": {"text/event-stream": {"schema": {"type": "string"}, "example": _EVENT_STREAM}},
    }
}


def _prometheus(example: str) -> dict[int | str, dict[str, Any]]:
    content = {"text/plain": {"schema": {"type": "string"}, "example": example}}
    return {200: {"description": "Prometheus text", "content": content}}


METRICS = _prometheus('rotator_engine_wakes_total{engine="glm-5.1"} 12.0\n')
ENGINE_METRICS = _prometheus('vllm:num_requests_running{model="glm-5.1",engine="0",model_name="glm-5.1"} 3.0\n')


def ok(example: Any) -> dict[int | str, dict[str, Any]]:
    return {200: {"description": "OK", "content": {"application/json": {"example": example}}}}
