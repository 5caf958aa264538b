"""The first schema.

Why: the ledger begins here.
"""

import sqlalchemy as sa
from alembic import op

revision = "v0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "engines",
        sa.Column("engine", sa.String(length=191), nullable=False),
        sa.Column("state", sa.String(length=32), nullable=False),
        sa.Column("depth", sa.String(length=32), nullable=True),
        sa.Column("level", sa.Integer(), nullable=True),
        sa.Column("launcher", sa.String(length=32), nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("ref", sa.JSON(), nullable=False),
        sa.Column("spec_hash", sa.String(length=64), nullable=False),
        sa.Column("version", sa.String(length=64), nullable=False),
        sa.Column("canary", sa.JSON(), nullable=True),
        sa.Column("failures", sa.Integer(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("wake_s", sa.Float(precision=53), nullable=True),
        sa.Column("sleep_s", sa.Float(precision=53), nullable=True),
        sa.Column("start_s", sa.Float(precision=53), nullable=True),
        sa.Column("updated_at_wall_s", sa.Float(precision=53), nullable=False),
        sa.PrimaryKeyConstraint("engine", name=op.f("pk_engines")),
    )
    op.create_table(
        "gpus",
        sa.Column("id", sa.String(length=191), nullable=False),
        sa.Column("index", sa.Integer(), nullable=True),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("total_bytes", sa.BigInteger(), nullable=False),
        sa.Column("compute_capability", sa.String(length=32), nullable=False),
        sa.Column("pci_bus_id", sa.String(length=64), nullable=False),
        sa.Column("unified_memory", sa.Boolean(), nullable=False),
        sa.Column("cordoned", sa.Boolean(), nullable=False),
        sa.Column("cordon_reason", sa.Text(), nullable=False),
        sa.Column("updated_at_wall_s", sa.Float(precision=53), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_gpus")),
    )
    op.create_table(
        "lives",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("holds", sa.Integer(), nullable=True),
        sa.Column("pid", sa.Integer(), nullable=False),
        sa.Column("host", sa.String(length=191), nullable=False),
        sa.Column("started_at_wall_s", sa.Float(precision=53), nullable=False),
        sa.Column("ended_at_wall_s", sa.Float(precision=53), nullable=True),
        sa.Column("beat", sa.BigInteger(), nullable=False),
        sa.Column("ballast", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_lives")),
        sa.UniqueConstraint("holds", name=op.f("uq_lives_holds")),
    )
    op.create_table(
        "requests",
        sa.Column("model", sa.String(length=191), nullable=False),
        sa.Column("minute_wall_s", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("requests", sa.BigInteger(), nullable=False),
        sa.Column("failed", sa.BigInteger(), nullable=False),
        sa.Column("client_left", sa.BigInteger(), nullable=False),
        sa.Column("waited_s_sum", sa.Float(precision=53), nullable=False),
        sa.Column("waited_s_max", sa.Float(precision=53), nullable=False),
        sa.PrimaryKeyConstraint("model", "minute_wall_s", name=op.f("pk_requests")),
    )
    op.create_index(op.f("ix_requests_minute_wall_s"), "requests", ["minute_wall_s"], unique=False)
    op.create_table(
        "vram_samples",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("at_wall_s", sa.Float(precision=53), nullable=False),
        sa.Column("gpu", sa.String(length=191), nullable=False),
        sa.Column("used_bytes", sa.BigInteger(), nullable=False),
        sa.Column("by_holder", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_vram_samples")),
    )
    op.create_index(op.f("ix_vram_samples_at_wall_s"), "vram_samples", ["at_wall_s"], unique=False)
    op.create_index(op.f("ix_vram_samples_gpu_id"), "vram_samples", ["gpu", "id"], unique=False)
    op.create_table(
        "leases",
        sa.Column("gpu", sa.String(length=191), nullable=False),
        sa.Column("holder", sa.String(length=191), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("expires_wall_s", sa.Float(precision=53), nullable=True),
        sa.Column("updated_at_wall_s", sa.Float(precision=53), nullable=False),
        sa.ForeignKeyConstraint(["gpu"], ["gpus.id"], name=op.f("fk_leases_gpu")),
        sa.PrimaryKeyConstraint("gpu", "holder", name=op.f("pk_leases")),
    )
    op.create_table(
        "residencies",
        sa.Column("engine", sa.String(length=191), nullable=False),
        sa.Column("gpu", sa.String(length=191), nullable=False),
        sa.Column("planned_awake_bytes", sa.BigInteger(), nullable=True),
        sa.Column("awake_bytes", sa.BigInteger(), nullable=True),
        sa.Column("residue_bytes", sa.BigInteger(), nullable=True),
        sa.Column("held_bytes", sa.BigInteger(), nullable=False),
        sa.Column("updated_at_wall_s", sa.Float(precision=53), nullable=False),
        sa.ForeignKeyConstraint(["engine"], ["engines.engine"], name=op.f("fk_residencies_engine")),
        sa.ForeignKeyConstraint(["gpu"], ["gpus.id"], name=op.f("fk_residencies_gpu")),
        sa.PrimaryKeyConstraint("engine", "gpu", name=op.f("pk_residencies")),
    )
    op.create_table(
        "transitions",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("life", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("swap_id", sa.String(length=191), nullable=False),
        sa.Column("engine", sa.String(length=191), nullable=False),
        sa.Column("action", sa.String(length=32), nullable=False),
        sa.Column("from_state", sa.String(length=32), nullable=False),
        sa.Column("to_state", sa.String(length=32), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("plan", sa.JSON(), nullable=False),
        sa.Column("opened_at_wall_s", sa.Float(precision=53), nullable=False),
        sa.Column("result", sa.String(length=32), nullable=False),
        sa.Column("state", sa.String(length=32), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("phases_s", sa.JSON(), nullable=False),
        sa.Column("bytes_before", sa.JSON(), nullable=False),
        sa.Column("bytes_after", sa.JSON(), nullable=False),
        sa.Column("closed_at_wall_s", sa.Float(precision=53), nullable=True),
        sa.Column("duration_s", sa.Float(precision=53), nullable=True),
        sa.ForeignKeyConstraint(["life"], ["lives.id"], name=op.f("fk_transitions_life")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_transitions")),
    )
    op.create_index(op.f("ix_transitions_engine_id"), "transitions", ["engine", "id"], unique=False)
    op.create_index(op.f("ix_transitions_opened_at_wall_s"), "transitions", ["opened_at_wall_s"], unique=False)
    op.create_index(op.f("ix_transitions_result"), "transitions", ["result"], unique=False)
    op.create_index(op.f("ix_transitions_swap_id"), "transitions", ["swap_id"], unique=False)


def downgrade() -> None:
    op.drop_index(op.f("ix_transitions_swap_id"), table_name="transitions")
    op.drop_index(op.f("ix_transitions_result"), table_name="transitions")
    op.drop_index(op.f("ix_transitions_opened_at_wall_s"), table_name="transitions")
    op.drop_index(op.f("ix_transitions_engine_id"), table_name="transitions")
    op.drop_table("transitions")
    op.drop_table("residencies")
    op.drop_table("leases")
    op.drop_index(op.f("ix_vram_samples_gpu_id"), table_name="vram_samples")
    op.drop_index(op.f("ix_vram_samples_at_wall_s"), table_name="vram_samples")
    op.drop_table("vram_samples")
    op.drop_index(op.f("ix_requests_minute_wall_s"), table_name="requests")
    op.drop_table("requests")
    op.drop_table("lives")
    op.drop_table("gpus")
    op.drop_table("engines")
