"""What a WebSocket client has sent and nobody has taken yet: read at once, so that its going is noticed at once."""

import asyncio
from collections import deque

from rotator.service.responses import Message, Receive

INBOX_BYTES_MAX = 16 << 20


class Inbox:
    """``fill`` runs as a task of its own and ends when the client left (``code`` says how) or sent too much before
    anybody could take it (``overflowed``). Once ``flowing``, a full inbox holds the client back instead."""

    def __init__(self, receive: Receive) -> None:
        self.code = 1006
        self.overflowed = False
        self.flowing = False
        self._receive = receive
        self._messages: deque[str | bytes] = deque()
        self._bytes = 0
        self._changed = asyncio.Event()

    async def fill(self) -> None:
        while (message := await self._receive())["type"] == "websocket.receive":
            self._put(_content(message))
            while self._bytes > INBOX_BYTES_MAX:
                if not self.flowing:
                    self.overflowed = True
                    return
                await self._change()
        self.code = message.get("code") or 1005

    async def get(self) -> str | bytes:
        while not self._messages:
            await self._change()
        content = self._messages.popleft()
        self._bytes -= len(content)
        self._changed.set()
        return content

    def put_back(self, content: str | bytes) -> None:
        self._messages.appendleft(content)
        self._bytes += len(content)
        self._changed.set()

    def _put(self, content: str | bytes) -> None:
        self._messages.append(content)
        self._bytes += len(content)
        self._changed.set()

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()


def _content(message: Message) -> str | bytes:
    text = message.get("text")
    return text if isinstance(text, str) else message.get("bytes") or b""
