"""Alembic's entry: it always runs on the connection that the ledger holds, never on one of its own."""

from alembic import context

from rotator.adapters.ledger_tables import METADATA

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=METADATA,
    render_as_batch=True,  # SQLite can alter a table only by making it anew
)
with context.begin_transaction():
    context.run_migrations()
