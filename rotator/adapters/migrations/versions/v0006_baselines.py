"""What versions of engines were measured to do.

Why: a new version is compared with the one before it, which by then no longer runs.
"""

import sqlalchemy as sa
from alembic import op

revision = "v0006"
down_revision = "v0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "baselines",
        sa.Column("engine", sa.String(length=191), nullable=False),
        sa.Column("version", sa.String(length=32), nullable=False),
        sa.Column("described", sa.JSON(), nullable=False),
        sa.Column("measured", sa.JSON(), nullable=False),
        sa.Column("at_wall_s", sa.Float(precision=53), nullable=False),
        sa.PrimaryKeyConstraint("engine", "version", name=op.f("pk_baselines")),
    )
    op.create_index(op.f("ix_baselines_at_wall_s"), "baselines", ["at_wall_s"])


def downgrade() -> None:
    op.drop_table("baselines")
