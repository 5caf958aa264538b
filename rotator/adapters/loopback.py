"""Loopback ports: a free one for an engine, who has one that is taken, and whether one answers."""

import asyncio
import contextlib
import random
import socket
from collections.abc import Container
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import psutil

LOOPBACK = "127.0.0.1"
FIRST_PORT = 20_000
TRIES = 64


@dataclass(frozen=True, slots=True)
class PortHolder:
    """Who listens; both None where the system does not tell (another user's process)."""

    pid: int | None
    name: str | None

    def __str__(self) -> str:
        return f"{self.name} (pid {self.pid})" if self.pid is not None else "another user's process"


class Answer(Enum):
    """What became of an attempt to connect."""

    YES = "yes"
    REFUSED = "refused"  # the machine answers, nobody listens
    SILENT = "silent"  # no answer in time, or no way there: says nothing about the engine


def free_loopback_port(avoid: Container[int] = ()) -> int:
    """A port that nobody listens on now, none of ``avoid``. Taken from below the range that the system hands out to
    outgoing connections, so that one kept for an engine is not lost to such while the engine is stopped."""
    first_outgoing = _first_outgoing_port()
    for _ in range(TRIES if first_outgoing > FIRST_PORT else 0):
        port = random.randrange(FIRST_PORT, first_outgoing)
        if port not in avoid and _can_listen(port):
            return port
    for _ in range(TRIES):
        with socket.socket() as any_port:
            any_port.bind((LOOPBACK, 0))
            found: int = any_port.getsockname()[1]
        if found not in avoid:
            return found
    raise OSError("no free loopback port found: too many programs listen, or too many ports are given to engines")


def port_in_use(port: int) -> PortHolder | None:
    """Who keeps an engine from listening on this loopback port; None if nobody does. May take some 10 ms."""
    if _can_listen(port):
        return None
    pids = sorted(listeners(port))
    if not pids:
        return PortHolder(None, None)
    return PortHolder(pids[0], process_name(pids[0]))


def process_name(pid: int) -> str | None:
    """What the process is called; None where it is gone or the system does not tell."""
    with contextlib.suppress(psutil.Error):
        return str(psutil.Process(pid).name())
    return None


def listeners(port: int) -> frozenset[int]:
    """Processes that listen on this TCP port, as far as the system tells. Blocking, some 10 ms."""
    try:
        connections = psutil.net_connections(kind="tcp")
    except (psutil.Error, OSError):
        return frozenset()
    return frozenset(
        c.pid
        for c in connections
        if c.pid is not None and c.laddr and c.laddr.port == port and c.status == psutil.CONN_LISTEN
    )


async def try_connect(host: str, port: int, *, deadline_s: float) -> Answer:
    """Open a TCP connection and close it again."""
    try:
        async with asyncio.timeout(deadline_s):
            _, writer = await asyncio.open_connection(host, port)
    except ConnectionRefusedError:
        return Answer.REFUSED
    except OSError as e:
        # A name with several addresses: asyncio tells of all the failures in one error.
        return Answer.REFUSED if "refused" in str(e).lower() else Answer.SILENT
    writer.transport.abort()
    return Answer.YES


def _can_listen(port: int) -> bool:
    # As servers do it: connections that linger after a close (TIME_WAIT) are no hindrance, a listener is.
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True


def _first_outgoing_port() -> int:
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 0
