"""The demo's client: OpenAI chat requests, streamed and not, and what became of each."""

import asyncio
import json
from dataclasses import dataclass, field

import aiohttp

_DEADLINE_S = 90.0


@dataclass(slots=True)
class Outcome:
    """One request. ``lost`` is one whose answer broke off or never came; ``failed`` is one answered by an error."""

    model: str
    streamed: bool
    waited_s: float = 0.0
    seconds: float = 0.0
    text: str = ""
    failed: str | None = None
    lost: str | None = None
    done: bool = False


@dataclass(slots=True)
class Client:
    url: str
    outcomes: list[Outcome] = field(default_factory=list)

    async def chat(
        self, session: aiohttp.ClientSession, model: str, prompt: str, *, tokens: int, stream: bool
    ) -> Outcome:
        """Send one chat request and read its whole answer. Never raises: the outcome says what happened."""
        loop = asyncio.get_running_loop()
        outcome = Outcome(model, stream)
        self.outcomes.append(outcome)
        body = {
            "model": model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": stream,
        }
        begun = loop.time()
        try:
            async with (
                asyncio.timeout(_DEADLINE_S),
                session.post(f"{self.url}/v1/chat/completions", json=body) as answer,
            ):
                outcome.waited_s = float(answer.headers.get("x-rotator-waited-ms", 0)) / 1000
                if answer.status != 200:
                    outcome.failed = f"{answer.status}: {(await answer.text())[:200]}"
                elif stream:
                    await _read_stream(answer, outcome)
                else:
                    outcome.text = (await answer.json())["choices"][0]["message"]["content"]
        except (aiohttp.ClientError, TimeoutError, KeyError, ValueError) as e:
            outcome.lost = f"{type(e).__name__}: {e}"
        outcome.seconds = loop.time() - begun
        outcome.done = True
        return outcome


async def _read_stream(answer: aiohttp.ClientResponse, outcome: Outcome) -> None:
    ended = False
    async for raw in answer.content:
        line = raw.strip()
        if line == b"data: [DONE]":
            ended = True
        elif line.startswith(b"data: "):
            event = json.loads(line[6:])
            if "error" in event:
                outcome.failed = str(event["error"].get("message", event["error"]))
            for choice in event.get("choices", ()):
                outcome.text += choice["delta"].get("content") or ""
    if not ended and outcome.failed is None:
        outcome.lost = "the stream ended without [DONE]"
