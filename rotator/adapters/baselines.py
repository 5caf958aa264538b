"""What versions of engines were measured to do, in the ledger: written by rollouts, beside the service that holds it.

Nothing of it is read by a decision of the service, so the ledger's one-writer rule for state is not touched; a row is
one short transaction of its own, which waits for the service's and is waited for.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, create_engine, event, select

from rotator.adapters.ledger_database import STORE_ERRORS, json_codec, parse
from rotator.adapters.ledger_rows import upsert
from rotator.adapters.ledger_tables import BASELINES
from rotator.ports import LedgerError

BUSY_S = 5.0


class SqlBaselines:
    """Blocking. Every method raises only LedgerError."""

    def __init__(self, url: str) -> None:
        parsed = parse(url)
        self._is_sqlite = parsed.get_backend_name() == "sqlite"
        self._place = parsed.render_as_string(hide_password=True)
        arguments = {"connect_args": {"timeout": BUSY_S}} if self._is_sqlite else {"pool_pre_ping": True}
        self._engine = create_engine(parsed, **arguments, **json_codec())
        if self._is_sqlite:
            _begin_at_once(self._engine)

    def close(self) -> None:
        self._engine.dispose()

    def get(self, engine: str, version: str) -> Mapping[str, Any] | None:
        wanted = select(BASELINES.c.measured).where(BASELINES.c.engine == engine, BASELINES.c.version == version)
        with self._connection() as connection:
            found: Mapping[str, Any] | None = connection.execute(wanted).scalar_one_or_none()
        return found

    def put(self, engine: str, version: str, described: Mapping[str, Any], measured: Mapping[str, Any]) -> None:
        values = {"described": dict(described), "measured": dict(measured), "at_wall_s": time.time()}
        with self._connection() as connection:
            upsert(connection, BASELINES, {"engine": engine, "version": version}, values)

    @contextmanager
    def _connection(self) -> Iterator[Connection]:
        try:
            with self._engine.begin() as connection:
                yield connection
        except STORE_ERRORS as e:
            cause = str(e.__cause__ or e).splitlines()[0]
            raise LedgerError(
                f"the ledger {self._place} cannot keep baselines: {cause}: is the service of this release running?"
            ) from None


def _begin_at_once(engine: Any) -> None:
    """A transaction that reads first and writes then would fail where the service writes in between."""

    @event.listens_for(engine, "connect")
    def connect(connection: Any, _record: Any) -> None:
        connection.isolation_level = None

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")
