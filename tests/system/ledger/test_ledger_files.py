"""``rotator ledger-backup`` and ``ledger-restore`` on real files."""

import json
import sqlite3
from pathlib import Path

import pytest

from rotator.adapters import ledger_file
from rotator.adapters.ledger import SqlLedger
from rotator.cli import errors
from rotator.cli.main import run
from rotator.core.values import State
from rotator.ports import EngineRecord, LedgerError

FLEET = """
state_dir: state
engines:
  - {name: a, gpus: [0], command: [x]}
"""
Output = pytest.CaptureFixture[str]


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    (tmp_path / "state").mkdir()
    path = tmp_path / "fleet.yaml"
    path.write_text(FLEET)
    return path


async def opened(fleet: Path) -> SqlLedger:
    path = fleet.parent / "state" / "ledger.db"
    return await SqlLedger.open(f"sqlite:///{path}", deadline_s=5, sample_retention_h=1)


async def test_a_backup_is_made_while_a_service_holds_the_ledger_and_is_restored_when_none_does(
    fleet: Path, capsys: Output
):
    ledger, copy = await opened(fleet), fleet.parent / "copy.db"
    await ledger.put_engine(EngineRecord("a", State.AWAKE))
    assert run(["ledger-backup", str(copy), "-c", str(fleet), "--json"]) == errors.OK
    assert json.loads(capsys.readouterr().out)["bytes"] == copy.stat().st_size
    await ledger.put_engine(EngineRecord("a", State.FAILED))

    assert run(["ledger-restore", str(copy), "-c", str(fleet), "--yes"]) == errors.REFUSED
    assert "stop the service first" in capsys.readouterr().err
    await ledger.close()

    assert run(["ledger-restore", str(copy), "-c", str(fleet), "--yes", "--json"]) == errors.OK
    former = Path(json.loads(capsys.readouterr().out)["former"])
    again = await opened(fleet)
    assert (await again.recover()).engines["a"].state is State.AWAKE
    await again.close()
    with sqlite3.connect(former) as db:
        assert db.execute("SELECT state FROM engines").fetchone() == ("failed",)


@pytest.mark.parametrize(
    ("content", "says"), [(b"no database at all" * 99, "is no ledger"), (None, "there is no file")]
)
def test_what_is_no_backup_is_refused_and_changes_nothing(
    fleet: Path, content: bytes | None, says: str, capsys: Output
):
    wrong = fleet.parent / "wrong.db"
    if content is not None:
        wrong.write_bytes(content)
    assert run(["ledger-restore", str(wrong), "-c", str(fleet), "--yes"]) == errors.PROBLEM
    assert says in capsys.readouterr().err
    assert list((fleet.parent / "state").iterdir()) == []


async def test_a_backup_of_a_newer_release_is_not_put_in_place(fleet: Path, capsys: Output):
    await (await opened(fleet)).close()
    copy = fleet.parent / "copy.db"
    assert run(["ledger-backup", str(copy), "-c", str(fleet)]) == errors.OK
    with sqlite3.connect(copy) as db:
        db.execute("UPDATE alembic_version SET version_num = '9999'")
    assert run(["ledger-restore", str(copy), "-c", str(fleet), "--yes"]) == errors.PROBLEM
    assert "is of a newer rotator (schema 9999" in capsys.readouterr().err
    assert ledger_file.look(fleet.parent / "state" / "ledger.db").schema_known


async def test_a_damaged_copy_is_told_as_such(fleet: Path):
    ledger = await opened(fleet)
    for i in range(200):
        await ledger.put_engine(EngineRecord(f"engine-{i}", State.AWAKE, reason="x" * 400))
    await ledger.close()
    path = fleet.parent / "state" / "ledger.db"
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\xff" * 8192)
    state = ledger_file.look(path)
    assert state.damage or state.unreadable
    with pytest.raises(LedgerError, match=r"damaged|is no ledger"):
        ledger_file.verified(path)


def test_a_backup_needs_a_ledger_and_a_place(fleet: Path, capsys: Output):
    assert run(["ledger-backup", str(fleet.parent / "copy.db"), "-c", str(fleet)]) == errors.PROBLEM
    assert "there is no ledger" in capsys.readouterr().err
    assert not (fleet.parent / "copy.db").exists()


async def test_a_kept_port_is_let_go(fleet: Path):
    ledger = await opened(fleet)
    await ledger.put_engine(EngineRecord("a", State.STOPPED, url="http://127.0.0.1:20001"))
    path = fleet.parent / "state" / "ledger.db"
    with pytest.raises(ledger_file.LedgerHeld):
        ledger_file.forget_url(path, "a")
    await ledger.close()
    ledger_file.forget_url(path, "a")
    again = await opened(fleet)
    assert (await again.recover()).engines["a"].url == ""
    await again.close()
