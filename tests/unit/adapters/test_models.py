"""Model files tell how much host RAM an engine's masters will take."""

from pathlib import Path

from rotator.adapters.models import weight_bytes
from rotator.config import EngineConfig


def engine(*command: str, model_path: Path | None = None) -> EngineConfig:
    return EngineConfig(name="m", gpus=(0,), command=command, model_path=model_path)


def test_weights_are_found_by_model_path_or_by_the_folder_in_the_command(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"x" * 1000)
    (tmp_path / "b.safetensors").write_bytes(b"x" * 24)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x" * 9)
    assert weight_bytes(engine("vllm", model_path=tmp_path)) == 1024
    assert weight_bytes(engine("vllm", "serve", str(tmp_path), "--port", "1")) == 1024


def test_a_model_that_is_not_on_this_machine_tells_nothing(tmp_path: Path) -> None:
    assert weight_bytes(engine("vllm", "serve", "org/model")) is None
    assert weight_bytes(engine("vllm", model_path=tmp_path / "gone")) is None
