"""Reservations, and what decisions were made from.

Why: a reservation survives a restart; a replay plans again from what the planner saw. ``requests`` and ``transitions``
are unchanged: their retention needs no schema.
"""

import sqlalchemy as sa
from alembic import op

revision = "v0002"
down_revision = "v0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "reservations",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("engines", sa.JSON(), nullable=False),
        sa.Column("begins_wall_s", sa.Float(precision=53), nullable=False),
        sa.Column("ends_wall_s", sa.Float(precision=53), nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("note", sa.Text(), nullable=False),
        sa.Column("created_at_wall_s", sa.Float(precision=53), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_reservations")),
    )
    op.create_index(op.f("ix_reservations_ends_wall_s"), "reservations", ["ends_wall_s"], unique=False)
    op.create_table(
        "decisions",
        sa.Column("swap_id", sa.String(length=191), nullable=False),
        sa.Column("at_wall_s", sa.Float(precision=53), nullable=False),
        sa.Column("snapshot", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("swap_id", name=op.f("pk_decisions")),
    )
    op.create_index(op.f("ix_decisions_at_wall_s"), "decisions", ["at_wall_s"], unique=False)


def downgrade() -> None:
    op.drop_index(op.f("ix_decisions_at_wall_s"), table_name="decisions")
    op.drop_table("decisions")
    op.drop_index(op.f("ix_reservations_ends_wall_s"), table_name="reservations")
    op.drop_table("reservations")
