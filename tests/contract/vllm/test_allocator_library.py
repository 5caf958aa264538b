"""The plugin with the true library on the simulated driver, in a process of its own as a worker is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from allocator.box import SimulatedBox


@pytest.mark.parametrize("version", ["0.26.0", "0.33.0"])
def test_weights_and_runtime_survive_and_the_cache_comes_back_as_zeros(tmp_path: Path, version: str) -> None:
    box = SimulatedBox.create(tmp_path / "box", devices=1, memory_bytes=1 << 30, scale=1, copy_gib_s=0)
    env = {**os.environ, **box.env(), "ROTATOR_ALLOCATOR_SLAB_MIB": "4"}
    command = [sys.executable, "-m", "tests.contract.vllm.library_script", version]
    folder = Path(__file__).parents[3]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "whole"
