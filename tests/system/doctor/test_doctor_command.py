"""``rotator doctor`` as a command: exit codes, JSON, layers, and the repairs that are safe."""

import json
import os
import secrets
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from rotator.adapters.ledger import SqlLedger
from rotator.cli import errors
from rotator.cli.main import run
from rotator.core.values import State
from rotator.doctor.findings import Repair, RepairKind
from rotator.doctor.repairs import carry_out
from rotator.ports import EngineRecord
from tests.system.doctor.machine import FLEET, Machine

Output = pytest.CaptureFixture[str]


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    path = tmp_path / "fleet.yaml"
    path.write_text("state_dir: state\n" + FLEET)
    return path


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    made = Machine(tmp_path / "machine")
    made.write("/nvml.json", json.dumps({"gpus": made.gpus, "cuda_driver": [13, 0]}))
    return made


@pytest.fixture
def segment() -> Iterator[Path]:
    """Shared memory as a dead engine leaves it: old, and mapped by nobody."""
    path = Path("/dev/shm") / f"psm_{secrets.token_hex(6)}"
    path.write_bytes(bytes(4096))
    os.utime(path, (time.time() - 3600,) * 2)
    yield path
    path.unlink(missing_ok=True)


def test_a_healthy_machine_ends_well(machine: Machine, fleet: Path, capsys: Output):
    assert run(["doctor", "-c", str(fleet), "--root", str(machine.root)]) == errors.OK
    shown = capsys.readouterr().out
    assert "✓ kernel" in shown
    assert "– nomad  Nomad and its clients' settings: nothing to look at" in shown
    assert shown.endswith("0 broken, 0 risks, 0 notes\n")


def test_a_broken_layer_ends_the_walk_with_its_fix_on_one_line(machine: Machine, fleet: Path, capsys: Output):
    (machine.root / "opt/vllm/bin/vllm").unlink()
    assert run(["doctor", "-c", str(fleet), "--root", str(machine.root)]) == errors.PROBLEM
    shown = capsys.readouterr().out
    assert "stopped at launch: mend it first. Not looked at: network, ledger, nomad, nodes (--all)" in shown
    assert any(
        line.strip().startswith("fix: `printf") and line.endswith("vllm==0.19.2rc1`") for line in shown.splitlines()
    )


def test_the_same_as_json(machine: Machine, fleet: Path, capsys: Output):
    (machine.root / "opt/vllm/bin/vllm").unlink()
    words = ["doctor", "-c", str(fleet), "--root", str(machine.root), "--all", "--json", "--skip", "pcie"]
    assert run(words) == errors.PROBLEM
    told = json.loads(capsys.readouterr().out)
    [finding] = [f for f in told["findings"] if f["severity"] == "broken"]
    assert (finding["layer"], finding["code"], finding["engine"]) == ("launch", "launch.missing", "qwen")
    assert finding["stops_launch"]
    assert "pcie" in told["skipped"]
    assert "nodes" in told["looked_at"]


@pytest.mark.parametrize(
    "words",
    [["--only", "heaven"], ["--skip", "x"], ["--root", "/nowhere"], ["--fix", "--root", "/tmp"], ["--deadline", "-1"]],
)
def test_wrong_words_are_wrong_usage(words: list[str]):
    assert run(["doctor", *words]) == errors.USAGE


def test_a_fleet_file_with_mistakes_is_told_as_check_would(tmp_path: Path, capsys: Output):
    (tmp_path / "fleet.yaml").write_text("engines: []\n")
    assert run(["doctor", "-c", str(tmp_path / "fleet.yaml")]) == errors.PROBLEM
    assert "engines" in capsys.readouterr().err


def test_missing_folders_are_made_and_dead_shared_memory_is_removed_when_asked(
    fleet: Path, segment: Path, capsys: Output
):
    words = ["doctor", "-c", str(fleet), "--fix", "--yes", "--json", "--all", "--only", "leftovers", "--only", "ledger"]
    run(words)
    told = json.loads(capsys.readouterr().out)
    done = {(r["kind"], r["target"]): r["done"] for r in told["repairs"]}
    assert done[("make-directory", str(fleet.parent / "state"))]
    assert (fleet.parent / "state/logs").is_dir()
    assert done[("remove-shm", segment.name)]
    assert not segment.exists()


def test_shared_memory_that_somebody_has_open_stays(segment: Path):
    with segment.open("rb"):
        assert carry_out(Repair(RepairKind.REMOVE_SHM, segment.name, ""), None) == "somebody uses it now, or may"
    assert segment.exists()
    assert carry_out(Repair(RepairKind.REMOVE_SHM, "../etc/passwd", ""), None) is not None


def test_nothing_is_repaired_without_being_asked(fleet: Path, segment: Path):
    run(["doctor", "-c", str(fleet), "--only", "leftovers", "--only", "ledger"])
    assert segment.exists()
    assert not (fleet.parent / "state").exists()


async def test_a_ledger_that_is_damaged_or_of_another_release_is_told(fleet: Path, capsys: Output):
    path = fleet.parent / "state" / "ledger.db"
    ledger = await SqlLedger.open(f"sqlite:///{path}", deadline_s=5, sample_retention_h=1)
    await ledger.put_engine(EngineRecord("qwen", State.STOPPED))
    await ledger.close()
    (fleet.parent / "state/logs").mkdir()

    async def codes() -> set[str]:
        from rotator.config import load
        from rotator.doctor import examine
        from rotator.doctor.machine import MachineProbes

        config = load(fleet)
        found = await examine(MachineProbes(config), config, only=("ledger",))
        return {f.code for f in found.findings} - {"ledger.space"}

    assert await codes() == set()
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE alembic_version SET version_num = 'v9'")
    assert await codes() == {"ledger.newer"}
    path.write_bytes(b"not a database" * 4096)
    assert await codes() == {"ledger.damaged"}
