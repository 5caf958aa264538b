"""A ledger read from outside, beside the service that holds it."""

from pathlib import Path

import pytest

from rotator.adapters.ledger import SqlLedger
from rotator.adapters.ledger_reader import LedgerReader
from rotator.core.values import State
from rotator.ports import EngineRecord, GpuInfo, LedgerError, Residency
from tests.unit.ledger.values import intent, outcome


async def test_decisions_and_measurements_are_read_while_a_service_holds_the_ledger(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    ledger = await SqlLedger.open(url, deadline_s=5, sample_retention_h=1)
    await ledger.put_gpus([GpuInfo("GPU-x", 3, "card", 96)])
    await ledger.put_engine(EngineRecord("a", State.AWAKE, wake_s=1.5))
    await ledger.put_residencies([Residency("a", "GPU-x", awake_bytes=80)])
    plan = {"evict": [], "admit": None}
    first = await ledger.open_transition(intent("a", "s1", plan=plan, decision="packed", at_wall_s=100.0))
    await ledger.open_transition(intent("b", "s1", plan=plan, at_wall_s=100.0))
    await ledger.open_transition(intent("c", "s2", plan=plan, at_wall_s=200.0))
    await ledger.open_transition(intent("d", "s3", action="adopt", plan=plan, at_wall_s=300.0))
    await ledger.close_transition(first, outcome("failed"))
    reader = LedgerReader(url)
    found = list(reader.decisions())
    assert [(d.swap_id, d.at_wall_s, d.snapshot, d.results) for d in found] == [
        ("s1", 100.0, "packed", {"a": "failed", "b": "open"}),
        ("s2", 200.0, None, {"c": "open"}),
    ]
    assert [d.swap_id for d in reader.decisions(since="150")] == ["s2"]
    assert reader.measured().engines["a"].wake_s == 1.5
    assert [g.index for g in reader.gpus()] == [3]
    reader.close()
    await ledger.close()


def test_a_ledger_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="there is no ledger"):
        LedgerReader(f"sqlite:///{tmp_path / 'none.db'}")
    assert list(tmp_path.iterdir()) == []


def test_a_time_that_is_none_is_told(tmp_path: Path) -> None:
    (tmp_path / "x.db").touch()
    with pytest.raises(LedgerError, match="'since' takes Unix seconds"):
        list(LedgerReader(f"sqlite:///{tmp_path / 'x.db'}").decisions("yesterday"))


def test_a_file_that_is_no_ledger_is_told(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    path.write_text("no database at all, only some text that is long enough to be taken for a file's header")
    with pytest.raises(LedgerError, match="cannot be read"):
        list(LedgerReader(f"sqlite:///{path}").decisions())
