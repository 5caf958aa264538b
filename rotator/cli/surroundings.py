"""The machine as ``rotator check`` sees it."""

import contextlib
import os
import resource
import shutil
import socket
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import sqlalchemy

from rotator.adapters.host import read_host_memory
from rotator.adapters.ledger_database import parse
from rotator.adapters.ledger_file import holder, sqlite_path
from rotator.adapters.ledger_reader import LedgerReader
from rotator.adapters.loopback import listeners, process_name
from rotator.adapters.proctable import read_marks
from rotator.ports import HostMemory, LedgerError, Recovered


class Machine:
    """Implements check.Surroundings on this host."""

    @property
    def env(self) -> Mapping[str, str]:
        return os.environ

    def port_holder(self, host: str, port: int) -> str | None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
                probe.listen(1)
            except OSError as e:
                pid = min(listeners(port), default=None)
                return (e.strerror or str(e)).lower() if pid is None else f"process {pid} ({process_name(pid) or '?'})"
        return None

    def service_pid(self, ledger_url: str, port: int) -> int | None:
        pid = None
        with contextlib.suppress(LedgerError):
            path = sqlite_path(ledger_url)
            pid = holder(path) if path is not None else None
        return pid if pid and pid in listeners(port) else None

    def engine_on(self, port: int, state_dir: Path) -> str | None:
        names = (self.engine_of(pid, state_dir) for pid in sorted(listeners(port)))
        return next((name for name in names if name is not None), None)

    def engine_of(self, pid: int, state_dir: Path) -> str | None:
        marks = read_marks(pid)
        if marks is None or not marks.engine:
            return None
        with contextlib.suppress(OSError):
            return marks.engine if marks.service == (state_dir / "service_id").read_text().strip() else None
        return None

    def program_problem(self, program: str, workdir: str | None, path: str | None) -> str | None:
        if workdir is not None and not Path(workdir).is_dir():
            return f"workdir {workdir} is no directory"
        if "/" not in program:
            return None if shutil.which(program, path=path) else "it is nowhere on PATH"
        where = Path(workdir or ".") / program
        if not where.is_file():
            return "no such file"
        return None if os.access(where, os.X_OK) else "it is not executable"

    def exists(self, path: Path) -> bool:
        return path.exists()

    def unwritable(self, folder: Path) -> str | None:
        """Tries with a file where the folder is, else asks whether the nearest parent lets one be made."""
        try:
            if folder.is_dir():
                with tempfile.TemporaryFile(dir=folder):
                    return None
            parent = next(p for p in folder.parents if p.exists())
        except OSError as e:
            return e.strerror
        if folder.exists() or not parent.is_dir():
            return "it is no directory"
        return None if os.access(parent, os.W_OK | os.X_OK) else f"{parent} lets nobody else make it"

    def host_memory(self) -> HostMemory:
        return read_host_memory()

    def memlock_bytes(self) -> int | None:
        soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        return None if soft == resource.RLIM_INFINITY or os.geteuid() == 0 else soft

    def now_wall_s(self) -> float:
        return time.time()

    def remembered(self, url: str) -> Recovered | None:
        try:
            reader = LedgerReader(url)
        except LedgerError:
            return None
        try:
            return reader.measured()
        except LedgerError:
            return None
        finally:
            reader.close()

    def ledger_problem(self, url: str) -> str | None:
        try:
            parsed = parse(url)
            if parsed.get_backend_name() == "sqlite":
                return self.unwritable(Path(parsed.database or ".").absolute().parent) if parsed.database else None
            with sqlalchemy.create_engine(parsed).connect():
                return None
        except LedgerError as e:
            return str(e)
        except (sqlalchemy.exc.SQLAlchemyError, ModuleNotFoundError, OSError) as e:
            return str(e).splitlines()[0]
