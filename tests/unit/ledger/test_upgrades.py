"""An upgrade keeps what there was: from the first schema to today's, row by row."""

from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command

from rotator.adapters.ledger_database import Database, _alembic, head_revision, known_revisions, parse
from rotator.ports import LedgerError


def filled(path: Path, revision: str) -> dict[str, list[dict[str, Any]]]:
    """A ledger of this schema with a row in every table. Returns the rows by table."""
    engine = sa.create_engine(f"sqlite:///{path}")
    config = _alembic()
    rows: dict[str, list[dict[str, Any]]] = {}
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
        tables = sa.MetaData()
        tables.reflect(connection)
        for table in tables.sorted_tables:
            if table.name != "alembic_version":
                connection.execute(table.insert().values({c.name: _value(c) for c in table.columns}))
                rows[table.name] = [dict(r) for r in connection.execute(sa.select(table)).mappings()]
    engine.dispose()
    return rows


def _value(column: sa.Column[Any]) -> Any:
    """The same for a key and for what refers to it, so that every reference holds."""
    if isinstance(column.type, sa.JSON):
        return {"kept": 1}
    if isinstance(column.type, sa.Boolean):
        return True
    if isinstance(column.type, sa.Integer | sa.Float):
        return 1
    return "kept"


def kept(path: Path, table: str, columns: list[str]) -> list[dict[str, Any]]:
    engine = sa.create_engine(f"sqlite:///{path}")
    with engine.connect() as connection:
        reflected = sa.Table(table, sa.MetaData(), autoload_with=connection)
        rows = connection.execute(sa.select(*(reflected.c[name] for name in columns))).mappings()
        found = [dict(row) for row in rows]
    engine.dispose()
    return found


@pytest.mark.parametrize("revision", sorted(known_revisions()))
def test_a_ledger_of_any_earlier_schema_is_brought_up_to_date_and_keeps_every_row(
    tmp_path: Path, revision: str
) -> None:
    path = tmp_path / "ledger.db"
    before = filled(path, revision)
    assert {"engines", "gpus", "transitions", "lives"} <= before.keys()
    database = Database(parse(f"sqlite:///{path}"), busy_s=1)
    database.open()
    database.close()
    assert kept(path, "alembic_version", ["version_num"]) == [{"version_num": head_revision()}]
    for table, rows in before.items():
        assert kept(path, table, list(rows[0])) == rows, f"{table} is not what it was"


def test_a_ledger_of_a_schema_to_come_is_refused_and_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    before = filled(path, "head")
    engine = sa.create_engine(f"sqlite:///{path}")
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = 'v9999'"))
    engine.dispose()
    with pytest.raises(LedgerError, match="newer rotator"):
        Database(parse(f"sqlite:///{path}"), busy_s=1).open()
    assert kept(path, "alembic_version", ["version_num"]) == [{"version_num": "v9999"}]
    assert all(kept(path, table, list(rows[0])) == rows for table, rows in before.items())
