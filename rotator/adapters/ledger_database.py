"""The database under the ledger: how it is opened, migrated, locked, copied and checked.

Everything that only SQLite knows is in this file. All functions block: they run on the ledger's threads.
"""

import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import orjson
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError, StatementError
from sqlalchemy.pool import StaticPool

from rotator.ports import LedgerError

# What a driver, SQLAlchemy or the file system raises when a statement does not go through.
STORE_ERRORS = (SQLAlchemyError, sqlite3.Error, OSError, ValueError, OverflowError)

_ADVICE = (
    ("SQLITE_FULL", "the disk is full: free space in {folder}; the service goes on by itself then"),
    ("SQLITE_READONLY", "it is read-only: make {place} and its folder writable for this user"),
    ("SQLITE_PERM", "it may not be opened: make {place} and its folder writable for this user"),
    ("SQLITE_BUSY", "another program holds a lock on {place}: close it (a database browser or a backup?)"),
    ("SQLITE_LOCKED", "another program holds a lock on {place}: close it (a database browser or a backup?)"),
    ("SQLITE_CANTOPEN", "it cannot be opened: check that {folder} exists and is writable, and its space and inodes"),
    ("SQLITE_IOERR", "its disk reports an error or a quota is used up: check the disk and quota of {folder}"),
    ("SQLITE_CORRUPT", "it is damaged: put a backup in its place, or move {place} away so that a new one is begun"),
    ("SQLITE_NOTADB", "{place} is no ledger: name another file, or move this one away"),
)


class Database:
    """One open database. ``write`` and ``read`` give a connection inside a transaction.

    ``is_file`` says that it is a SQLite file, which has a lock of its own and readers beside the writer.
    """

    def __init__(self, url: URL, *, busy_s: float) -> None:
        self.place = url.database if _is_file(url) else url.set(query={}).render_as_string(hide_password=True)
        self.is_file = _is_file(url)
        self._lock_file: int | None = None
        self._writer, self._reader = _engines(url, busy_s)

    @contextmanager
    def write(self) -> Iterator[Connection]:
        with self._writer.begin() as connection:
            yield connection

    @contextmanager
    def read(self) -> Iterator[Connection]:
        with self._reader.begin() as connection:
            yield connection

    def open(self) -> None:
        """Take the file's lock, bring the schema up to date. Raises LedgerError (also through ``explain``)."""
        if self.is_file:
            self._lock()
        try:
            with self.write() as connection:
                _migrate(connection, self.place)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close every connection, then let go of the lock."""
        self._reader.dispose()
        self._writer.dispose()
        if self._lock_file is not None:
            os.close(self._lock_file)
            self._lock_file = None

    def explain(self, error: BaseException) -> LedgerError:
        """``error`` in words that say what to do."""
        if isinstance(error, LedgerError):
            return error
        cause = error.orig if isinstance(error, StatementError) and error.orig is not None else error
        name = getattr(cause, "sqlite_errorname", "")
        folder = os.path.dirname(os.path.abspath(self.place or ".")) if self.is_file else "its folder"
        for prefix, advice in _ADVICE:
            if name.startswith(prefix):
                return LedgerError(f"ledger: {advice.format(place=self.place, folder=folder)} ({cause})")
        if isinstance(cause, OSError) and cause.strerror:
            return LedgerError(f"ledger: {cause.filename or self.place}: {cause.strerror}")
        return LedgerError(f"ledger {self.place}: {_first_line(cause)}")

    def backup(self, path: Path) -> None:
        """Copy the whole ledger while it is in use. The copy appears under its name only when it is complete."""
        if not self.is_file:
            raise LedgerError("ledger: only a SQLite file is copied from here: use your database's own backup tool")
        part = path.with_name(path.name + ".part")
        part.unlink(missing_ok=True)
        try:
            with self._reader.connect() as source, closing(sqlite3.connect(part)) as target:
                raw: Any = source.connection.driver_connection
                # All pages in one step: a stepwise copy starts again whenever the writer commits in between.
                raw.backup(target, pages=-1)
                target.execute("PRAGMA journal_mode=DELETE")  # one file, nothing beside it
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)

    def integrity(self) -> tuple[str, ...]:
        """What is wrong with the file, in words. Empty when nothing is."""
        if not self.is_file:
            raise LedgerError("ledger: only a SQLite file is checked from here: use your database's own check")
        with self.read() as connection:
            damage = connection.exec_driver_sql("PRAGMA integrity_check").scalars().all()
            orphans = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
        lines = [str(line) for line in damage if line != "ok"]
        return (*lines, *(f"{row[0]} row {row[1]} refers to no row of {row[2]}" for row in orphans))

    def _lock(self) -> None:
        """Hold the file's lock as long as this process lives, so that two services never rotate one fleet.

        The kernel lets go of it however the process ends, so there is no stale lock to remove.
        """
        path = f"{self.place}.lock"
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _refuse_second(handle, self.place)
        os.truncate(handle, 0)
        # A full disk must not keep the service from its ledger: the number only serves the other's message.
        with suppress(OSError):
            os.pwrite(handle, str(os.getpid()).encode(), 0)
        self._lock_file = handle


def parse(url: str) -> URL:
    """Raises LedgerError for what is no usable SQLAlchemy URL."""
    try:
        parsed = make_url(url)
        dialect = parsed.get_dialect()
    except (ArgumentError, NoSuchModuleError) as e:
        raise LedgerError(f"ledger.url: {e}. Give e.g. sqlite:////var/lib/rotator/ledger.sqlite3") from None
    if dialect.is_async:
        raise LedgerError(f"ledger.url: '{parsed.drivername}' is for asyncio: give that database's plain driver")
    if parsed.get_backend_name() == "sqlite" and (parsed.database or "").startswith("file:"):
        raise LedgerError("ledger.url: give the file's path instead of a 'file:' URI")
    return parsed


def known_revisions() -> frozenset[str]:
    """Every schema that this code can read or bring up to date."""
    return frozenset(r.revision for r in ScriptDirectory.from_config(_alembic()).walk_revisions())


def head_revision() -> str:
    """The schema that this code writes."""
    return ScriptDirectory.from_config(_alembic()).get_current_head() or ""


def _is_file(url: URL) -> bool:
    return url.get_backend_name() == "sqlite" and url.database not in (None, "", ":memory:")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _refuse_second(handle: int, place: str | None) -> NoReturn:
    holder = os.pread(handle, 32, 0).decode(errors="replace").strip() or "?"
    os.close(handle)
    whose = "this process itself" if holder == str(os.getpid()) else "another service"
    raise LedgerError(
        f"the ledger {place} is held by process {holder} ({whose}): two services must not rotate one fleet; "
        "stop it first, or give this one its own state_dir"
    )


def _engines(url: URL, busy_s: float) -> tuple[Engine, Engine]:
    """The writer's engine and the readers'. They are one where the database has no such distinction."""
    common = json_codec()
    try:
        if url.get_backend_name() != "sqlite":
            engine = create_engine(url, pool_size=2, max_overflow=1, pool_pre_ping=True, **common)
            return engine, engine
        arguments = {"check_same_thread": False, "timeout": busy_s}
        if not _is_file(url):
            engine = create_engine(url, connect_args=arguments, poolclass=StaticPool, **common)
            _prepare(engine, "foreign_keys=ON")
            return engine, engine
        writer = create_engine(url, connect_args=arguments, **common)
        reader = create_engine(url, connect_args=arguments, **common)
    except ModuleNotFoundError as e:
        raise LedgerError(f"ledger.url: the driver '{e.name}' is not installed: install it beside rotator") from None
    # synchronous=NORMAL: a commit is in the page cache when it returns, so it outlives a kill -9 of the service. Only a
    # power cut can lose the last ones (never tear the file), and after that every engine is gone with its bytes too.
    _prepare(writer, "foreign_keys=ON", "journal_mode=WAL", "synchronous=NORMAL", "journal_size_limit=67108864")
    _prepare(reader, "query_only=ON", begin="BEGIN")
    return writer, reader


def _prepare(engine: Engine, *pragmas: str, begin: str = "BEGIN IMMEDIATE") -> None:
    """Set up each new connection, and begin transactions ourselves: the driver would begin them too late and would
    leave schema changes outside, so that a kill in the middle of a migration left half of it."""

    @event.listens_for(engine, "connect")
    def connect(connection: Any, _record: Any) -> None:
        connection.isolation_level = None
        for pragma in pragmas:
            answer = connection.execute(f"PRAGMA {pragma}").fetchone()
            if pragma == "journal_mode=WAL" and answer[0] != "wal":
                raise LedgerError("ledger: its file system cannot do write-ahead logging: use a local disk")

    @event.listens_for(engine, "begin")
    def start(connection: Connection) -> None:
        connection.exec_driver_sql(begin)


def _migrate(connection: Connection, place: str | None) -> None:
    config = _alembic()
    script = ScriptDirectory.from_config(config)
    at = MigrationContext.configure(connection).get_current_heads()
    if at == (script.get_current_head(),):
        return
    known = {revision.revision for revision in script.walk_revisions()}
    if unknown := set(at) - known:
        raise LedgerError(
            f"the ledger {place} is of a newer rotator (schema {', '.join(sorted(unknown))}, this one knows up "
            f"to {script.get_current_head()}): upgrade rotator, or give it another state_dir"
        )
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, "head")
    except CommandError as e:
        raise LedgerError(f"the ledger {place} cannot be brought up to date: {e}") from e


def _alembic() -> Config:
    config = Config()
    config.set_main_option("script_location", "rotator.adapters:migrations")
    config.set_main_option("path_separator", "os")
    return config


def json_codec() -> dict[str, Any]:
    """What an engine needs to write and read JSON columns as the ledger does."""
    return {"json_serializer": _to_json, "json_deserializer": orjson.loads}


def _to_json(value: Any) -> str:
    return orjson.dumps(value, default=_plain, option=orjson.OPT_NON_STR_KEYS).decode()


def _plain(value: Any) -> Any:
    """What a plan holds and JSON does not know."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if hasattr(value, "items"):
        return dict(value.items())
    raise TypeError(f"{type(value).__name__} is no JSON")
