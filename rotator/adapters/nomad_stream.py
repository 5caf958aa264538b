"""Nomad's event stream: one JSON object a line, on a connection without chunks or length, a heartbeat every 30 s.

Not through python-nomad: its reader holds events back until 512 bytes are there (decision in docs/decisions).
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass
from typing import Any

import aiohttp

from rotator.adapters.nomad_access import NomadAccess
from rotator.ports import LauncherAway

SILENCE_MAX_S = 75.0  # heartbeats come every 30 s: two of them missed, and the connection is dead
CONNECT_S = 10.0
LINE_BYTES_MAX = 16 << 20
TOPICS = ("Job", "Allocation", "Evaluation", "Deployment")


@dataclass(frozen=True, slots=True)
class Told:
    """One line: the jobs that something happened to (none for a heartbeat), and the index to go on from."""

    index: int
    jobs: frozenset[str]


async def follow(access: NomadAccess, jobs: Iterable[str], index: int) -> AsyncGenerator[Told, None]:
    """Yield what is told of these jobs, first a heartbeat at once. Never ends by itself: raises LauncherAway when the
    connection breaks, ends, stays silent, or is refused."""
    params = [("index", str(index)), ("namespace", access.namespace)]
    params += [("region", access.region)] if access.region else []
    params += [("topic", f"{topic}:{job}") for job in sorted(jobs) for topic in TOPICS]
    token = await asyncio.to_thread(access.read_token)
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=SILENCE_MAX_S)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout, headers={"X-Nomad-Token": token} if token else {}) as session,
            session.get(f"{access.address}/v1/event/stream", params=params, ssl=access.ssl_context() or True) as answer,
        ):
            if answer.status != 200:
                raise _refused(answer.status, (await answer.text())[:300])
            async with contextlib.aclosing(_lines(answer.content)) as lines:
                async for line in lines:
                    yield _told(line, index)
    except (aiohttp.ClientError, TimeoutError, OSError) as e:
        raise LauncherAway(f"Nomad's event stream broke: {_reason(e)}") from None
    raise LauncherAway("Nomad's event stream ended")


def _refused(status: int, text: str) -> LauncherAway:
    kind = "token" if status == 403 else "unreachable"
    return LauncherAway(f"Nomad refuses its event stream: {status} {' '.join(text.split())}", kind)


def _reason(error: Exception) -> str:
    match error:
        case aiohttp.ClientConnectorCertificateError():
            return "its certificate is not signed by an authority that we know: give nomad.ca_file"
        case aiohttp.ClientConnectorError():
            return error.os_error.strerror or str(error.os_error)
        case TimeoutError():
            return "not even a heartbeat came"
    return str(error) or type(error).__name__


async def _lines(content: aiohttp.StreamReader) -> AsyncGenerator[bytes, None]:
    """Each line as soon as its end is there. A line without an end is not kept beyond LINE_BYTES_MAX."""
    begun = bytearray()
    async for part in content.iter_any():
        *whole, rest = part.split(b"\n")
        for line in whole:
            yield bytes(begun + line)
            begun.clear()
        begun += rest
        if len(begun) > LINE_BYTES_MAX:
            raise LauncherAway(f"Nomad's event stream sent a line of more than {LINE_BYTES_MAX >> 20} MiB")


def _told(line: bytes, index: int) -> Told:
    try:
        said = json.loads(line) if line.strip() else {}
    except ValueError:
        raise LauncherAway("Nomad's event stream sent what is no JSON: is nomad.address right?") from None
    if not isinstance(said, dict):
        raise LauncherAway("Nomad's event stream sent what is no event: is nomad.address right?")
    events = said.get("Events") or ()
    try:
        return Told(int(said.get("Index") or index), frozenset(job for event in events for job in _jobs(event)))
    except (ValueError, TypeError, AttributeError):
        raise LauncherAway("Nomad's event stream sent what is no event of a kind that we know") from None


def _jobs(event: dict[str, Any]) -> Iterable[str]:
    """An event names its job as its key, or among the keys that it can be filtered by."""
    return (str(key) for key in (event.get("Key"), *(event.get("FilterKeys") or ())) if key)
