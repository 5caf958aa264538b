"""What model files on this machine tell before an engine has ever run."""

from pathlib import Path

from rotator.config import EngineConfig

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")


def weight_bytes(config: EngineConfig) -> int | None:
    """Bytes of the weights that the engine will load, all ranks together: the size of its files, from ``model_path``
    or the first word of its command that is a folder with weights. None where there are no files to look at."""
    for folder in _folders(config):
        for pattern in _WEIGHTS:  # a folder that holds two formats is loaded from one
            try:
                if size := sum(file.stat().st_size for file in folder.glob(pattern)):
                    return size
            except OSError:
                continue
    return None


def _folders(config: EngineConfig) -> list[Path]:
    if config.model_path is not None:
        return [config.model_path]
    words = (Path(word) for word in config.command if word.startswith("/"))
    return [path for path in words if path.is_dir()]
