"""A SQLite ledger as a file: looked at, copied while a service writes it, and put back. All functions block."""

import fcntl
import os
import shutil
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from rotator.adapters.ledger_database import head_revision, known_revisions, parse
from rotator.ports import LedgerError

BUSY_S = 5.0
_BESIDE = ("-wal", "-shm", "-journal")  # what SQLite keeps beside a database


class LedgerHeld(LedgerError):
    """A service holds it."""


@dataclass(frozen=True, slots=True)
class LedgerState:
    """What a look at the file tells. ``schema`` is its revision, ``damage`` what the quick check found,
    ``newest_wall_s`` the latest time that it holds."""

    path: Path
    exists: bool
    bytes: int = 0
    schema: str = ""
    schema_known: bool = True
    held_by: int | None = None
    damage: tuple[str, ...] = ()
    newest_wall_s: float | None = None
    rows: int = 0
    unreadable: str = ""


def sqlite_path(url: str) -> Path | None:
    """The file of a ledger's URL; None where it is another database. Raises LedgerError for what is no URL."""
    parsed = parse(url)
    if parsed.get_backend_name() != "sqlite" or parsed.database in (None, "", ":memory:"):
        return None
    return Path(parsed.database or "")


def look(path: Path) -> LedgerState:
    """Read it without changing anything. Never raises: what stands in the way is in ``unreadable``."""
    if not path.is_file():
        return LedgerState(path, False)
    held_by = holder(path)
    size = path.stat().st_size
    try:
        with closing(_open_to_read(path)) as db:
            damage = tuple(str(row[0]) for row in db.execute("PRAGMA quick_check(10)") if row[0] != "ok")
            schema = _schema(db)
            newest, rows = _newest(db)
    except sqlite3.Error as e:
        return LedgerState(path, True, size, held_by=held_by, unreadable=str(e))
    return LedgerState(path, True, size, schema, schema in known_revisions(), held_by, damage, newest, rows)


def holder(path: Path) -> int | None:
    """The process that holds the ledger's lock; 0 where it is held and nobody tells by whom. None where it is free."""
    try:
        handle = os.open(f"{path}.lock", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        text = os.pread(handle, 32, 0).decode(errors="replace").strip()
        return int(text) if text.isdecimal() else 0
    except OSError:
        return None
    finally:
        os.close(handle)
    return None


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold the ledger's lock. Raises LedgerHeld while a service holds it."""
    try:
        handle = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as e:
        raise LedgerError(f"{path}.lock cannot be opened ({e.strerror}): check its folder and rights") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.pread(handle, 32, 0).decode(errors="replace").strip() or "?"
            raise LedgerHeld(f"the ledger {path} is held by process {pid}: stop the service first") from None
        with suppress(OSError):
            os.pwrite(handle, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(handle)


# -- backup and restore ------------------------------------------------------------------------------------------------


def backup(source: Path, target: Path) -> LedgerState:
    """Copy a ledger, in use or not, and verify the copy. It appears under its name only when it is whole and sound.
    Raises LedgerError."""
    if not source.is_file():
        raise LedgerError(f"there is no ledger {source}: check -c, or its 'state_dir'")
    if target.is_dir():
        raise LedgerError(f"{target} is a folder: give a file's name in it")
    if target.exists() and target.samefile(source):
        raise LedgerError(f"{target} is the ledger itself: give another file")
    part = target.with_name(target.name + ".part")
    try:
        part.unlink(missing_ok=True)
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)  # it tells what the fleet is
        os.close(descriptor)
        with closing(_open_to_read(source)) as live, closing(sqlite3.connect(part)) as copy:
            live.backup(copy, pages=-1)  # in one step: a stepwise copy starts again at each of the service's writes
            copy.execute("PRAGMA journal_mode=DELETE")  # one file, nothing beside it
        made = verified(part)
        _sync(part)
        os.replace(part, target)
        _sync(target.absolute().parent)
    except sqlite3.Error as e:
        raise LedgerError(f"the ledger {source} cannot be copied to {target}: {e}") from None
    except OSError as e:
        raise LedgerError(f"{e.filename or target}: {e.strerror}: choose another place, or make room") from None
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
    return made


def verified(path: Path) -> LedgerState:
    """A whole look at a file that shall be a ledger. Raises LedgerError where it is none, is damaged or is too new."""
    if not path.is_file():
        raise LedgerError(f"there is no file {path}: name a backup that `rotator ledger-backup` made")
    try:
        with closing(_open_to_read(path)) as db:
            damage = [str(row[0]) for row in db.execute("PRAGMA integrity_check(10)") if row[0] != "ok"]
            schema = _schema(db)
    except sqlite3.Error as e:
        raise LedgerError(f"{path} is no ledger ({e}): name a backup that `rotator ledger-backup` made") from None
    if damage:
        raise LedgerError(f"{path} is damaged ({damage[0]}): use an older backup")
    if not schema:
        raise LedgerError(f"{path} is a database but no ledger: name a backup that `rotator ledger-backup` made")
    if schema not in known_revisions():
        raise LedgerError(
            f"{path} is of a newer rotator (schema {schema}, this one knows up to {head_revision()}): "
            "upgrade rotator, or use a backup made before the upgrade"
        )
    return look(path)


def restore(backup_file: Path, target: Path) -> Path | None:
    """Put a backup in the ledger's place. Returns where the former ledger lies now, None where there was none. Raises
    LedgerError: while a service holds the ledger, or for a backup that is not sound; then nothing has changed."""
    verified(backup_file)
    part = target.with_name(target.name + ".restoring")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and target.samefile(backup_file):
            raise LedgerError(f"{backup_file} is the ledger itself: name a backup")
        with held(target):
            shutil.copyfile(backup_file, part)
            verified(part)
            _sync(part)
            former = _put_aside(target)
            os.replace(part, target)
            _sync(target.absolute().parent)
    except OSError as e:
        raise LedgerError(f"{e.filename or target}: {e.strerror}: nothing was restored") from None
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
    return former


def _put_aside(target: Path) -> Path | None:
    """Rename the ledger with what lies beside it: its newest rows may be in the write-ahead log."""
    if not target.exists():
        return None
    stamp = time.strftime("%Y%m%dT%H%M%S")
    name, number = f"{target.name}.before-{stamp}", 1
    while target.with_name(name).exists():
        number += 1
        name = f"{target.name}.before-{stamp}-{number}"
    former = target.with_name(name)
    # The log goes first: a database without its log is old but whole, a log beside another database is poison.
    for suffix in _BESIDE:
        beside = Path(f"{target}{suffix}")
        if beside.exists():
            os.replace(beside, f"{former}{suffix}")
    os.replace(target, former)
    return former


def forget_url(path: Path, engine: str) -> None:
    """Let go of the port that is kept for an engine: its next start is given another. Raises LedgerError."""
    with held(path):
        try:
            with closing(sqlite3.connect(path, timeout=BUSY_S)) as db, db:
                db.execute("UPDATE engines SET url = '' WHERE engine = ?", (engine,))
        except sqlite3.Error as e:
            raise LedgerError(f"the ledger {path} cannot be written: {e}") from None


# -- inside ------------------------------------------------------------------------------------------------------------


def _open_to_read(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(f"file:{_quoted(path)}?mode=ro", uri=True, timeout=BUSY_S, isolation_level=None)
    db.execute("PRAGMA query_only=ON")
    return db


def _quoted(path: Path) -> str:
    return str(path.absolute()).replace("%", "%25").replace("?", "%3f").replace("#", "%23")


def _schema(db: sqlite3.Connection) -> str:
    """Empty where it is no ledger."""
    if db.execute("SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'").fetchone() is None:
        return ""
    row = db.execute("SELECT version_num FROM alembic_version").fetchone()
    return str(row[0]) if row else ""


def _newest(db: sqlite3.Connection) -> tuple[float | None, int]:
    """The latest begin of a transition or of a life, and how many transitions there are."""
    found = [
        db.execute(f"SELECT MAX({column}) FROM {table}").fetchone()[0]
        for table, column in (("transitions", "opened_at_wall_s"), ("lives", "started_at_wall_s"))
    ]
    rows = db.execute("SELECT COUNT(*) FROM transitions").fetchone()[0]
    return max((float(at) for at in found if at is not None), default=None), int(rows)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
