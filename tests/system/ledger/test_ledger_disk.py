"""Disks that are full, files that are not what they should be, copies."""

import asyncio
import sqlite3
import statistics
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, event, insert
from sqlalchemy.exc import IntegrityError

from rotator.adapters.ledger import SqlLedger
from rotator.adapters.ledger_database import Database, parse
from rotator.adapters.ledger_tables import RESIDENCIES
from rotator.core.values import State
from rotator.ports import EngineRecord, LedgerError
from tests.system.ledger.processes import child
from tests.unit.ledger.values import intent, outcome, until


async def reopen(path: Path) -> SqlLedger:
    return await SqlLedger.open(f"sqlite:///{path}", deadline_s=5, sample_retention_h=1)


@contextmanager
def no_more_pages() -> Iterator[Callable[[], None]]:
    """SQLite answers "database or disk is full" as soon as the file would grow, until the yielded call makes room."""
    pages = 1  # the size that the file has is the least

    def limit(_conn: Any, cursor: Any, *_: Any) -> None:
        cursor.connection.execute(f"PRAGMA max_page_count={pages}")

    def make_room() -> None:
        nonlocal pages
        pages = 1 << 30

    event.listen(Engine, "before_cursor_execute", limit)
    try:
        yield make_room
    finally:
        event.remove(Engine, "before_cursor_execute", limit)


async def write_without_end(ledger: SqlLedger) -> None:
    for _ in range(1000):
        await ledger.open_transition(intent(plan={"why": "x" * 3000}))


def names(folder: Path, pattern: str) -> list[str]:
    return sorted(path.name for path in folder.glob(pattern))


async def test_a_disk_that_fills_up_refuses_intents_and_is_used_again_when_there_is_room(tmp_path: Path) -> None:
    async with child("fill", tmp_path / "ledger.db", 1 << 20) as writer:
        lines = await writer.rest()
    accepted = [line for line in lines if line.startswith("opened")]
    refused = next(line for line in lines if line.startswith("refused"))
    assert len(accepted) > 10
    assert f"quota of {tmp_path}" in refused
    after = lines[lines.index(refused) + 1 :]
    assert after[:2] == ["healthy False False False", "healthy True True"]
    assert after[2].startswith("opened")
    assert after[3] == "end"

    ledger = await reopen(tmp_path / "ledger.db")
    assert len((await ledger.recover()).open_transitions) == len(accepted)
    assert await ledger.integrity_check() == ()
    await ledger.close()


async def test_a_full_disk_says_where_to_free_space_while_counting_goes_on(tmp_path: Path) -> None:
    ledger = await reopen(tmp_path / "ledger.db")
    with no_more_pages() as make_room:
        with pytest.raises(LedgerError, match=f"the disk is full: free space in {tmp_path}"):
            await write_without_end(ledger)
        assert not ledger.healthy
        assert await ledger.probe() is False
        for i in range(3000):
            ledger.count_request("glm", waited_s=0, outcome="ok")
            ledger.sample_vram(float(i), "g0", i, {"glm": i})
        assert (await ledger.query("transitions", filters={}, limit=1)).rows  # reading goes on
        make_room()
        await until(lambda: ledger.healthy)  # nobody has to ask
        assert (await ledger.totals())["glm"]["requests"] == 3000
        assert await ledger.open_transition(intent()) > 0
        await ledger.close()


async def test_a_copy_taken_in_use_is_a_whole_ledger(tmp_path: Path) -> None:
    ledger = await reopen(tmp_path / "ledger.db")
    await ledger.put_engine(EngineRecord("glm", State.AWAKE))
    first = await ledger.open_transition(intent())
    await ledger.backup(tmp_path / "copy.db")
    await ledger.open_transition(intent())
    assert names(tmp_path, "copy*") == ["copy.db"]

    copy = await reopen(tmp_path / "copy.db")
    recovered = await copy.recover()
    assert [t.id for t in recovered.open_transitions] == [first]
    assert recovered.engines["glm"].state is State.AWAKE
    assert await copy.integrity_check() == ()
    await copy.close()
    await ledger.close()


async def test_a_copy_that_cannot_be_made_leaves_nothing_and_says_why(tmp_path: Path) -> None:
    ledger = await reopen(tmp_path / "ledger.db")
    with pytest.raises(LedgerError, match="cannot be opened: check that"):
        await ledger.backup(tmp_path / "nowhere" / "copy.db")
    assert ledger.healthy
    await ledger.close()


async def test_a_ledger_of_a_newer_service_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    await (await reopen(path)).close()
    with closing(sqlite3.connect(path)) as newer, newer:
        newer.execute("UPDATE alembic_version SET version_num='v9999'")
    with pytest.raises(LedgerError, match=r"of a newer rotator \(schema v9999.*upgrade rotator"):
        await reopen(path)
    with closing(sqlite3.connect(path)) as raw:
        assert raw.execute("SELECT version_num FROM alembic_version").fetchone() == ("v9999",)


async def test_a_file_that_is_no_ledger_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    path.write_text("my notes\n" * 1000)
    with pytest.raises(LedgerError, match="is no ledger: name another file"):
        await reopen(path)
    assert path.read_text() == "my notes\n" * 1000


async def test_a_damaged_file_is_found_by_the_check(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    ledger = await reopen(path)
    for _ in range(300):
        await ledger.open_transition(intent(plan={"why": "x" * 500}))
    await ledger.close()
    damaged = bytearray(path.read_bytes())
    at = damaged.rindex(b"x" * 500)
    page = at // 4096 * 4096
    damaged[page : page + 64] = b"\xff" * 64
    path.write_bytes(damaged)
    ledger = await reopen(path)
    try:
        found = await ledger.integrity_check()
    except LedgerError as e:
        found = (str(e),)
    assert found
    await ledger.close()


async def test_a_place_that_cannot_be_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LedgerError, match="file") as refused:
        await reopen(tmp_path / "file" / "ledger.db")
    assert "\n" not in str(refused.value)


async def test_the_ledger_makes_its_folder(tmp_path: Path) -> None:
    ledger = await reopen(tmp_path / "a" / "b" / "ledger.db")
    assert await ledger.open_transition(intent()) == 1
    await ledger.close()
    assert names(tmp_path / "a" / "b", "*") == ["ledger.db", "ledger.db.lock"]


async def test_an_intent_and_its_outcome_cost_a_small_part_of_a_swaps_budget(tmp_path: Path) -> None:
    """The service may add 50 ms to a swap; it writes a handful of these. Measured: well under 1 ms each."""
    ledger = await reopen(tmp_path / "ledger.db")
    loop = asyncio.get_running_loop()
    took_s: list[float] = []
    for _ in range(200):
        began_s = loop.time()
        opened = await ledger.open_transition(intent(plan={"why": "x" * 1500}))
        await ledger.close_transition(opened, outcome())
        took_s.append((loop.time() - began_s) / 2)
    await ledger.close()
    assert statistics.median(took_s) < 0.01


def test_a_file_refuses_rows_that_refer_to_nothing(tmp_path: Path) -> None:
    database = Database(parse(f"sqlite:///{tmp_path / 'ledger.db'}"), busy_s=1)
    database.open()
    orphan = insert(RESIDENCIES).values(engine="nobody", gpu="none", held_bytes=1, updated_at_wall_s=0.0)
    with pytest.raises(IntegrityError), database.write() as connection:
        connection.execute(orphan)
    database.close()
