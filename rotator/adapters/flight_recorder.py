"""torch's NCCL flight recorder: the environment that turns it on at a launch, and the dump that is asked of it.

Names are those of torch's ProcessGroupNCCL: it was TORCH_NCCL_TRACE_BUFFER_SIZE and TORCH_NCCL_DEBUG_INFO_TEMP_FILE,
newer releases say TORCH_FR_BUFFER_SIZE and TORCH_FR_DUMP_TEMP_FILE; both are set. The temp file is a prefix to which
each rank adds its number. TORCH_NCCL_DEBUG_INFO_PIPE_FILE is one, too: each rank listens at ``<prefix><rank>.pipe`` and
dumps when anything is written there. Collectives that vLLM makes through its own pynccl are not recorded by torch.
"""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

EVENTS = 2000  # remembered by each rank: some seconds of decoding, a few MiB
_PREFIX = "rank_"


def folder_of(state_dir: Path, engine: str) -> Path:
    return state_dir / "nccl" / engine.replace("/", "__")


def environment(state_dir: Path, engine: str) -> Mapping[str, str]:
    """What a launch adds to an engine's environment. Makes the folder that ranks write to; empty where it cannot."""
    folder = folder_of(state_dir, engine)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for old in folder.iterdir():
            old.unlink()
    except OSError:
        return {}
    prefix = str(folder / _PREFIX)
    return {
        "TORCH_NCCL_TRACE_BUFFER_SIZE": str(EVENTS),
        "TORCH_FR_BUFFER_SIZE": str(EVENTS),
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": prefix,
        "TORCH_FR_DUMP_TEMP_FILE": prefix,
        "TORCH_NCCL_DEBUG_INFO_PIPE_FILE": prefix,
    }


def trigger(state_dir: Path, engine: str) -> int:
    """Blocking. Ask every rank that listens for its dump; returns how many do."""
    asked = 0
    for pipe in folder_of(state_dir, engine).glob(f"{_PREFIX}*.pipe"):
        with contextlib.suppress(OSError):  # nobody reads: opening without waiting says ENXIO
            descriptor = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                os.write(descriptor, b"1\n")
            finally:
                os.close(descriptor)
            asked += 1
    return asked


def dumps(state_dir: Path, engine: str, since_wall_s: float) -> tuple[Path, ...]:
    """Blocking. What ranks have written since then."""
    files = (p for p in folder_of(state_dir, engine).glob(f"{_PREFIX}*") if p.is_file() and p.suffix != ".pipe")
    return tuple(sorted(p for p in files if p.stat().st_mtime >= since_wall_s - 1.0))
