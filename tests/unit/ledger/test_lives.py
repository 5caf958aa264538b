"""Who holds a ledger that has no file lock: beats, takeover, and the end of a life that was taken over."""

import os
from collections.abc import Iterator
from dataclasses import replace

import pytest

from rotator.adapters import ledger_lives as lives
from rotator.adapters.ledger import SqlLedger
from rotator.adapters.ledger_database import Database, parse
from rotator.ports import LedgerError
from tests.unit.ledger.values import intent


@pytest.fixture
def database() -> Iterator[Database]:
    opened = Database(parse("sqlite://"), busy_s=1)
    opened.open()
    yield opened
    opened.close()


def begin(database: Database, seen: lives.Holder | None) -> int:
    with database.write() as connection:
        return lives.begin(connection, 1.0, seen=seen)


def holder(database: Database) -> lives.Holder:
    with database.read() as connection:
        found = lives.holder(connection)
    assert found is not None
    return found


def test_a_second_service_cannot_begin_beside_the_first(database: Database) -> None:
    begin(database, None)
    with pytest.raises(LedgerError, match="two must not rotate one fleet"):
        begin(database, None)


def test_a_holder_that_beat_since_it_was_seen_is_not_taken_over(database: Database) -> None:
    first = begin(database, None)
    seen = holder(database)
    with database.write() as connection:
        lives.beat(connection, first)
    with pytest.raises(LedgerError, match=f"held by process {os.getpid()} on "):
        begin(database, seen)
    assert holder(database).id == first


def test_a_silent_holder_is_taken_over_and_can_write_no_beat_afterwards(database: Database) -> None:
    first = begin(database, None)
    second = begin(database, holder(database))
    assert holder(database).id == second
    for touch in (lives.beat, lives.probe):
        with pytest.raises(lives.Lost, match="must not act any more"), database.write() as connection:
            touch(connection, first)


def test_only_a_process_of_this_host_that_is_gone_is_surely_dead(database: Database) -> None:
    begin(database, None)
    alive = holder(database)
    assert not alive.is_surely_dead
    assert not replace(alive, host="elsewhere", pid=1 << 22).is_surely_dead
    assert replace(alive, pid=(1 << 22) + 1).is_surely_dead  # larger than any process id


def test_a_life_that_ended_leaves_the_ledger_free(database: Database) -> None:
    first = begin(database, None)
    with database.write() as connection:
        lives.end(connection, first, 2.0)
    assert begin(database, None) != first


async def test_a_service_that_was_taken_over_starts_no_transition_and_stays_unhealthy(ledger: SqlLedger) -> None:
    assert ledger.healthy
    with ledger._database.write() as connection:
        lives.begin(connection, 2.0, seen=lives.holder(connection))
    with pytest.raises(lives.Lost, match="must not act any more"):
        await ledger.open_transition(intent())
    assert await ledger.probe() is False
    with pytest.raises(lives.Lost):
        await ledger.put_cordon("g0", True, "")
