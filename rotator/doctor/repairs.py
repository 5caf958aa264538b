"""What ``--fix`` does: each repair looks once more before it acts, and says what it did."""

import os
from collections.abc import Iterable
from pathlib import Path

from rotator.adapters import ledger_file
from rotator.check.planned import ledger_url
from rotator.config import FleetConfig
from rotator.doctor.findings import Finding, Repair, RepairKind
from rotator.doctor.judge_host import is_stale
from rotator.doctor.probe_processes import read_processes
from rotator.ports import LedgerError


def repairs_in(findings: Iterable[Finding]) -> tuple[Repair, ...]:
    """Each once, in the order of the walk."""
    return tuple(dict.fromkeys(f.repair for f in findings if f.repair is not None))


def carry_out(repair: Repair, fleet: FleetConfig | None, root: Path = Path("/")) -> str | None:
    """Do it. Returns what stood in the way; None when it is done. Blocking."""
    try:
        match repair.kind:
            case RepairKind.REMOVE_SHM:
                return _remove_shm(repair.target, root)
            case RepairKind.MAKE_DIRECTORY:
                Path(repair.target).mkdir(parents=True, exist_ok=True)
            case RepairKind.FORGET_PORT:
                return _forget_port(repair.target, fleet)
    except OSError as e:
        return e.strerror or str(e)
    except LedgerError as e:
        return str(e)
    return None


def _remove_shm(name: str, root: Path) -> str | None:
    """Only what is still there, still held by nobody, and ours."""
    seen = read_processes(root)
    segment = next((s for s in seen.shm if s.name == name), None)
    if segment is None:
        return "it is gone already"
    if not seen.sees_all or not is_stale(segment) or seen.own_uid not in (0, segment.uid) or "/" in name:
        return "somebody uses it now, or may"
    os.unlink(root / "dev/shm" / name)
    return None


def _forget_port(engine: str, fleet: FleetConfig | None) -> str | None:
    path = ledger_file.sqlite_path(ledger_url(fleet)) if fleet else None
    if path is None:
        return "the ledger is no SQLite file"
    ledger_file.forget_url(path, engine)
    return None
