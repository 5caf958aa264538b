"""Questions to the ledger: which rows, in which order, from where. Checked here, so that a wrong one is a ValueError.

Paging is by key: a cursor names the last row seen, so rows that arrive meanwhile shift nothing.
"""

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, cast

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    ColumnElement,
    Connection,
    Float,
    Integer,
    Select,
    Table,
    and_,
    or_,
    select,
)

from rotator.adapters.ledger_tables import (
    BASELINES,
    DECISIONS,
    ENGINES,
    GPUS,
    INCIDENTS,
    LEASES,
    LIVES,
    NODES,
    REQUESTS,
    RESERVATIONS,
    RESIDENCIES,
    TRANSITIONS,
    VRAM_SAMPLES,
)
from rotator.ports import Page

LIMIT_MAX = 1000


@dataclass(frozen=True, slots=True)
class Shelf:
    """One table as it is asked: ``order`` (all descending) identifies a row, ``time`` is what since and until bound."""

    table: Table
    order: tuple[str, ...]
    time: str
    hidden: tuple[str, ...] = ()

    @property
    def columns(self) -> list[Column[Any]]:
        return [column for column in self.table.c if column.name not in self.hidden]

    @property
    def filters(self) -> tuple[str, ...]:
        return tuple(column.name for column in self.columns if not isinstance(column.type, JSON))


SHELVES: Mapping[str, Shelf] = {
    "gpus": Shelf(GPUS, ("updated_at_wall_s", "id"), "updated_at_wall_s"),
    "engines": Shelf(ENGINES, ("updated_at_wall_s", "engine"), "updated_at_wall_s"),
    "residencies": Shelf(RESIDENCIES, ("updated_at_wall_s", "engine", "gpu"), "updated_at_wall_s"),
    "leases": Shelf(LEASES, ("updated_at_wall_s", "gpu", "holder"), "updated_at_wall_s"),
    "transitions": Shelf(TRANSITIONS, ("id",), "opened_at_wall_s"),
    "decisions": Shelf(DECISIONS, ("at_wall_s", "swap_id"), "at_wall_s"),
    "reservations": Shelf(RESERVATIONS, ("id",), "begins_wall_s"),
    "baselines": Shelf(BASELINES, ("at_wall_s", "engine", "version"), "at_wall_s"),
    "incidents": Shelf(INCIDENTS, ("opened_wall_s", "id"), "opened_wall_s"),
    "vram_samples": Shelf(VRAM_SAMPLES, ("id",), "at_wall_s"),
    "requests": Shelf(REQUESTS, ("minute_wall_s", "model"), "minute_wall_s"),
    "nodes": Shelf(NODES, ("updated_at_wall_s", "name"), "updated_at_wall_s"),
    "lives": Shelf(LIVES, ("id",), "started_at_wall_s", hidden=("holds", "beat", "ballast")),
}


@dataclass(frozen=True, slots=True)
class Question:
    """A question that was checked and can be asked."""

    name: str
    shelf: Shelf
    statement: Select[Any]
    limit: int


def question(table: str, filters: Mapping[str, str], limit: int, cursor: str | None) -> Question:
    """Raises ValueError, naming what exists, for an unknown table or filter, a bad value or a foreign cursor."""
    shelf = SHELVES.get(table)
    if shelf is None:
        raise ValueError(f"no table '{table}' in the ledger: it has {', '.join(SHELVES)}")
    limit = max(1, min(LIMIT_MAX, limit))
    conditions = [_condition(table, shelf, name, value) for name, value in filters.items()]
    if cursor is not None:
        conditions.append(_after(shelf, _decode(table, shelf, cursor)))
    order = [shelf.table.c[name].desc() for name in shelf.order]
    # One row more than asked for tells whether there is a next page.
    return Question(table, shelf, select(*shelf.columns).where(*conditions).order_by(*order).limit(limit + 1), limit)


def answer(connection: Connection, asked: Question) -> Page:
    rows = [dict(row) for row in connection.execute(asked.statement).mappings()]
    more = len(rows) > asked.limit
    rows = rows[: asked.limit]
    return Page(rows=tuple(rows), next_cursor=_encode(asked, rows[-1]) if more else None)


def _condition(table: str, shelf: Shelf, name: str, value: str) -> ColumnElement[bool]:
    if name == "since":
        return shelf.table.c[shelf.time] >= moment(name, value)
    if name == "until":
        return shelf.table.c[shelf.time] < moment(name, value)
    if name not in shelf.filters:
        raise ValueError(f"no filter '{name}' for {table}: there are {', '.join((*shelf.filters, 'since', 'until'))}")
    column = shelf.table.c[name]
    return column == _value(column, value)


def _value(column: Column[Any], value: str) -> str | int | float | bool:
    kind = column.type
    try:
        if isinstance(kind, Boolean):
            return {"true": True, "1": True, "false": False, "0": False}[value.lower()]
        if isinstance(kind, (Integer, BigInteger)):
            return _integer(value)
        if isinstance(kind, Float):
            return float(value)
    except (ValueError, KeyError):
        wanted = "true or false" if isinstance(kind, Boolean) else "a number"
        raise ValueError(f"filter '{column.name}' takes {wanted}, not '{value}'") from None
    return value


def _integer(value: str) -> int:
    number = int(value)
    if abs(number) >= 1 << 63:
        raise ValueError(value)
    return number


def moment(name: str, value: str) -> float:
    """Unix seconds, or ISO 8601 (UTC where it names no zone)."""
    try:
        return float(value)
    except ValueError:
        pass
    try:
        moment = datetime.fromisoformat(value)
    except ValueError:
        raise ValueError(f"'{name}' takes Unix seconds or a time such as 2026-01-31T12:00:00Z, not '{value}'") from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _after(shelf: Shelf, last: list[Any]) -> ColumnElement[bool]:
    """Rows that come after the row with these key values, every column descending."""
    columns = [shelf.table.c[name] for name in shelf.order]
    return or_(
        *(
            and_(*(c == v for c, v in zip(columns[:i], last[:i], strict=True)), columns[i] < last[i])
            for i in range(len(columns))
        )
    )


def _encode(asked: Question, row: Mapping[str, Any]) -> str:
    key = [asked.name, *(row[name] for name in asked.shelf.order)]
    return base64.urlsafe_b64encode(json.dumps(key, separators=(",", ":")).encode()).decode().rstrip("=")


def _decode(table: str, shelf: Shelf, cursor: str) -> list[Any]:
    try:
        name, *key = cast("list[Any]", json.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4))))
    except (binascii.Error, ValueError, TypeError):
        name, key = None, []
    columns = [shelf.table.c[column] for column in shelf.order]
    if name != table or len(key) != len(columns) or not all(map(_is_key, columns, key)):
        raise ValueError(f"'cursor' is none that a page of {table} gave: leave it out to begin at the newest row")
    return key


def _is_key(column: Column[Any], value: Any) -> bool:
    if issubclass(column.type.python_type, str):
        return isinstance(value, str)
    return isinstance(value, (int, float)) and abs(value) < 1 << 63
