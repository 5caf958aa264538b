"""What the ledger writes and reads, as functions of a connection that is inside a transaction. They block."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from sqlalchemy import Connection, Row, Table, bindparam, delete, func, insert, select, update
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, StatementError

from rotator.adapters import ledger_keep as keep
from rotator.adapters.ledger_buffers import RequestKey, RequestTotals, VramSample
from rotator.adapters.ledger_tables import (
    ENGINES,
    GPUS,
    INCIDENTS,
    LEASES,
    NODES,
    OPEN,
    REQUESTS,
    RESIDENCIES,
    TRANSITIONS,
    VRAM_SAMPLES,
    new_id,
)
from rotator.core.values import Depth, GpuId, Level, State
from rotator.ports import (
    EngineRecord,
    GpuInfo,
    Incident,
    Intent,
    Lease,
    LedgerError,
    NodeRecord,
    OpenTransition,
    Outcome,
    Recovered,
    Residency,
)

Values = Mapping[str, Any]


def upsert(connection: Connection, table: Table, key: Values, values: Values) -> None:
    """Write one row, whether it is there or not. Portable: the ledger has one writer, so nobody comes between."""
    if not _update(connection, table, key, values):
        connection.execute(insert(table), {**key, **values})


def _update(connection: Connection, table: Table, key: Values, values: Values) -> bool:
    """Whether the row was there. Values go beside the statement, not into it: building one with them takes longer than
    to run it."""
    here = [table.c[name] == bindparam(f"key_{name}") for name in key]
    given = {**{f"key_{name}": value for name, value in key.items()}, **values}
    return connection.execute(update(table).where(*here), given).rowcount > 0


# -- the journal -----------------------------------------------------------------------------------------------------


def open_transition(connection: Connection, life: int, intent: Intent, now_wall_s: float) -> int:
    row = {
        "life": life,
        "swap_id": intent.swap_id,
        "engine": intent.engine,
        "action": str(intent.action),
        "from_state": intent.from_state.value,
        "to_state": intent.to_state.value,
        "reason": intent.reason,
        "plan": intent.plan,
        "opened_at_wall_s": intent.at_wall_s or now_wall_s,
        "result": OPEN,
    }
    result = connection.execute(insert(TRANSITIONS), row)
    keep.put_decision(connection, intent, now_wall_s)
    return new_id(result)


def close_transition(connection: Connection, transition: int, outcome: Outcome, now_wall_s: float) -> None:
    """Write the outcome once. Saying the same again is allowed (the first answer may have been lost)."""
    closed_at_wall_s = outcome.at_wall_s or now_wall_s
    row = {
        "result": outcome.result,
        "state": outcome.state.value,
        "error": outcome.error,
        "phases_s": outcome.phases_s,
        "bytes_before": outcome.bytes_before,
        "bytes_after": outcome.bytes_after,
        "closed_at_wall_s": closed_at_wall_s,
        "duration_s": closed_at_wall_s - TRANSITIONS.c.opened_at_wall_s,
    }
    still_open = (TRANSITIONS.c.id == transition, TRANSITIONS.c.result == OPEN)
    if connection.execute(update(TRANSITIONS).where(*still_open).values(**row)).rowcount:
        return
    found = connection.execute(select(TRANSITIONS.c.result).where(TRANSITIONS.c.id == transition)).scalar()
    if found != outcome.result:
        what = "is not in the journal" if found is None else f"is closed already, as '{found}'"
        raise LedgerError(f"transition {transition} {what}: its outcome '{outcome.result}' was not written")


# -- what is true now ------------------------------------------------------------------------------------------------


def put_engine(connection: Connection, record: EngineRecord, now_wall_s: float) -> None:
    values = asdict(record) | {
        "state": record.state.value,
        "depth": None if record.depth is None else record.depth.value,
        "level": None if record.level is None else int(record.level),
        "updated_at_wall_s": now_wall_s,
    }
    upsert(connection, ENGINES, {"engine": values.pop("engine")}, values)


def put_residencies(connection: Connection, rows: Sequence[Residency], now_wall_s: float) -> None:
    for row in rows:
        values = asdict(row) | {"updated_at_wall_s": now_wall_s}
        key = {"engine": values.pop("engine"), "gpu": values.pop("gpu")}
        if not _update(connection, RESIDENCIES, key, values):
            _ensure(connection, ENGINES, "engine", row.engine, now_wall_s)
            _ensure(connection, GPUS, "id", row.gpu, now_wall_s)
            connection.execute(insert(RESIDENCIES), {**key, **values})


def put_lease(connection: Connection, lease: Lease, now_wall_s: float) -> None:
    _ensure(connection, GPUS, "id", lease.gpu, now_wall_s)
    values = {"bytes": lease.bytes, "expires_wall_s": lease.expires_wall_s, "updated_at_wall_s": now_wall_s}
    upsert(connection, LEASES, {"gpu": lease.gpu, "holder": lease.holder}, values)


def drop_lease(connection: Connection, gpu: GpuId, holder: str) -> None:
    connection.execute(delete(LEASES).where(LEASES.c.gpu == gpu, LEASES.c.holder == holder))


def put_gpus(connection: Connection, gpus: Sequence[GpuInfo], now_wall_s: float) -> None:
    for gpu in gpus:
        values = asdict(gpu) | {
            "compute_capability": "{}.{}".format(*gpu.compute_capability),
            "updated_at_wall_s": now_wall_s,
        }
        upsert(connection, GPUS, {"id": values.pop("id")}, values)


def put_node(connection: Connection, node: NodeRecord, now_wall_s: float) -> None:
    values = asdict(node) | {"updated_at_wall_s": now_wall_s}
    upsert(connection, NODES, {"name": values.pop("name")}, values)


def put_cordon(connection: Connection, gpu: GpuId, cordoned: bool, reason: str, now_wall_s: float) -> None:
    values = {"cordoned": cordoned, "cordon_reason": reason if cordoned else "", "updated_at_wall_s": now_wall_s}
    upsert(connection, GPUS, {"id": gpu}, values)


def put_incident(connection: Connection, incident: Incident) -> None:
    values = asdict(incident)
    upsert(connection, INCIDENTS, {"id": values.pop("id")}, values)


def _ensure(connection: Connection, table: Table, key: str, value: str, now_wall_s: float) -> None:
    """Make the row that others refer to, so that callers need not know an order of writing."""
    if connection.execute(select(1).select_from(table).where(table.c[key] == value)).first():
        return
    state = {"state": State.STOPPED.value} if table is ENGINES else {}
    connection.execute(insert(table).values(**{key: value}, **state, updated_at_wall_s=now_wall_s))


# -- after a restart -------------------------------------------------------------------------------------------------


def recover(connection: Connection, now_wall_s: float) -> Recovered:
    """Everything an earlier life left. Leases that have expired meanwhile are deleted."""
    connection.execute(delete(LEASES).where(LEASES.c.expires_wall_s <= now_wall_s))
    opened = select(TRANSITIONS).where(TRANSITIONS.c.result == OPEN).order_by(TRANSITIONS.c.id)
    known = measured(connection)
    cordons = connection.execute(select(GPUS.c.id, GPUS.c.cordon_reason).where(GPUS.c.cordoned))
    reasons = {row.id: row.cordon_reason for row in cordons}
    return Recovered(
        engines=known.engines,
        residencies=known.residencies,
        leases=tuple(Lease(*row) for row in connection.execute(select(*list(LEASES.c)[:4]))),
        open_transitions=tuple(_open_transition(row) for row in connection.execute(opened)),
        cordons=frozenset(reasons),
        cordon_reasons=reasons,
        incidents=keep.incidents(connection),
        reservations=keep.reservations(connection, now_wall_s),
        gpus=tuple(_gpu(row) for row in connection.execute(select(GPUS).where(GPUS.c.index.is_not(None)))),
        nodes=tuple(NodeRecord(*row[:7]) for row in connection.execute(select(NODES))),
    )


def measured(connection: Connection) -> Recovered:
    """What is known of engines and their bytes, and nothing of what was under way."""
    engines = [_engine(row) for row in connection.execute(select(ENGINES))]
    return Recovered(
        engines={record.engine: record for record in engines},
        residencies=tuple(Residency(*row) for row in connection.execute(select(*list(RESIDENCIES.c)[:6]))),
        leases=(),
        open_transitions=(),
    )


def _gpu(row: Row[Any]) -> GpuInfo:
    major, _, minor = row.compute_capability.partition(".")
    return GpuInfo(
        id=row.id,
        index=row._mapping["index"],  # a row's own method has that name
        name=row.name,
        total_bytes=row.total_bytes,
        compute_capability=(int(major or 0), int(minor or 0)),
        pci_bus_id=row.pci_bus_id,
        unified_memory=row.unified_memory,
        node=row.node,
    )


def _engine(row: Row[Any]) -> EngineRecord:
    values = dict(row._mapping)
    del values["updated_at_wall_s"]
    values["state"] = State(values["state"])
    values["faults"] = tuple(values["faults"] or ())
    values["depth"] = None if values["depth"] is None else Depth(values["depth"])
    values["level"] = None if values["level"] is None else Level(values["level"])
    return EngineRecord(**values)


def _open_transition(row: Row[Any]) -> OpenTransition:
    intent = Intent(
        swap_id=row.swap_id,
        engine=row.engine,
        action=row.action,
        from_state=State(row.from_state),
        to_state=State(row.to_state),
        reason=row.reason,
        plan=row.plan,
        at_wall_s=row.opened_at_wall_s,
    )
    return OpenTransition(id=row.id, intent=intent)


# -- what is written in batches --------------------------------------------------------------------------------------


def add_samples(connection: Connection, samples: Sequence[VramSample]) -> None:
    connection.execute(insert(VRAM_SAMPLES), [asdict(sample) for sample in samples])


def add_requests(connection: Connection, totals: Mapping[RequestKey, RequestTotals]) -> None:
    for (model, minute_wall_s), more in totals.items():
        here = (REQUESTS.c.model == model, REQUESTS.c.minute_wall_s == minute_wall_s)
        had = connection.execute(select(REQUESTS).where(*here)).one_or_none()
        total = more if had is None else more.plus(RequestTotals(*had[2:]))
        upsert(connection, REQUESTS, {"model": model, "minute_wall_s": minute_wall_s}, asdict(total))


def totals(connection: Connection) -> dict[str, dict[str, float]]:
    c = REQUESTS.c
    sums = [func.sum(c[name]).label(name) for name in ("requests", "failed", "client_left", "waited_s_sum")]
    highest = func.max(c.waited_s_max).label("waited_s_max")
    found = connection.execute(select(c.model, *sums, highest).group_by(c.model)).mappings()
    # Some databases answer a sum of integers with a Decimal.
    return {row["model"]: {name: float(row[name]) for name in row if name != "model"} for row in found}


def is_refused_by_content(error: BaseException | None) -> bool:
    """Whether a write was refused for what is in it: the store is well, and the same write can never succeed."""
    if isinstance(error, DBAPIError):
        return isinstance(error, (IntegrityError, DataError))
    return isinstance(error, (StatementError, ValueError, OverflowError))
