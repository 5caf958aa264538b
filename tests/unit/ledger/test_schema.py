"""Models and migrations say the same."""

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, insert, inspect
from sqlalchemy.exc import IntegrityError
from sqlalchemy.pool import StaticPool

from rotator.adapters.ledger_database import Database, head_revision, parse
from rotator.adapters.ledger_tables import METADATA, RESIDENCIES


def test_migrations_lead_to_exactly_the_tables_of_the_code() -> None:
    database = Database(parse("sqlite://"), busy_s=1)
    database.open()
    with database.write() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, METADATA) == []
        assert context.get_current_revision() == head_revision()
    database.close()


def test_migrations_name_their_constraints_as_the_code_does() -> None:
    database = Database(parse("sqlite://"), busy_s=1)
    database.open()
    made = create_engine("sqlite://", poolclass=StaticPool)
    METADATA.create_all(made)

    def names(inspector: object) -> set[str | None]:
        found: set[str | None] = set()
        for table in METADATA.tables:
            found |= {c["name"] for c in inspector.get_foreign_keys(table)}  # type: ignore[attr-defined]
            found |= {c["name"] for c in inspector.get_unique_constraints(table)}  # type: ignore[attr-defined]
            found |= {c["name"] for c in inspector.get_indexes(table)}  # type: ignore[attr-defined]
        return found

    with database.write() as connection:
        migrated = names(inspect(connection))
    assert migrated == names(inspect(made))
    assert "fk_residencies_gpu" in migrated
    made.dispose()
    database.close()


def test_opening_a_ledger_of_this_schema_again_changes_nothing() -> None:
    database = Database(parse("sqlite://"), busy_s=1)
    database.open()
    database.open()
    with database.read() as connection:
        assert MigrationContext.configure(connection).get_current_revision() == head_revision()
    database.close()


def test_a_row_that_refers_to_nothing_is_refused() -> None:
    database = Database(parse("sqlite://"), busy_s=1)
    database.open()
    orphan = insert(RESIDENCIES).values(engine="nobody", gpu="none", held_bytes=1, updated_at_wall_s=0.0)
    with pytest.raises(IntegrityError), database.write() as connection:
        connection.execute(orphan)
    database.close()
