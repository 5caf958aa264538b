"""The demo's fleet: five models on a simulated four-GPU box, as a fleet file like any other."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from allocator.box import SimulatedBox

GPU_GIB = 96
SCALE = 4096  # shown bytes to real ones: 4 × 96 GiB shown are 96 MiB held
COPY_GIB_S = 50.0  # shown, a GPU: about what a Gen5 x16 link moves
HOST_GIB = 768  # shown: RAM for the masters


@dataclass(frozen=True, slots=True)
class DemoModel:
    """Sizes are GiB a GPU, shown."""

    name: str
    gpus: tuple[int, ...]
    weights_gib: float
    kv_gib: float
    alias: str


# Weights: DeepSeek V4 Flash about 149 GB and GLM-5.1 about 270 GB over four GPUs; the others in proportion.
MODELS = (
    DemoModel("dsv4-flash", (0, 1, 2, 3), 36, 44, "deepseek"),
    DemoModel("glm-5.1", (0, 1, 2, 3), 66, 16, "glm"),
    DemoModel("mimo-v2.5-flash", (0, 1, 2, 3), 40, 36, "mimo"),
    DemoModel("qwen3.6-27b", (3,), 28, 16, "coder"),
    DemoModel("gemma-4-26b", (3,), 26, 16, "writer"),
)


def make_box(folder: Path) -> SimulatedBox:
    return SimulatedBox.create(
        folder / "box", devices=4, memory_bytes=GPU_GIB << 30, scale=SCALE, copy_gib_s=COPY_GIB_S, context_bytes=1 << 29
    )


def write_fleet(folder: Path, box: SimulatedBox, port: int, *, tokens_per_s: float = 60.0) -> Path:
    """Write fleet.yaml for the box. Returns its path."""
    fleet: dict[str, Any] = {
        "bind": {"port": port},
        "state_dir": "state",
        "host_memory_gib": HOST_GIB,
        "devices": {"sample_every_s": 0.5},
        # Turns without prices: a demo that lasts seconds shows many of them.
        "policies": {"min_stay_s": 1.0, "drain_bound_s": 1.0, "swap_share": None, "preempt": False},
        "gateway": {"keepalive_s": 2},
        "recovery": {"on_shutdown": "stop", "shutdown_drain_s": 2},
        "engines": [_engine(model, box, tokens_per_s) for model in MODELS],
    }
    path = folder / "fleet.yaml"
    path.write_text(json.dumps(fleet, indent=1))  # JSON is YAML
    return path


def _engine(model: DemoModel, box: SimulatedBox, tokens_per_s: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "rotator.demo.engine", "--name", "{name}", "--port", "{port}"]
    command += ["--gpus", ",".join(map(str, model.gpus)), "--tp", "{tp}", "--tokens-per-s", str(tokens_per_s)]
    command += ["--weights-gib", str(model.weights_gib), "--kv-gib", str(model.kv_gib), "--residue-gib", "0.5"]
    return {
        "name": model.name,
        "aliases": [model.alias],
        "gpus": list(model.gpus),
        "command": command,
        "env": box.env(),
        "start_deadline_s": 60,
        "stop_grace_s": 2,
        "footprint": {
            "awake_gib": model.weights_gib + model.kv_gib + 1.5,
            "residue_gib": 1.5,
            "host_gib": model.weights_gib * len(model.gpus),
        },
    }
