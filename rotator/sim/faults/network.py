"""The network between the service and its engines: operators' questions whole, clients' requests as bytes."""

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from rotator.sim.faults.engine import SimEngine
from rotator.sim.faults.process import Process
from rotator.sim.faults.wires import Lost
from rotator.sim.faults.world import World, alive

LATENCY_S = 0.0004


class Network:
    def __init__(self, world: World, engines: Sequence[SimEngine], on_serve: Callable[[Process, str], None]) -> None:
        self._world = world
        self._engines = engines
        self._on_serve = on_serve

    # -- operators' side: what takes the place of HTTP in the vLLM adapter -------------------------------------------

    async def exchange(
        self, method: str, url: str, query: Sequence[tuple[str, str]], body: Mapping[str, Any] | None
    ) -> tuple[int, bytes]:
        """Raises as aiohttp does. A caller that goes away does not undo what it asked for."""
        alive()
        parts = urlsplit(url)
        process = await self._reach(parts.port or 0)
        if parts.path in ("/sleep", "/wake_up"):
            self._world.on_effect("sleep" if parts.path == "/sleep" else "wake")
            alive()
        answering = process.do(process.answer(method, parts.path, query, body))
        await self._world.pause(LATENCY_S)
        await self._world.over(answering)
        if answering.cancelled() or isinstance(answering.exception(), Lost):
            raise aiohttp.ServerDisconnectedError
        if process.engine.is_cut:
            raise aiohttp.ClientOSError(104, "Connection reset by peer")
        status, raw = answering.result()
        return status, raw

    async def _reach(self, port: int) -> Process:
        await self._world.pause(LATENCY_S)
        for engine in self._engines:
            for process in engine.processes:
                if process.port == port and process.ready:
                    if engine.is_cut and engine.cut_silent:
                        await self._world.pause(3600.0)
                    if not engine.is_cut:
                        return process
        raise aiohttp.ClientOSError(111, "Connection refused")

    # -- clients' side: what takes the place of TCP under the gateway ------------------------------------------------

    async def connect(self, protocol: asyncio.Protocol, port: int) -> "Wire":
        """Raises OSError."""
        alive()
        try:
            process = await self._reach(port)
        except aiohttp.ClientOSError as e:
            raise ConnectionRefusedError(e.errno, str(e.strerror)) from None
        wire = Wire(self._world, process, protocol, self._on_serve)
        protocol.connection_made(wire)
        return wire


class Wire(asyncio.Transport):
    """One connection to an engine: the client's end as a transport, the engine's end as a server of completions."""

    def __init__(
        self, world: World, process: Process, protocol: asyncio.Protocol, on_serve: Callable[[Process, str], None]
    ) -> None:
        super().__init__()
        self._world = world
        self._process = process
        self._protocol = protocol
        self._on_serve = on_serve
        self._closed = False
        self._paused = False
        self._waiting: list[bytes] = []
        self._request = b""
        self._serving: asyncio.Task[None] | None = None
        self._streams = False
        process.wires.append(self)

    # -- the service's end -------------------------------------------------------------------------------------------

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._closed:
            return
        self._request += bytes(data)
        head, blank, body = self._request.partition(b"\r\n\r\n")
        if blank and len(body) >= _content_length(head):
            self._request = b""
            self._serving = self._process.do(self._serve(body))

    def writelines(self, list_of_data: Any) -> None:
        self.write(b"".join(list_of_data))

    def close(self) -> None:
        self._end(None)

    def abort(self) -> None:
        self._end(None)

    def is_closing(self) -> bool:
        return self._closed

    def pause_reading(self) -> None:
        self._paused = True

    def resume_reading(self) -> None:
        self._paused = False
        waiting, self._waiting = self._waiting, []
        for data in waiting:
            self._send(data)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def _end(self, error: Exception | None) -> None:
        if self._closed:
            return
        self._closed = True
        if self in self._process.wires:
            self._process.wires.remove(self)
        if self._serving is not None:
            self._serving.cancel()
        self._world.loop.call_soon(self._protocol.connection_lost, error)

    # -- the engine's end --------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        return self._serving is not None and not self._serving.done()

    def lost(self) -> None:
        self._end(ConnectionResetError(104, "Connection reset by peer"))

    def finish_early(self) -> None:
        """What a sleep with mode=abort does to a stream: it looks whole."""
        if self._serving is not None and self._streams:
            self._serving.cancel()
            self._event("[DONE]")
            self._send(b"0\r\n\r\n")

    def _send(self, data: bytes) -> None:
        if self._closed:
            return
        if self._paused:
            self._waiting.append(data)
        else:
            self._world.loop.call_soon(self._deliver, data)

    def _deliver(self, data: bytes) -> None:
        if not self._closed:
            self._protocol.data_received(data)

    async def _serve(self, body: bytes) -> None:
        asked = json.loads(body)
        process = self._process
        key = asked["messages"][0]["content"]
        self._on_serve(process, key)
        await asyncio.sleep(LATENCY_S)
        if asked["model"] != process.model:
            self._whole(404, {"error": {"message": f"The model `{asked['model']}` does not exist."}})
        elif asked.get("stream"):
            await self._stream(asked, key)
        else:
            text = [await self._token(asked, key, i) for i in range(asked["max_tokens"])]
            self._whole(200, self._chunk("".join(text), "message"))

    async def _token(self, asked: Mapping[str, Any], key: str, i: int) -> str:
        await self._process.turn(asked["token_s"])
        if self._process.engine.is_cut:
            self._process.engine.trouble()
            self.lost()
        return f"{self._process.model}|{key}|{i} " if self._process.sane else "!!!! "

    async def _stream(self, asked: Mapping[str, Any], key: str) -> None:
        self._streams = True
        self._send(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        for i in range(asked["max_tokens"]):
            self._event(json.dumps(self._chunk(await self._token(asked, key, i), "delta")))
        self._event("[DONE]")
        self._send(b"0\r\n\r\n")
        self._streams = False

    def _chunk(self, text: str, part: str) -> dict[str, Any]:
        return {"id": "chatcmpl-1", "model": self._process.model, "choices": [{"index": 0, part: {"content": text}}]}

    def _event(self, data: str) -> None:
        raw = f"data: {data}\n\n".encode()
        self._send(b"%x\r\n%b\r\n" % (len(raw), raw))

    def _whole(self, status: int, body: Mapping[str, Any]) -> None:
        raw = json.dumps(body).encode()
        head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {len(raw)}\r\n\r\n"
        self._send(head.encode() + raw)


def _content_length(head: bytes) -> int:
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
    return 0
