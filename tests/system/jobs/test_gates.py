"""The gates' scripts, taken from what Nomad parsed, run by a real shell against a stand-in for nvidia-smi."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.unit.jobs.parsed import kept, made

MADE = made()


def script(name: str, group: str, task: str) -> list[str]:
    groups = {g["Name"]: g for g in kept(MADE[name])[1]["TaskGroups"]}
    config = next(t for t in groups[group]["Tasks"] if t["Name"] == task)["Config"]
    return [*config["entrypoint"], *config["args"]]


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """nvidia-smi tells what the file ``free`` says, a GPU a line; sleep only counts."""
    for name, text in {
        "nvidia-smi": f'[ -n "$*" ] && cat {tmp_path}/free || echo "the table of GPUs"',
        "sleep": f"echo slept >> {tmp_path}/sleeps",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    return tmp_path


def run(command: list[str], tools: Path, need: int, tries: int = 3) -> subprocess.CompletedProcess[str]:
    env = {"PATH": f"{tools}:{os.environ['PATH']}", "NEED": str(need), "TRIES": str(tries)}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=20, check=False)


def test_the_gate_opens_when_the_fullest_gpu_has_enough(tools: Path):
    (tools / "free").write_text("90000\n88000\n")
    ended = run(script("one", "engine", "vram-gate"), tools, need=88000)
    assert (ended.returncode, ended.stdout) == (0, "VRAM is free: 88000 MiB of 88000\n")


def test_the_gate_fails_with_75_and_a_look_at_the_gpus_when_one_stays_full(tools: Path):
    (tools / "free").write_text("90000\n1000\n")
    ended = run(script("one", "engine", "vram-gate"), tools, need=88000)
    assert ended.returncode == 75
    assert ended.stdout.count("waiting for VRAM: 1000 MiB of 88000 are free") == 3
    assert "the table of GPUs" in ended.stdout
    assert (tools / "sleeps").read_text().count("slept") == 3


def test_the_gate_fails_where_the_driver_tells_nothing(tools: Path):
    (tools / "free").write_text("")
    assert run(script("one", "engine", "vram-gate"), tools, need=1).returncode == 75


def test_a_stop_ends_even_if_the_bytes_never_come_back(tools: Path):
    (tools / "free").write_text("0\n")
    assert run(script("one", "engine", "vram-drain"), tools, need=1).returncode == 0


def test_on_unified_memory_the_hosts_own_figure_counts(tools: Path):
    (tools / "free").write_text("[N/A]\n")
    gate = script("two", "worker", "vram-gate")
    assert run(gate, tools, need=1).returncode == 0
    assert run(gate, tools, need=1 << 40).returncode == 75


def test_the_page_cache_is_dropped_by_the_file_that_the_job_mounts():
    command = script("two", "head", "cache-drop")
    assert "echo 3 > /host-vm/drop_caches" in command[-1]
    assert subprocess.run(["bash", "-n", "-c", command[-1]], check=False, timeout=10).returncode == 0
