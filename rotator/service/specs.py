"""From an engine's configuration to what a launcher starts: places filled in, GPUs named, nothing through a shell."""

from pathlib import Path
from typing import Any

from rotator.config import EngineConfig
from rotator.config_nodes import split_gpu
from rotator.ports import GpuInfo, JobSpec, LaunchSpec

# A sleeping engine is asked by development endpoints only; they are safe because it listens on loopback alone.
_ALWAYS = {"VLLM_SERVER_DEV_MODE": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def launch_spec(
    config: EngineConfig, url: str, gpus: tuple[GpuInfo, ...], state_dir: Path, port: int | None = None
) -> LaunchSpec:
    """Fill in ``{port}``, ``{name}``, ``{gpus}`` (NVML indices, comma-separated) and ``{tp}`` (how many). ``port`` is
    the engine's on its own node, where that is not the URL's."""
    listens = str(port) if port else url.rsplit(":", 1)[1]
    indices = tuple(info.index for info in gpus)
    named = ",".join(map(str, indices))
    places = {"{port}": listens, "{name}": config.name, "{gpus}": named, "{tp}": str(len(gpus))}
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
        nodes=tuple(dict.fromkeys(info.node for info in gpus)),
        port=int(listens) if listens.isdigit() else 0,
        job=_job(config, places, tuple(split_gpu(info.id)[1] for info in gpus)),
    )


def _job(config: EngineConfig, places: dict[str, str], uuids: tuple[str, ...]) -> JobSpec | None:
    job = config.job
    if job is None:
        return None
    return JobSpec(
        file=str(job.file or ""),
        variables={name: _filled_value(value, places, uuids) for name, value in job.variables.items()},
        site=str(job.site or ""),
        name=job.name or config.name,
        task=job.task or "",
    )


def _filled_value(value: Any, places: dict[str, str], uuids: tuple[str, ...]) -> Any:
    match value:
        case "{gpu_uuids}":
            return list(uuids)
        case str():
            return _filled(value, places)
        case list():
            return [_filled_value(item, places, uuids) for item in value]
        case dict():
            return {key: _filled_value(item, places, uuids) for key, item in value.items()}
    return value


def log_path(state_dir: Path, engine: str) -> Path:
    """Engine names may hold slashes; file names may not."""
    return state_dir / "logs" / f"{engine.replace('/', '__')}.log"


def _filled(text: str, places: dict[str, str]) -> str:
    """Plain replacement, not str.format: JSON arguments are full of braces."""
    for place, value in places.items():
        text = text.replace(place, value)
    return text
