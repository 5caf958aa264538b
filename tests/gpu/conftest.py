"""Each test in a process of its own: torch's pools, its settings and a CUDA context belong to a process."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable

import pytest

PREAMBLE = """
import torch
from allocator import *
GIB, MIB = 1 << 30, 1 << 20
memory = TorchAllocator()
def free():
    torch.cuda.synchronize()
    return torch.cuda.mem_get_info()[0]
def words(nbytes, seed):
    generator = torch.Generator(device="cuda").manual_seed(seed)
    return torch.empty(nbytes // 8, dtype=torch.int64, device="cuda").random_(generator=generator)
"""


@pytest.fixture
def on_gpu() -> Callable[..., str]:
    """Run a script on the GPU: it must end with exit code 0 and write nothing that a broken shutdown writes."""

    def run(script: str, limit_s: float = 110, **environment: str) -> str:
        source = PREAMBLE + textwrap.dedent(script)
        env = {**os.environ, **environment}
        command = [sys.executable, "-c", source]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=limit_s, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        for sign in ("pure virtual", "Segmentation", "terminate called", "rotator: free of"):
            assert sign not in done.stderr
        return done.stdout

    return run
