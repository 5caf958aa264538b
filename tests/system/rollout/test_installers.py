"""Commands that change an environment in place: what they spoil is put back, and what they start is ended or let be."""

import os
import signal
import sys
import venv
from pathlib import Path

import pytest

from rotator.cli import rollout_environments
from rotator.cli.rollout_environments import LocalEnvironments
from rotator.rollout.ports import StepFailed
from rotator.rollout.records import Settings
from tests.system.service.rig import eventually

FOR_EVER = f"{sys.executable} -c 'import time; time.sleep(600)'"


def test_an_environment_that_an_install_spoiled_is_put_back(tmp_path: Path) -> None:
    prefix = tmp_path / "opt/vllm"
    venv.create(prefix, symlinks=True, with_pip=False)
    release = next(prefix.glob("lib/python3*/site-packages")) / "release.txt"
    release.write_text("old")
    spoil = (sys.executable, "-c", f"open({str(release)!r}, 'w').write('half'); raise SystemExit('no space left')")
    given = Settings(environment=str(prefix), archives=str(tmp_path / "kept"), install=spoil)
    mine = LocalEnvironments(given, "1")
    name = mine.archive("a")["name"]
    assert mine.archive("a")["name"] == name, "a second time after a death"
    with pytest.raises(StepFailed, match="ended with code 1: no space left"):
        mine.install("a")
    assert release.read_text() == "half"
    mine.restore("a", name)
    assert release.read_text() == "old"


def starting_another(tmp_path: Path, then: str) -> tuple[LocalEnvironments, Path]:
    """An installer that leaves a process behind, and where it tells of that one."""
    told = tmp_path / "pid"
    script = f"{FOR_EVER} & echo $! > {told}; {then}"
    given = Settings(environment=str(tmp_path), archives=str(tmp_path / "kept"), install=("sh", "-c", script))
    return LocalEnvironments(given, "1"), told


def is_alive(pid: int) -> bool:
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())  # empty for one that waits to be reaped
    except OSError:
        return False


async def test_an_installer_that_does_not_end_is_ended_with_all_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollout_environments, "INSTALL_S", 1.0)
    stuck, told = starting_another(tmp_path, "wait")
    with pytest.raises(StepFailed, match="did not end in 1 s"):
        stuck.install("a")
    pid = int(told.read_text())
    await eventually(lambda: not is_alive(pid), what="the end of what the installer started")


def test_what_an_installer_leaves_in_the_background_is_in_nobodys_way(tmp_path: Path) -> None:
    done, told = starting_another(tmp_path, "true")
    started = set()
    try:
        for _ in range(2):
            done.install("a")
            started.add(int(told.read_text()))
    finally:
        for pid in started:
            os.kill(pid, signal.SIGKILL)
