"""Clients that ask over the gateway's own protocol, count every byte, and judge what they got."""

import asyncio
import json
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any

from rotator.sim.faults.life import ServiceLife
from rotator.sim.faults.script import Ask
from rotator.sim.faults.world import World

Message = MutableMapping[str, Any]
PATIENCE_S = 200.0  # no byte for so long: longer than faults last, so nothing excuses it


@dataclass(slots=True)
class Answer:
    """What one request came to. ``verdict`` is whole, refused, failed, broken, left (the client went away) or forgotten
    (nothing was heard of it)."""

    ask: Ask
    begun_s: float
    verdict: str = ""
    status: int = 0
    body: bytes = b""
    ended_s: float = 0.0
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def error(self) -> str:
        try:
            return str(json.loads(self.body)["error"]["message"])
        except (ValueError, KeyError, TypeError):
            return ""

    @property
    def code(self) -> str:
        try:
            return str(json.loads(self.body)["error"]["code"])
        except (ValueError, KeyError, TypeError):
            return ""

    @property
    def served_by(self) -> str:
        """Whose answer it says that it is: the engine that was asked for, or its fallback."""
        return self.headers.get("x-rotator-fallback", self.ask.engine)

    def texts(self) -> list[str]:
        """The pieces of the answer, as the engine gave them."""
        if not self.ask.stream:
            return str(json.loads(self.body)["choices"][0]["message"]["content"]).split()
        return [
            str(json.loads(line)["choices"][0]["delta"]["content"]).strip()
            for line in _data_lines(self.body)
            if line != b"[DONE]" and b'"choices"' in line
        ]

    @property
    def says_done(self) -> bool:
        return not self.ask.stream or b"[DONE]" in _data_lines(self.body)


def _data_lines(body: bytes) -> list[bytes]:
    return [line[6:] for line in body.split(b"\n") if line.startswith(b"data: ")]


class Client:
    """One request, as an ASGI server hands it to the gateway."""

    def __init__(self, world: World, life: ServiceLife, ask: Ask) -> None:
        self.answer = Answer(ask, world.now())
        self._world = world
        self._life = life
        self._sent = False
        self._over = False  # the last byte was sent
        self._gone = asyncio.Event()
        self._heard_s = world.now()

    async def run(self) -> Answer:
        answer, ask = self.answer, self.answer.ask
        serving = self._life.spawn(self._life.gateway(self._scope(ask), self._receive, self._send))
        leaving = None if ask.leaves_s is None else ask.leaves_s
        while not serving.done():
            patience_s = PATIENCE_S if leaving is None else leaving
            quiet_s = self._world.now() - (self._heard_s if leaving is None else answer.begun_s)
            if quiet_s >= patience_s:
                self._gone.set()
                answer.verdict = "forgotten" if leaving is None else "left"
                break
            await asyncio.wait((serving,), timeout=patience_s - quiet_s)
        answer.ended_s = self._world.now()
        if not answer.verdict:
            answer.verdict = self._judge()
        return answer

    def _judge(self) -> str:
        if not self._over:
            return "broken"
        if self.answer.status == 200:
            return "failed" if b'"error"' in self.answer.body else "whole"
        return "refused" if self.answer.status in (429, 503) else "failed"

    def _scope(self, ask: Ask) -> Message:
        headers = [(b"content-type", b"application/json"), (b"x-rotator-deadline-s", f"{ask.deadline_s}".encode())]
        path = "/v1/chat/completions"
        return {
            "type": "http",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": headers,
        }

    async def _receive(self) -> Message:
        if not self._sent:
            self._sent = True
            return {"type": "http.request", "body": self._body(), "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    def _body(self) -> bytes:
        ask = self.answer.ask
        message = {"role": "user", "content": ask.key}
        asked = {"model": ask.engine, "messages": [message], "max_tokens": ask.tokens, "token_s": ask.token_s}
        return json.dumps({**asked, "stream": ask.stream}).encode()

    async def _send(self, message: Message) -> None:
        if self._life.dead or self._gone.is_set() or self._over:
            return
        self._heard_s = self._world.now()
        if message["type"] == "http.response.start":
            self.answer.status = message["status"]
            self.answer.headers = {k.decode(): v.decode("latin-1") for k, v in message["headers"]}
        else:
            self.answer.body += message.get("body", b"")
            self._over = not message.get("more_body", False)
