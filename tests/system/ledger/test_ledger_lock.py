"""One ledger, one service."""

import os
import re
import signal
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from rotator.adapters.ledger import SqlLedger
from rotator.ports import LedgerError
from tests.system.ledger.processes import child
from tests.unit.ledger.values import intent


async def reopen(path: Path, deadline_s: float = 5) -> SqlLedger:
    return await SqlLedger.open(f"sqlite:///{path}", deadline_s=deadline_s, sample_retention_h=1)


async def test_a_second_service_is_refused_and_told_who_holds_the_ledger(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    async with child("hold", path) as holder:
        assert await holder.line() == "ready"
        with pytest.raises(LedgerError, match=rf"held by process {holder.pid} \(another service\).*stop it first"):
            await reopen(path)


async def test_a_service_that_stands_still_keeps_its_ledger(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    async with child("hold", path) as holder:
        assert await holder.line() == "ready"
        holder.process.send_signal(signal.SIGSTOP)
        with pytest.raises(LedgerError, match=f"held by process {holder.pid}"):
            await reopen(path)


async def test_a_killed_service_leaves_no_lock_behind(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    async with child("hold", path) as holder:
        assert await holder.line() == "ready"
        await holder.kill()
        ledger = await reopen(path)
        assert await ledger.open_transition(intent()) == 1
        await ledger.close()


async def test_the_second_process_says_the_same(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    ledger = await reopen(path)
    async with child("hold", path) as second:
        assert re.search(f"refused .*held by process {os.getpid()}", await second.line())
    await ledger.close()


async def test_opening_twice_in_one_process_is_refused_and_a_closed_ledger_opens_again(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    ledger = await reopen(path)
    with pytest.raises(LedgerError, match="this process itself"):
        await reopen(path)
    await ledger.close()
    again = await reopen(path)
    assert again.healthy
    await again.close()


async def test_a_lock_of_another_program_is_an_error_that_says_so_and_passes(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    ledger = await reopen(path, deadline_s=0.5)
    with closing(sqlite3.connect(path, isolation_level=None)) as browser:
        browser.execute("BEGIN IMMEDIATE")
        with pytest.raises(LedgerError, match=r"another program holds a lock on .*ledger\.db: close it"):
            await ledger.open_transition(intent())
        assert not ledger.healthy
    assert await ledger.probe()
    assert ledger.healthy
    await ledger.close()
