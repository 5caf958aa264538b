"""From an engine's configuration to what a launcher starts: places filled in, GPUs named, nothing through a shell."""

from pathlib import Path

from rotator.config import EngineConfig
from rotator.ports import GpuInfo, LaunchSpec

# A sleeping engine is asked by development endpoints only; they are safe because it listens on loopback alone.
_ALWAYS = {"VLLM_SERVER_DEV_MODE": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def launch_spec(config: EngineConfig, url: str, gpus: tuple[GpuInfo, ...], state_dir: Path) -> LaunchSpec:
    """Fill in ``{port}``, ``{name}``, ``{gpus}`` (NVML indices, comma-separated) and ``{tp}`` (how many)."""
    indices = tuple(info.index for info in gpus)
    named = ",".join(map(str, indices))
    places = {"{port}": url.rsplit(":", 1)[1], "{name}": config.name, "{gpus}": named, "{tp}": str(len(gpus))}
    env = {**_ALWAYS, "CUDA_VISIBLE_DEVICES": named, **config.env}
    return LaunchSpec(
        engine=config.name,
        launcher=config.launcher,
        command=tuple(_filled(word, places) for word in config.command),
        env={key: _filled(value, places) for key, value in env.items()},
        url=url,
        log_path=str(log_path(state_dir, config.name)),
        gpu_indices=indices,
        workdir=config.workdir,
        stop_grace_s=config.stop_grace_s,
    )


def log_path(state_dir: Path, engine: str) -> Path:
    """Engine names may hold slashes; file names may not."""
    return state_dir / "logs" / f"{engine.replace('/', '__')}.log"


def _filled(text: str, places: dict[str, str]) -> str:
    """Plain replacement, not str.format: JSON arguments are full of braces."""
    for place, value in places.items():
        text = text.replace(place, value)
    return text
