"""Processes that touch GPUs or carry an engine's mark, and shared memory that was left behind. Blocking.

Everything is read below a root, so that a machine that was written down can be examined as well as this one.
"""

import contextlib
import os
import re
import time
from collections.abc import Iterable
from pathlib import Path

from rotator.adapters.enginelog import redacted
from rotator.adapters.proctable import Proc, parse_marks, parse_stat
from rotator.doctor.facts import Process, ProcessFacts, ShmSegment

FIRST_PID_NAMESPACE = "pid:[4026531836]"
_COMMAND_CHARS = 200
_READ_BYTES = 4096
_MAPPED = re.compile(rb"/dev/shm/(\S+)")
_NODE = re.compile(r"/dev/nvidia(\d+)$")
SHM_MAX = 4096


def read_processes(root: Path, service_id: str = "") -> ProcessFacts:
    held: dict[str, set[int]] = {}
    found, unread = [], 0
    for pid in _pids(root):
        folder = root / "proc" / str(pid)
        proc = _proc(folder)
        if proc is None or proc.pgrp == 0:  # gone, or the kernel's own
            continue
        opened, complete = _opened(folder)
        unread += not complete
        for name in _shm_names(folder, opened):
            held.setdefault(name, set()).add(pid)
        gpus = tuple(sorted({int(m[1]) for path in opened if (m := _NODE.match(path))}))
        process = _process(folder, proc, gpus)
        found.append(process)
    total, free = _room(root / "dev/shm")
    return ProcessFacts(
        tuple(found),
        tuple(_segments(root / "dev/shm", held)),
        total,
        free,
        sees_all=unread == 0 and _sees_all(root),
        own_uid=os.geteuid(),
        service_id=service_id,
    )


def _pids(root: Path) -> Iterable[int]:
    with contextlib.suppress(OSError):
        return sorted(int(name) for name in os.listdir(root / "proc") if name.isdecimal())
    return ()


def _proc(folder: Path) -> Proc | None:
    try:
        return parse_stat((folder / "stat").read_text(errors="replace"))
    except (OSError, ValueError):
        return None


def _opened(folder: Path) -> tuple[list[str], bool]:
    """What the process has open, and whether that could be read at all."""
    try:
        names = os.listdir(folder / "fd")
    except PermissionError:
        return [], False
    except OSError:
        return [], True
    paths = []
    for name in names:
        with contextlib.suppress(OSError):
            paths.append(os.readlink(folder / "fd" / name))
    return paths, True


def _shm_names(folder: Path, opened: list[str]) -> set[str]:
    names = {path.removeprefix("/dev/shm/") for path in opened if path.startswith("/dev/shm/")}  # noqa: S108 - looked at
    with contextlib.suppress(OSError):
        names |= {m.decode(errors="replace") for m in _MAPPED.findall((folder / "maps").read_bytes())}
    return names


def _process(folder: Path, proc: Proc, gpus: tuple[int, ...]) -> Process:
    marks = parse_marks(_bytes(folder / "environ"))
    words = _bytes(folder / "cmdline")[:_READ_BYTES].decode(errors="replace").rstrip("\0").split("\0")
    command = " ".join(redacted(tuple(words))).strip()
    return Process(
        proc.pid,
        proc.name,
        proc.state,
        proc.ppid,
        proc.pgrp,
        engine=marks.engine if marks else "",
        service=marks.service if marks else "",
        command=command[:_COMMAND_CHARS],
        gpus=gpus,
    )


def _segments(folder: Path, held: dict[str, set[int]]) -> Iterable[ShmSegment]:
    now_s = time.time()
    with contextlib.suppress(OSError):
        for entry in sorted(os.scandir(folder), key=lambda e: e.name)[:SHM_MAX]:
            with contextlib.suppress(OSError):
                if not entry.is_file(follow_symlinks=False):
                    continue
                stat = entry.stat(follow_symlinks=False)
                holders = tuple(sorted(held.get(entry.name, ())))
                age_s = max(0.0, now_s - stat.st_mtime)
                yield ShmSegment(entry.name, stat.st_blocks * 512, stat.st_uid, age_s, holders)


def _room(folder: Path) -> tuple[int | None, int | None]:
    with contextlib.suppress(OSError):
        room = os.statvfs(folder)
        return room.f_blocks * room.f_frsize, room.f_bavail * room.f_frsize
    return None, None


def _sees_all(root: Path) -> bool:
    """Whether every process that could hold something is in this /proc: not so in a container, whose host may share
    /dev/shm and the GPUs with it. A root that is not this machine's was written down whole."""
    if root != Path("/"):
        return True
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid") == FIRST_PID_NAMESPACE
    return False


def _bytes(path: Path) -> bytes:
    with contextlib.suppress(OSError):
        return path.read_bytes()
    return b""
