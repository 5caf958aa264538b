"""The ledger's tables. A change here needs a migration: a test compares the two.

Columns of bytes are plain bytes; ``*_wall_s`` are Unix seconds. Only types and constraints that every SQLAlchemy
dialect knows are used, so that the ledger can move to another database by its URL alone.
"""

from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    CursorResult,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    text,
)

from rotator.ports import LedgerError

# Constraints are named by rule, so that a later migration can name what it changes on every database.
METADATA = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
    }
)

# SQLite counts rows by itself only in a column of exactly this type.
_ROW_ID = BigInteger().with_variant(Integer, "sqlite")
_NAME = String(191)  # the longest that every database can index
_WORD = String(32)

OPEN = "open"  # the result of a transition that has no outcome yet

LIVES = Table(
    "lives",
    METADATA,
    Column("id", _ROW_ID, primary_key=True),
    # 1 while this life of the service holds the ledger, else NULL: the database itself admits only one holder.
    Column("holds", Integer, nullable=True),
    Column("pid", Integer, nullable=False),
    Column("host", _NAME, nullable=False),
    Column("started_at_wall_s", Float(53), nullable=False),
    Column("ended_at_wall_s", Float(53), nullable=True),  # NULL in a life that does not hold: it died
    Column("beat", BigInteger, nullable=False),
    Column("ballast", Text, nullable=False),  # see ledger_lives.probe
    UniqueConstraint("holds"),
)

GPUS = Table(
    "gpus",
    METADATA,
    Column("id", _NAME, primary_key=True),
    Column("index", Integer, nullable=True),
    Column("name", String(255), nullable=False, default=""),
    Column("total_bytes", BigInteger, nullable=False, default=0),
    Column("compute_capability", _WORD, nullable=False, default=""),
    Column("pci_bus_id", String(64), nullable=False, default=""),
    Column("unified_memory", Boolean, nullable=False, default=False),
    Column("node", _NAME, nullable=False, default="", server_default=text("''")),
    Column("cordoned", Boolean, nullable=False, default=False),
    Column("cordon_reason", Text, nullable=False, default=""),
    Column("updated_at_wall_s", Float(53), nullable=False),
)

NODES = Table(
    "nodes",
    METADATA,
    Column("name", _NAME, primary_key=True),
    Column("agent", Text, nullable=False),
    Column("boot_id", String(64), nullable=False),
    Column("host_bytes", BigInteger, nullable=False),
    Column("reachable", Boolean, nullable=False),
    Column("reason", Text, nullable=False),
    Column("seen_at_wall_s", Float(53), nullable=False),
    Column("updated_at_wall_s", Float(53), nullable=False),
)

ENGINES = Table(
    "engines",
    METADATA,
    Column("engine", _NAME, primary_key=True),
    Column("state", _WORD, nullable=False),
    Column("depth", _WORD, nullable=True),
    Column("level", Integer, nullable=True),
    Column("launcher", _WORD, nullable=False, default=""),
    Column("url", Text, nullable=False, default=""),
    Column("ref", JSON, nullable=False, default=dict),
    Column("spec_hash", String(64), nullable=False, default=""),
    Column("version", String(64), nullable=False, default=""),
    Column("canary", JSON(none_as_null=True), nullable=True),
    Column("failures", Integer, nullable=False, default=0),
    Column("reason", Text, nullable=False, default=""),
    Column("wake_s", Float(53), nullable=True),
    Column("sleep_s", Float(53), nullable=True),
    Column("start_s", Float(53), nullable=True),
    Column("wake_costs", JSON(none_as_null=True), nullable=True),
    Column("history", JSON(none_as_null=True), nullable=True),
    Column("faults", JSON(none_as_null=True), nullable=True),
    Column("updated_at_wall_s", Float(53), nullable=False),
)

RESIDENCIES = Table(
    "residencies",
    METADATA,
    Column("engine", _NAME, ForeignKey("engines.engine"), primary_key=True),
    Column("gpu", _NAME, ForeignKey("gpus.id"), primary_key=True),
    Column("planned_awake_bytes", BigInteger, nullable=True),
    Column("awake_bytes", BigInteger, nullable=True),
    Column("residue_bytes", BigInteger, nullable=True),
    Column("held_bytes", BigInteger, nullable=False),
    Column("updated_at_wall_s", Float(53), nullable=False),
)

LEASES = Table(
    "leases",
    METADATA,
    Column("gpu", _NAME, ForeignKey("gpus.id"), primary_key=True),
    Column("holder", _NAME, primary_key=True),
    Column("bytes", BigInteger, nullable=False),
    Column("expires_wall_s", Float(53), nullable=True),
    Column("updated_at_wall_s", Float(53), nullable=False),
)

# The journal outlives the engines that it tells of, so ``engine`` refers to no row.
TRANSITIONS = Table(
    "transitions",
    METADATA,
    Column("id", _ROW_ID, primary_key=True),
    Column("life", _ROW_ID, ForeignKey("lives.id"), nullable=False),
    Column("swap_id", _NAME, nullable=False),
    Column("engine", _NAME, nullable=False),
    Column("action", _WORD, nullable=False),
    Column("from_state", _WORD, nullable=False),
    Column("to_state", _WORD, nullable=False),
    Column("reason", Text, nullable=False),
    Column("plan", JSON, nullable=False),
    Column("opened_at_wall_s", Float(53), nullable=False),
    Column("result", _WORD, nullable=False),
    Column("state", _WORD, nullable=True),
    Column("error", Text, nullable=True),
    Column("phases_s", JSON, nullable=False, default=dict),
    Column("bytes_before", JSON, nullable=False, default=dict),
    Column("bytes_after", JSON, nullable=False, default=dict),
    Column("closed_at_wall_s", Float(53), nullable=True),
    Column("duration_s", Float(53), nullable=True),
    Index(None, "result"),
    Index(None, "engine", "id"),
    Index(None, "swap_id"),
    Index(None, "opened_at_wall_s"),
)

RESERVATIONS = Table(
    "reservations",
    METADATA,
    Column("id", _ROW_ID, primary_key=True),
    Column("engines", JSON, nullable=False),
    Column("begins_wall_s", Float(53), nullable=False),
    Column("ends_wall_s", Float(53), nullable=False),
    Column("priority", Integer, nullable=False),
    Column("note", Text, nullable=False),
    Column("created_at_wall_s", Float(53), nullable=False),
    Index(None, "ends_wall_s"),
)

# Incidents outlive the engines and GPUs that they tell of.
INCIDENTS = Table(
    "incidents",
    METADATA,
    Column("id", _NAME, primary_key=True),
    Column("opened_wall_s", Float(53), nullable=False),
    Column("closed_wall_s", Float(53), nullable=True),
    Column("kind", _WORD, nullable=False),
    Column("severity", _WORD, nullable=False),
    Column("engine", _NAME, nullable=True),
    Column("gpu", _NAME, nullable=True),
    Column("reason", Text, nullable=False),
    Column("action", Text, nullable=False),
    Column("advice", Text, nullable=False),
    Column("outcome", Text, nullable=False),
    Column("count", Integer, nullable=False),
    Column("bundle_bytes", BigInteger, nullable=False),
    Index(None, "opened_wall_s"),
    Index(None, "engine", "opened_wall_s"),
)

# What versions of engines were measured to do, by rollouts. Described and compared in rotator/rollout/judge.py.
BASELINES = Table(
    "baselines",
    METADATA,
    Column("engine", _NAME, primary_key=True),
    Column("version", _WORD, primary_key=True),
    Column("described", JSON, nullable=False),
    Column("measured", JSON, nullable=False),
    Column("at_wall_s", Float(53), nullable=False),
    Index(None, "at_wall_s"),
)

# What a swap was decided from. Apart from the journal, whose rows people read.
DECISIONS = Table(
    "decisions",
    METADATA,
    Column("swap_id", _NAME, primary_key=True),
    Column("at_wall_s", Float(53), nullable=False),
    Column("snapshot", Text, nullable=False),  # see core/snapshot_text.py
    Index(None, "at_wall_s"),
)

VRAM_SAMPLES = Table(
    "vram_samples",
    METADATA,
    Column("id", _ROW_ID, primary_key=True),
    Column("at_wall_s", Float(53), nullable=False),
    Column("gpu", _NAME, nullable=False),
    Column("used_bytes", BigInteger, nullable=False),
    Column("by_holder", JSON, nullable=False),
    Index(None, "at_wall_s"),
    Index(None, "gpu", "id"),
)

REQUESTS = Table(
    "requests",
    METADATA,
    Column("model", _NAME, primary_key=True),
    Column("minute_wall_s", BigInteger, primary_key=True, autoincrement=False),
    Column("requests", BigInteger, nullable=False),
    Column("failed", BigInteger, nullable=False),
    Column("client_left", BigInteger, nullable=False),
    Column("waited_s_sum", Float(53), nullable=False),
    Column("waited_s_max", Float(53), nullable=False),
    Index(None, "minute_wall_s"),
)


def new_id(result: CursorResult[Any]) -> int:
    """The id that the database gave to the one row that was just inserted."""
    key = result.inserted_primary_key
    if key is None:
        raise LedgerError("the database did not tell the id of a new row: its driver is not usable for a ledger")
    return int(key[0])
