"""The engine of the gateway's benchmark: as little work as HTTP/1.1 allows, so that it does not hide the gateway's.

A body with ``"stream":true`` gets ``n`` events, one every ``gap_ms``, each with the time it was written (monotonic
nanoseconds, one clock for all processes of a machine); every other gets one small JSON answer.
"""

import asyncio
import time
from typing import cast

import orjson
import uvloop

_ANSWER = (
    b'{"id":"cmpl-1","object":"text_completion","created":1,"model":"bench",'
    b'"choices":[{"index":0,"text":"Paris","finish_reason":"stop","logprobs":null}],'
    b'"usage":{"prompt_tokens":5,"completion_tokens":1,"total_tokens":6}}'
)
_WHOLE = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(_ANSWER) + _ANSWER
_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
_EVENT = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"bench","t":%d,'
    b'"choices":[{"index":0,"delta":{"content":" token"},"finish_reason":null}]}\n\n'
)
_DONE = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


class Engine(asyncio.Protocol):
    def __init__(self) -> None:
        self._buffer = bytearray()
        self._left = 0
        self._gap_s = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by class
        self._loop = asyncio.get_running_loop()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = bytes(self._buffer[:end]).lower()
            at = head.find(b"content-length:")
            length = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            if len(self._buffer) < end + 4 + length:
                return
            body = bytes(self._buffer[end + 4 : end + 4 + length])
            del self._buffer[: end + 4 + length]
            self._answer(body)

    def _answer(self, body: bytes) -> None:
        if b'"stream":true' not in body:
            self._transport.write(_WHOLE)
            return
        asked = orjson.loads(body)
        self._left, self._gap_s = asked["n"], asked["gap_ms"] / 1e3
        self._transport.write(_HEAD)
        self._next_at_s = self._loop.time()
        self._event()

    def _event(self) -> None:
        if self._transport.is_closing():
            return
        if self._left == 0:
            self._transport.write(_DONE)
            return
        self._left -= 1
        event = _EVENT % time.monotonic_ns()
        self._transport.write(b"%x\r\n%b\r\n" % (len(event), event))
        self._next_at_s += self._gap_s
        self._loop.call_at(self._next_at_s, self._event)


async def serve() -> None:
    """Listen on a free loopback port, print it, and serve until the process is ended."""
    server = await asyncio.get_running_loop().create_server(Engine, "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve())
