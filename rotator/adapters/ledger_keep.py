"""Reservations, what decisions were made from, and what is thrown away when it is old. Functions of a connection, like
``ledger_rows``."""

from typing import Any

from sqlalchemy import Connection, Table, and_, delete, insert, select

from rotator.adapters.ledger_tables import (
    DECISIONS,
    INCIDENTS,
    OPEN,
    REQUESTS,
    RESERVATIONS,
    TRANSITIONS,
    VRAM_SAMPLES,
    new_id,
)
from rotator.ports import Incident, Intent, Reservation

INCIDENTS_RECOVERED_MAX = 500
_OVER = INCIDENTS.c.closed_wall_s.isnot(None)
DECISION_CHARS_MAX = 60_000  # what the smallest text column of any database holds


def add_reservation(connection: Connection, made: Reservation, now_wall_s: float) -> int:
    row = {
        "engines": list(made.engines),
        "begins_wall_s": made.begins_wall_s,
        "ends_wall_s": made.ends_wall_s,
        "priority": made.priority,
        "note": made.note,
        "created_at_wall_s": now_wall_s,
    }
    return new_id(connection.execute(insert(RESERVATIONS), row))


def drop_reservation(connection: Connection, id: int) -> bool:
    """Whether it was there."""
    return connection.execute(delete(RESERVATIONS).where(RESERVATIONS.c.id == id)).rowcount > 0


def reservations(connection: Connection, now_wall_s: float) -> tuple[Reservation, ...]:
    """Those that have not ended."""
    c = RESERVATIONS.c
    rows = connection.execute(select(RESERVATIONS).where(c.ends_wall_s > now_wall_s).order_by(c.begins_wall_s, c.id))
    return tuple(Reservation(tuple(r.engines), r.begins_wall_s, r.ends_wall_s, r.priority, r.note, r.id) for r in rows)


def incidents(connection: Connection) -> tuple[Incident, ...]:
    """The latest, newest first, and all that are open."""
    c = INCIDENTS.c
    latest = select(INCIDENTS).order_by(c.closed_wall_s.isnot(None), c.opened_wall_s.desc())
    rows = connection.execute(latest.limit(INCIDENTS_RECOVERED_MAX)).mappings()
    return tuple(sorted((Incident(**row) for row in rows), key=lambda i: -i.opened_wall_s))


def put_decision(connection: Connection, intent: Intent, now_wall_s: float) -> None:
    """What the swap was decided from, once a swap. Too large a one is left out: the journal itself is whole."""
    if intent.decision is None or len(intent.decision) > DECISION_CHARS_MAX:
        return
    here = select(DECISIONS.c.swap_id).where(DECISIONS.c.swap_id == intent.swap_id)
    if connection.execute(here).first() is None:
        row = {"swap_id": intent.swap_id, "at_wall_s": intent.at_wall_s or now_wall_s, "snapshot": intent.decision}
        connection.execute(insert(DECISIONS), row)


def drop_old_samples(connection: Connection, before_wall_s: float, batch: int) -> int:
    """Delete at most ``batch`` samples older than ``before_wall_s``, the oldest first; returns how many."""
    return _drop(connection, VRAM_SAMPLES, ("id",), "at_wall_s", before_wall_s, batch)


def drop_old_journal(connection: Connection, before_wall_s: float, batch: int) -> int:
    """Delete at most ``batch`` rows of each table that tells of what is over; returns the most of any. A transition
    without an outcome stays, however old it is: a restart must see to it."""
    return max(
        _drop(connection, TRANSITIONS, ("id",), "opened_at_wall_s", before_wall_s, batch, TRANSITIONS.c.result != OPEN),
        _drop(connection, DECISIONS, ("swap_id",), "at_wall_s", before_wall_s, batch),
        _drop(connection, REQUESTS, ("model", "minute_wall_s"), "minute_wall_s", before_wall_s, batch),
        _drop(connection, INCIDENTS, ("id",), "opened_wall_s", before_wall_s, batch, _OVER),
        _drop(connection, RESERVATIONS, ("id",), "ends_wall_s", before_wall_s, batch),
    )


def _drop(
    connection: Connection, table: Table, key: tuple[str, ...], time: str, before_wall_s: float, batch: int, *also: Any
) -> int:
    columns = [table.c[name] for name in key]
    old = select(*columns).where(table.c[time] < before_wall_s, *also).order_by(table.c[time]).limit(batch)
    rows = connection.execute(old).all()
    if rows and len(key) == 1:
        connection.execute(delete(table).where(columns[0].in_([row[0] for row in rows])))
    for row in rows if len(key) > 1 else ():
        connection.execute(delete(table).where(and_(*(c == v for c, v in zip(columns, row, strict=True)))))
    return len(rows)
