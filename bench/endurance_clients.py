"""The clients of the endurance run: each asks one model after another, reads the answer to its end, and judges it."""

import asyncio
import json
import random
from collections import Counter
from dataclasses import dataclass, field

import aiohttp

DEADLINE_S = 420.0  # longer than any wait the service allows plus an answer: no end by then is none at all
PAUSE_S = 2.0  # the mean of a client's own between two requests
TOKENS = (4, 8, 16)
BROKEN = (aiohttp.ClientPayloadError, aiohttp.ClientOSError, aiohttp.ServerDisconnectedError, ConnectionError)


@dataclass
class Tally:
    """What became of all requests. ``dishonest`` has a line for each that looked whole and was not, or never ended."""

    models: list[str]
    requests: int = 0
    answered: int = 0
    broken: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    dishonest: list[str] = field(default_factory=list)
    waits_s: list[float] = field(default_factory=list)
    golden: dict[tuple[str, int, int], str] = field(default_factory=dict)

    def outcomes(self) -> dict[str, object]:
        return {"answered": self.answered, "broken": self.broken, "errors": dict(self.errors.most_common())}

    def quantile(self, q: float) -> float:
        ordered = sorted(self.waits_s)
        return round(ordered[round(q * (len(ordered) - 1))], 3) if ordered else 0.0

    def whole(self, model: str, prompt: int, tokens: int, text: str) -> None:
        """The same prompt has the same answer, before and after whatever happened to its engine."""
        expected = self.golden.setdefault((model, prompt, tokens), text)
        if text == expected:
            self.answered += 1
        else:
            self.dishonest.append(f"{model} answered {text[:60]!r} where it had answered {expected[:60]!r}")


async def clients(url: str, number: int, seconds: float, seed: int, tally: Tally) -> None:
    """Returns when each has had the end of its last request."""
    loop = asyncio.get_running_loop()
    end_s = loop.time() + seconds
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=DEADLINE_S)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        await asyncio.gather(
            *(_client(session, url, random.Random(seed * 7919 + i), end_s, tally) for i in range(number))
        )


async def _client(session: aiohttp.ClientSession, url: str, draw: random.Random, end_s: float, tally: Tally) -> None:
    loop = asyncio.get_running_loop()
    await asyncio.sleep(draw.random() * 5 * PAUSE_S)
    favourite = draw.choice(tally.models)
    while loop.time() < end_s:
        model = favourite if draw.random() < 0.7 else draw.choice(tally.models)
        await _ask(session, url, model, draw, tally)
        await asyncio.sleep(draw.expovariate(1 / PAUSE_S))


async def _ask(session: aiohttp.ClientSession, url: str, model: str, draw: random.Random, tally: Tally) -> None:
    prompt, tokens, stream = draw.randrange(20), draw.choice(TOKENS), draw.random() < 0.5
    message = {"role": "user", "content": f"question number {prompt}"}
    body = {"model": model, "messages": [message], "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
            "stream": stream}  # fmt: skip
    tally.requests += 1
    try:
        async with session.post(f"{url}/v1/chat/completions", json=body) as answer:
            if answer.status != 200:
                await _error(answer, tally)
                return
            tally.waits_s.append(float(answer.headers.get("x-rotator-waited-ms", 0)) / 1000)
            text = await _stream(answer, model, tally) if stream else _text(await answer.json())
    except TimeoutError:
        tally.dishonest.append(f"{model}: no end within {DEADLINE_S:.0f} s")
    except BROKEN:
        tally.broken += 1
    except (ValueError, KeyError) as error:
        tally.dishonest.append(f"{model}: an answer that cannot be read: {error!r}")
    else:
        if text is not None:
            tally.whole(model, prompt, tokens, text)


async def _error(answer: aiohttp.ClientResponse, tally: Tally) -> None:
    """An honest one says what happened, in the API's own shape."""
    said = json.loads(await answer.read())["error"]
    tally.errors[f"{answer.status} {said.get('code') or said.get('type')}"] += 1


def _text(body: dict[str, object]) -> str:
    choices = body["choices"]
    assert isinstance(choices, list)
    return str(choices[0]["message"]["content"])


async def _stream(answer: aiohttp.ClientResponse, model: str, tally: Tally) -> str | None:
    """None where the stream itself told of an error. One that ends in order without [DONE] claims to be whole."""
    text, done = "", False
    async for line in answer.content:
        if line.startswith(b"data: [DONE]"):
            done = True
        elif line.startswith(b"data: "):
            event = json.loads(line[6:])
            if "error" in event:
                tally.errors["in a stream"] += 1
                return None
            for choice in event.get("choices", ()):
                text += choice["delta"].get("content") or ""
    if not done:
        tally.dishonest.append(f"{model}: a stream ended in order after {text[:60]!r}, without [DONE]")
        return None
    return text
