"""Lives of the service: who holds the ledger. One row a start; the row that ``holds`` is the service that may write.

A SQLite file is guarded by its lock, so whoever gets here may take it. Other databases have no lock that every one of
them knows: there the holder beats, and a newcomer takes over only from one that is dead or was seen not to beat.
"""

import os
import socket
from dataclasses import dataclass

from sqlalchemy import Connection, insert, select, update
from sqlalchemy.exc import IntegrityError

from rotator.adapters.ledger_tables import LIVES, new_id
from rotator.ports import LedgerError

BEAT_EVERY_S = 3.0
WATCH_S = 4 * BEAT_EVERY_S  # a holder that did not beat for this long is taken for dead

# A probe must need more room than the writes it speaks for: a row of the journal with its plan is a few pages.
_BALLAST_BYTES = 32 * 1024


class Lost(LedgerError):
    """Another service holds the ledger now: whatever this one would write is no longer true."""

    def __init__(self) -> None:
        super().__init__("the ledger was taken over by another service: this one must not act any more; stop it")


@dataclass(frozen=True, slots=True)
class Holder:
    """The life that holds the ledger now."""

    id: int
    pid: int
    host: str
    beat: int

    @property
    def is_surely_dead(self) -> bool:
        return self.host == socket.gethostname() and not _is_running(self.pid)


def holder(connection: Connection) -> Holder | None:
    row = connection.execute(
        select(LIVES.c.id, LIVES.c.pid, LIVES.c.host, LIVES.c.beat).where(LIVES.c.holds == 1)
    ).one_or_none()
    return None if row is None else Holder(*row)


def begin(connection: Connection, now_wall_s: float, *, seen: Holder | None) -> int:
    """Take the ledger over from ``seen`` (as it was seen) and return this life's id.

    Raises LedgerError when it has beaten since, or another was quicker.
    """
    if seen is not None:
        taken = update(LIVES).where(LIVES.c.id == seen.id, LIVES.c.beat == seen.beat).values(holds=None)
        if connection.execute(taken).rowcount == 0:
            raise held_by(seen)
    row = {"holds": 1, "pid": os.getpid(), "host": socket.gethostname(), "started_at_wall_s": now_wall_s}
    try:
        result = connection.execute(insert(LIVES).values(**row, beat=0, ballast=""))
    except IntegrityError:
        raise LedgerError("the ledger was taken by another service just now: two must not rotate one fleet") from None
    return new_id(result)


def held_by(other: Holder) -> LedgerError:
    return LedgerError(
        f"the ledger is held by process {other.pid} on {other.host}: two services must not rotate one fleet; "
        "stop it first, or give this one its own ledger.url"
    )


def beat(connection: Connection, life: int) -> None:
    """Show that this life goes on. Raises Lost when the ledger was taken from it."""
    _touch(connection, life, {"beat": LIVES.c.beat + 1})


def probe(connection: Connection, life: int) -> None:
    """A write that is larger than any intent: when it fits, so does the next transition's row."""
    _touch(connection, life, {"beat": LIVES.c.beat + 1, "ballast": "." * _BALLAST_BYTES})


def end(connection: Connection, life: int, now_wall_s: float) -> None:
    ended = update(LIVES).where(LIVES.c.id == life).values(ended_at_wall_s=now_wall_s, holds=None, ballast="")
    connection.execute(ended)


def _touch(connection: Connection, life: int, values: dict[str, object]) -> None:
    if connection.execute(update(LIVES).where(LIVES.c.id == life, LIVES.c.holds == 1).values(**values)).rowcount == 0:
        raise Lost


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
