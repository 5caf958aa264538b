"""What a wake costs by depth, and what an engine's requests have taught.

Why: the ladder is priced by both, and neither should begin anew with every restart.
"""

import sqlalchemy as sa
from alembic import op

revision = "v0003"
down_revision = "v0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("engines") as table:
        table.add_column(sa.Column("wake_costs", sa.JSON(), nullable=True))
        table.add_column(sa.Column("history", sa.JSON(), nullable=True))


def downgrade() -> None:
    with op.batch_alter_table("engines") as table:
        table.drop_column("history")
        table.drop_column("wake_costs")
