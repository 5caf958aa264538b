"""Engines that already run at a URL: found and watched, never started and never stopped."""

import asyncio
import ipaddress
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from rotator.adapters.blocking import off_loop
from rotator.adapters.loopback import Answer, listeners, try_connect
from rotator.adapters.proctable import Identity, TableReader
from rotator.ports import Handle, LaunchError, LaunchSpec

LAUNCHER = "attach"
CONNECT_DEADLINE_S = 2.0
WATCH_EVERY_S = 1.0
REFUSALS_MAX = 3  # one alone may be a restart of its front end
LISTENERS_FRESH_S = 10.0  # who listens changes rarely, and asking is dear
TABLE_DEADLINE_S = 5.0


class AttachLauncher:
    """A Launcher for one event loop."""

    def __init__(self) -> None:
        self._reader = TableReader()
        self._reading = asyncio.Lock()
        self._listeners: dict[int, tuple[float, frozenset[Identity]]] = {}

    async def start(self, spec: LaunchSpec) -> Handle:
        raise LaunchError(f"engine '{spec.engine}' is attached ({spec.url}): start it where it runs")

    async def find(self, spec: LaunchSpec, ref: Mapping[str, Any] | None) -> Handle | None:
        host, port = _address(spec.engine, spec.url)
        if await try_connect(host, port, deadline_s=CONNECT_DEADLINE_S) is not Answer.YES:
            return None
        return Handle(spec.engine, LAUNCHER, spec.url, {"host": host, "port": port})

    async def is_alive(self, handle: Handle) -> bool:
        """False when its port refuses. No answer in time says nothing: it counts as alive."""
        host, port = _address(handle.engine, handle.url)
        return await try_connect(host, port, deadline_s=CONNECT_DEADLINE_S) is not Answer.REFUSED

    async def wait_exit(self, handle: Handle) -> str:
        host, port = _address(handle.engine, handle.url)
        refusals = 0
        while refusals < REFUSALS_MAX:
            await asyncio.sleep(WATCH_EVERY_S)
            answer = await try_connect(host, port, deadline_s=CONNECT_DEADLINE_S)
            refusals = refusals + 1 if answer is Answer.REFUSED else 0
        return f"gone: {handle.url} refused {REFUSALS_MAX} connections in a row (attached: its log is where it runs)"

    async def stop(self, handle: Handle, *, grace_s: float) -> None:
        raise LaunchError(f"engine '{handle.engine}' is attached ({handle.url}): stop it where it runs")

    async def pids(self, handle: Handle) -> frozenset[int]:
        """Who listens on its port and all that descends from it; the whole session where the listener leads one.
        Empty where it runs elsewhere or as another user."""
        host, port = _address(handle.engine, handle.url)
        if not _is_loopback(host):
            return frozenset()
        async with self._reading:
            now_s = asyncio.get_running_loop().time()
            return await off_loop(
                lambda: self._pids(port, now_s),
                deadline_s=TABLE_DEADLINE_S,
                doing=f"listing the processes of engine '{handle.engine}'",
            )

    async def evidence(self, handle: Handle) -> str:
        return ""  # its log is where it runs

    def _pids(self, port: int, now_s: float) -> frozenset[int]:
        table = self._reader.read()
        asked_s, roots = self._listeners.get(port, (now_s - 2 * LISTENERS_FRESH_S, frozenset()))
        still_there = any(proc.identity in roots for proc in table.procs.values())
        if now_s - asked_s > LISTENERS_FRESH_S or not still_there:
            roots = frozenset(table.procs[pid].identity for pid in listeners(port) if pid in table.procs)
            self._listeners[port] = now_s, roots
        return frozenset(proc.pid for proc in table.family(roots, None))


def _address(engine: str, url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        port = 0
    if not parts.hostname or not port:
        raise LaunchError(f"engine '{engine}': {url} is no URL of an engine: give http://host:port")
    return parts.hostname, port


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
