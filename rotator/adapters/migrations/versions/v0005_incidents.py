"""Incidents, and when engines failed of late.

Why: what went wrong is told long after, and a breaker must not forget with every restart.
"""

import sqlalchemy as sa
from alembic import op

revision = "v0005"
down_revision = "v0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "incidents",
        sa.Column("id", sa.String(length=191), nullable=False),
        sa.Column("opened_wall_s", sa.Float(precision=53), nullable=False),
        sa.Column("closed_wall_s", sa.Float(precision=53), nullable=True),
        sa.Column("kind", sa.String(length=32), nullable=False),
        sa.Column("severity", sa.String(length=32), nullable=False),
        sa.Column("engine", sa.String(length=191), nullable=True),
        sa.Column("gpu", sa.String(length=191), nullable=True),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("advice", sa.Text(), nullable=False),
        sa.Column("outcome", sa.Text(), nullable=False),
        sa.Column("count", sa.Integer(), nullable=False),
        sa.Column("bundle_bytes", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_incidents")),
    )
    op.create_index(op.f("ix_incidents_opened_wall_s"), "incidents", ["opened_wall_s"])
    op.create_index(op.f("ix_incidents_engine_opened_wall_s"), "incidents", ["engine", "opened_wall_s"])
    with op.batch_alter_table("engines") as table:
        table.add_column(sa.Column("faults", sa.JSON(), nullable=True))


def downgrade() -> None:
    with op.batch_alter_table("engines") as table:
        table.drop_column("faults")
    op.drop_table("incidents")
