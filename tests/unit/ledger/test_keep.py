"""Reservations, decisions, and what is thrown away when it is old."""

from rotator.adapters import ledger as module
from rotator.adapters.ledger import SqlLedger
from rotator.adapters.ledger_keep import DECISION_CHARS_MAX, drop_old_journal
from rotator.ports import Reservation
from tests.unit.ledger.values import Clock, intent, outcome

DAY_S = 86400.0


async def test_reservations_are_there_after_a_restart_until_they_end(ledger: SqlLedger, clock: Clock) -> None:
    now_s = clock.now_s
    later = Reservation(("glm",), now_s + 7200, now_s + 10800, 3, "evaluation")
    soon = Reservation(("glm", "coder"), now_s + 3600, now_s + 7200)
    ids = [await ledger.add_reservation(made) for made in (later, soon)]
    kept = (await ledger.recover()).reservations
    assert [(r.id, r.engines, r.note, r.priority) for r in kept] == [
        (ids[1], ("glm", "coder"), "", 0),
        (ids[0], ("glm",), "evaluation", 3),
    ]
    clock.now_s = now_s + 7200
    assert [r.id for r in (await ledger.recover()).reservations] == [ids[0]]


async def test_a_reservation_is_dropped_once(ledger: SqlLedger, clock: Clock) -> None:
    id = await ledger.add_reservation(Reservation(("glm",), clock.now_s, clock.now_s + 60))
    assert await ledger.drop_reservation(id)
    assert not await ledger.drop_reservation(id)
    assert (await ledger.recover()).reservations == ()


async def test_a_decision_is_written_once_a_swap(ledger: SqlLedger) -> None:
    await ledger.open_transition(intent("a", "s1", decision="packed"))
    await ledger.open_transition(intent("b", "s1", decision="other"))
    await ledger.open_transition(intent("c", "s2"))
    rows = (await ledger.query("decisions", filters={})).rows
    assert [(r["swap_id"], r["snapshot"]) for r in rows] == [("s1", "packed")]


async def test_a_decision_too_large_for_its_column_is_left_out_and_the_intent_stays(ledger: SqlLedger) -> None:
    await ledger.open_transition(intent("a", "s1", decision="x" * (DECISION_CHARS_MAX + 1)))
    assert (await ledger.query("decisions", filters={})).rows == ()
    assert len((await ledger.query("transitions", filters={})).rows) == 1


async def test_what_is_over_is_dropped_after_its_time_and_what_is_open_stays(ledger: SqlLedger, clock: Clock) -> None:
    now_s = clock.now_s
    closed = await ledger.open_transition(intent("a", "s1", decision="d", at_wall_s=now_s))
    await ledger.close_transition(closed, outcome())
    await ledger.open_transition(intent("b", "s2", at_wall_s=now_s))
    await ledger.add_reservation(Reservation(("a",), now_s - 60, now_s))
    ledger.count_request("a", waited_s=1.0, outcome="ok")
    await ledger.flush()
    clock.now_s = now_s + 31 * DAY_S
    fresh = await ledger.open_transition(intent("c", "s3", decision="d"))
    await ledger._retain()
    kept = {table: len((await ledger.query(table, filters={})).rows) for table in _TABLES}
    assert kept == {"transitions": 2, "decisions": 1, "requests": 0, "reservations": 0}
    left = {r["engine"]: r["id"] for r in (await ledger.query("transitions", filters={})).rows}
    assert left["c"] == fresh
    assert "b" in left


_TABLES = ("transitions", "decisions", "requests", "reservations")


async def test_old_rows_go_in_small_batches_the_oldest_first(ledger: SqlLedger, clock: Clock) -> None:
    for n in range(5):
        id = await ledger.open_transition(intent("a", f"s{n}", at_wall_s=clock.now_s + n))
        await ledger.close_transition(id, outcome())
    dropped = await ledger._write(lambda c: drop_old_journal(c, clock.now_s + 100, 2))
    assert dropped == 2
    left = [r["swap_id"] for r in (await ledger.query("transitions", filters={})).rows]
    assert left == ["s4", "s3", "s2"]
    assert module.RETENTION_BATCH_MAX <= 1000
