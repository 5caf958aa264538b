"""Kept connections to engines, by address."""

import asyncio
import socket
import ssl
from dataclasses import dataclass
from urllib.parse import urlsplit

from rotator.ports import RotatorError
from rotator.ports_nodes import UNREACHABLE_HEADER, Door, Doors
from rotator.service.channel import Channel, EngineAnswer, Header, Lost

# Shorter than vLLM's own 5 s, so that we, not it, close an idle connection: no request meets a closing one.
KEEPALIVE_S = 3.0
ORIGINS_MAX = 1024
_UNREACHABLE = UNREACHABLE_HEADER.encode()


class Unreachable(RotatorError):
    """No connection: not one byte of the request was sent."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a base URL leads. ``prefix`` is its path, without a slash at its end."""

    host: str
    port: int
    tls: bool
    prefix: bytes
    host_header: bytes
    door: Door | None = None  # what is shown there


class Pool:
    """No bound on connections: those who may be in flight are bounded before they come here. ``doors`` knows which
    addresses are an agent's: what it says of an engine that it could not reach is told as if we had tried ourselves."""

    def __init__(self, connect_s: float, doors: Doors = lambda _: None) -> None:
        self.connect_s = connect_s
        self._doors = doors
        self._idle: dict[Origin, list[Channel]] = {}
        self._origins: dict[str, Origin] = {}
        self._sweeper: asyncio.TimerHandle | None = None
        self._tls: ssl.SSLContext | None = None
        self._closed = False

    async def ask(self, method: bytes, base: str, target: bytes, headers: list[Header], body: bytes) -> EngineAnswer:
        """Send one request, once. Raises Unreachable and Lost."""
        origin = self._origins.get(base)
        if origin is None or origin.door != self._doors(base):  # each launch of an engine has a key of its own
            origin = self._origin(base)
        channel = self._take(origin) or await self._connect(origin)
        lines = [b"%b %b%b HTTP/1.1\r\nhost: %b\r\n" % (method, origin.prefix, target, origin.host_header)]
        lines += [b"%b: %b\r\n" % header for header in headers]
        if origin.door is not None:
            lines += [f"{name}: {value}\r\n".encode() for name, value in origin.door.headers.items()]
        if body or method == b"POST":
            lines.append(b"content-length: %d\r\n" % len(body))
        lines.append(b"\r\n")
        answer = await channel.ask(b"".join(lines), body)
        if origin.door is not None:
            await _through(answer)
        return answer

    def close(self) -> None:
        """Close what is idle; what is in use closes when its answer ends."""
        self._closed = True
        if self._sweeper is not None:
            self._sweeper.cancel()
        for channels in self._idle.values():
            for channel in channels:
                channel.transport.abort()
        self._idle.clear()

    def _take(self, origin: Origin) -> Channel | None:
        channels = self._idle.get(origin)
        while channels:
            channel = channels.pop()  # the one used last is the least likely to be closing
            if channel.usable:
                return channel
        return None

    async def _connect(self, origin: Origin) -> Channel:
        loop = asyncio.get_running_loop()
        tls = origin.door.tls if origin.door is not None else None
        if tls is None and origin.tls:
            tls = self._tls = self._tls or ssl.create_default_context()
        try:
            async with asyncio.timeout(self.connect_s):
                transport, channel = await loop.create_connection(
                    lambda: Channel(lambda idle: self._put(origin, idle)),
                    origin.host,
                    origin.port,
                    ssl=tls,
                )
        except TimeoutError:
            raise Unreachable(f"no connection to it within {self.connect_s:g} s") from None
        except OSError as e:
            raise Unreachable(f"no connection to it: {e.strerror or e}") from None
        if (plain := transport.get_extra_info("socket")) is not None:
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # an engine's machine may vanish
        return channel

    def _put(self, origin: Origin, channel: Channel) -> None:
        if self._closed or not channel.usable:
            channel.transport.abort()
            return
        loop = asyncio.get_running_loop()
        channel.idle_since_s = loop.time()
        self._idle.setdefault(origin, []).append(channel)
        if self._sweeper is None:
            self._sweeper = loop.call_later(KEEPALIVE_S / 2, self._sweep, loop)

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        """Close what has been idle for too long, and come again while anything is idle."""
        oldest_s = loop.time() - KEEPALIVE_S / 2
        for origin, channels in list(self._idle.items()):
            kept = [c for c in channels if c.usable and c.idle_since_s > oldest_s]
            for channel in channels:
                if channel.idle_since_s <= oldest_s:
                    channel.transport.abort()
            if kept:
                self._idle[origin] = kept
            else:
                del self._idle[origin]
        self._sweeper = loop.call_later(KEEPALIVE_S / 2, self._sweep, loop) if self._idle else None

    def _origin(self, base: str) -> Origin:
        if len(self._origins) >= ORIGINS_MAX:
            self._origins.clear()
        parts = urlsplit(base)
        if not parts.hostname:
            raise Unreachable(f"'{base}' is no address")
        tls = parts.scheme == "https"
        origin = Origin(
            parts.hostname,
            parts.port or (443 if tls else 80),
            tls,
            parts.path.rstrip("/").encode(),
            parts.netloc.rpartition("@")[2].encode(),
            self._doors(base),
        )
        self._origins[base] = origin
        return origin


async def _through(answer: EngineAnswer) -> None:
    """Raises Unreachable or Lost where the answer is an agent's own, and not the engine's."""
    word = next((value for name, value in answer.headers if name == _UNREACHABLE), None)
    if word is None:
        return
    words = (await answer.read())[:300].decode("utf-8", "replace")
    raise (Lost if word == b"lost" else Unreachable)(f"its node's agent says: {words}")
