"""kill -9 at any instant: what was acknowledged is there, what was under way is told."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from rotator.adapters.ledger import SqlLedger
from rotator.core.values import State
from rotator.ports import EngineRecord, Outcome
from tests.system.ledger.processes import child
from tests.unit.ledger.values import intent


async def reopen(path: Path) -> SqlLedger:
    return await SqlLedger.open(f"sqlite:///{path}", deadline_s=5, sample_retention_h=1)


def said(lines: Sequence[str], word: str) -> set[int]:
    return {int(line.split()[1]) for line in lines if line.startswith(word)}


async def results(ledger: SqlLedger) -> dict[int, str]:
    found: dict[int, str] = {}
    cursor = None
    while True:
        page = await ledger.query("transitions", filters={}, limit=1000, cursor=cursor)
        found |= {row["id"]: row["result"] for row in page.rows}
        cursor = page.next_cursor
        if cursor is None:
            return found


@pytest.mark.parametrize("lines_before_kill", [1, 2, 3, 57, 400, 901])
async def test_after_a_kill_in_the_middle_of_writes_the_journal_is_whole(
    tmp_path: Path, lines_before_kill: int
) -> None:
    path = tmp_path / "ledger.db"
    async with child("write", path) as writer:
        lines = [await writer.line() for _ in range(lines_before_kill)]
        lines += await writer.kill()
    ledger = await reopen(path)
    journal = await results(ledger)
    still_open = {t.id for t in (await ledger.recover()).open_transitions}
    opened, closed = said(lines, "opened"), said(lines, "closed")

    assert await ledger.integrity_check() == ()
    assert opened <= set(journal)  # every acknowledged intent, and at most one whose answer was lost
    assert len(set(journal) - opened) <= 1
    assert all(journal[transition] == "ok" for transition in closed)
    assert still_open == {transition for transition, result in journal.items() if result == "open"}
    assert len(still_open) <= 1
    assert still_open <= {max(journal)}
    await ledger.close()


async def test_what_was_under_way_is_reported_and_can_be_resolved_by_the_next_life(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    async with child("hold", path) as holder:
        assert await holder.line() == "ready"
    ledger = await reopen(path)
    first = await ledger.open_transition(intent("glm"))
    await ledger.put_engine(EngineRecord("glm", State.WAKING))
    await ledger.close()

    ledger = await reopen(path)
    recovered = await ledger.recover()
    assert [t.id for t in recovered.open_transitions] == [first]
    assert recovered.engines["glm"].state is State.WAKING
    await ledger.close_transition(first, Outcome("resolved", State.ASLEEP, "the service died meanwhile"))
    assert (await ledger.recover()).open_transitions == ()
    lives = (await ledger.query("lives", filters={})).rows
    assert [life["ended_at_wall_s"] is None for life in lives] == [True, False, True]  # now, closed, killed
    assert lives[2]["pid"] == holder.pid
    await ledger.close()


async def test_five_killed_lives_in_a_row_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    opened: set[int] = set()
    closed: set[int] = set()
    for life in range(5):
        async with child("write", path) as writer:
            lines = [await writer.line() for _ in range(20 + 7 * life)]
            lines += await writer.kill()
        opened |= said(lines, "opened")
        closed |= said(lines, "closed")
    ledger = await reopen(path)
    journal = await results(ledger)
    assert opened <= set(journal)
    assert {transition for transition, result in journal.items() if result == "ok"} >= closed
    assert len((await ledger.recover()).open_transitions) <= 5
    await ledger.close()
