"""A ledger read from outside, while a service holds it or long after: never written, never migrated, never locked."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Table, create_engine, inspect, select

from rotator.adapters.ledger_database import STORE_ERRORS, json_codec, parse
from rotator.adapters.ledger_query import moment
from rotator.adapters.ledger_rows import measured
from rotator.adapters.ledger_tables import DECISIONS, GPUS, TRANSITIONS
from rotator.ports import GpuInfo, LedgerError, Recovered

_PAGE = 200
_OPEN_MAX = 256  # swaps whose steps' rows may still come: a swap's rows lie close together


@dataclass(frozen=True, slots=True)
class Decided:
    """One swap of the journal: its plan as JSON, what it was decided from (packed; None where that was not kept), and
    how its steps ended, by engine."""

    swap_id: str
    at_wall_s: float
    plan: Any
    snapshot: str | None
    results: dict[str, str]


class LedgerReader:
    """Reads one ledger. Every method raises only LedgerError."""

    def __init__(self, url: str) -> None:
        """Raises LedgerError for what is no URL of a ledger, or a file that is not there."""
        parsed = parse(url)
        self._place = parsed.render_as_string(hide_password=True)
        if parsed.get_backend_name() == "sqlite":
            path = Path(parsed.database or "")
            if not path.is_file():
                raise LedgerError(f"there is no ledger {path}: give the state_dir's ledger.db, or a SQLAlchemy URL")
            # The file's own URI, so that nothing can be written, not even a journal beside it.
            uri = f"sqlite:///file:{path.resolve()}?mode=ro&uri=true"
            self._engine = create_engine(uri, **json_codec())
        else:
            self._engine = create_engine(parsed, pool_pre_ping=True, **json_codec())

    def close(self) -> None:
        self._engine.dispose()

    def measured(self) -> Recovered:
        """Engines' costs and bytes as an earlier life measured them."""
        with self._reading() as connection:
            return measured(connection)

    def gpus(self) -> tuple[GpuInfo, ...]:
        """The GPUs that its service knew, of every node."""
        wanted = ["id", "index", "name", "total_bytes", "node"]
        with self._reading() as connection:
            has = {column["name"] for column in inspect(connection).get_columns(GPUS.name)}
            columns = [GPUS.c[name] for name in wanted if name in has]  # a ledger of an older release knows no nodes
            rows = connection.execute(select(*columns).order_by(GPUS.c.index)).mappings().all()
        known = [row for row in rows if row["index"] is not None]
        return tuple(
            GpuInfo(row["id"], row["index"], row["name"], row["total_bytes"], node=row.get("node", "")) for row in known
        )

    def decisions(self, since: str | None = None) -> Iterator[Decided]:
        """Swaps in the order in which they were begun. ``since`` is Unix seconds or ISO 8601."""
        try:
            after = None if since is None else moment("since", since)
        except ValueError as e:
            raise LedgerError(str(e)) from None
        with self._reading() as connection:
            snapshots = self._has(connection, DECISIONS)
            last, open_ = 0, dict[str, Decided]()
            while rows := connection.execute(_page(last, after)).all():
                last = rows[-1].id
                for row in rows:
                    if not row.plan or row.action == "adopt":
                        continue
                    found = open_.get(row.swap_id)
                    if found is None:
                        kept = _snapshot(connection, row.swap_id) if snapshots else None
                        found = open_[row.swap_id] = Decided(row.swap_id, row.opened_at_wall_s, row.plan, kept, {})
                    found.results[row.engine] = row.result
                while len(open_) > _OPEN_MAX:
                    yield open_.pop(next(iter(open_)))
            yield from open_.values()

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        try:
            with self._engine.connect() as connection:
                yield connection
        except STORE_ERRORS as e:
            cause = e.__cause__ or e
            raise LedgerError(f"the ledger {self._place} cannot be read: {str(cause).splitlines()[0]}") from None

    @staticmethod
    def _has(connection: Connection, table: Table) -> bool:
        """A ledger of an older release lacks newer tables."""
        return inspect(connection).has_table(table.name)


def _page(last: int, after: float | None) -> Any:
    c = TRANSITIONS.c
    chosen = select(c.id, c.swap_id, c.engine, c.action, c.plan, c.opened_at_wall_s, c.result).where(c.id > last)
    if after is not None:
        chosen = chosen.where(c.opened_at_wall_s >= after)
    return chosen.order_by(c.id).limit(_PAGE)


def _snapshot(connection: Connection, swap_id: str) -> str | None:
    found: str | None = connection.execute(
        select(DECISIONS.c.snapshot).where(DECISIONS.c.swap_id == swap_id)
    ).scalar_one_or_none()
    return found
