"""GPUs of more than one machine, and the machines.

Why: a node whose agent does not answer at the service's start must still be known, with its GPUs. The GPUs that a
ledger already has are the service's own machine's, whose name is empty.
"""

import sqlalchemy as sa
from alembic import op

revision = "v0004"
down_revision = "v0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # In place: made anew, the table would have to be dropped while residencies refer to its rows.
    with op.batch_alter_table("gpus", recreate="never") as table:
        table.add_column(sa.Column("node", sa.String(length=191), nullable=False, server_default=sa.text("''")))
    op.create_table(
        "nodes",
        sa.Column("name", sa.String(length=191), nullable=False),
        sa.Column("agent", sa.Text(), nullable=False),
        sa.Column("boot_id", sa.String(length=64), nullable=False),
        sa.Column("host_bytes", sa.BigInteger(), nullable=False),
        sa.Column("reachable", sa.Boolean(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("seen_at_wall_s", sa.Float(precision=53), nullable=False),
        sa.Column("updated_at_wall_s", sa.Float(precision=53), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_nodes")),
    )


def downgrade() -> None:
    op.drop_table("nodes")
    with op.batch_alter_table("gpus") as table:
        table.drop_column("node")
