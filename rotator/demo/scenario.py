"""What the demo's client does: an order of requests that forces the models to take turns."""

import asyncio
from collections.abc import Callable

import aiohttp

from rotator.demo.client import Client, Outcome

Say = Callable[[str], None]
_LONG_TOKENS = 240  # at 60 tokens a second: four seconds, longer than a turn


async def play(client: Client, say: Say) -> list[str]:
    """Run the whole scenario. Returns problems in words (none: every answer came, whole and unchanged)."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        story = _Story(client, session, say)
        await story.first_turns()
        await story.side_by_side()
        await story.crowd()
        await story.frozen_stream()
        await story.last_round()
        return story.problems


class _Story:
    def __init__(self, client: Client, session: aiohttp.ClientSession, say: Say) -> None:
        self._client = client
        self._session = session
        self._say = say
        self.problems: list[str] = []

    async def _ask(self, model: str, prompt: str = "hello", *, tokens: int = 12, stream: bool = False) -> Outcome:
        return await self._client.chat(self._session, model, prompt, tokens=tokens, stream=stream)

    async def first_turns(self) -> None:
        self._say("each big model is asked once: it starts, and the one before it goes to sleep")
        for model in ("dsv4-flash", "glm-5.1", "mimo-v2.5-flash"):
            await self._ask(model, stream=True)

    async def side_by_side(self) -> None:
        self._say("two small models share GPU 3: neither has to leave for the other")
        await asyncio.gather(self._ask("qwen3.6-27b"), self._ask("gemma-4-26b", stream=True))
        await asyncio.gather(self._ask("coder"), self._ask("writer", stream=True))

    async def crowd(self) -> None:
        self._say("a crowd asks for two big models at once: one wake serves everyone who waits for it")
        models = ("dsv4-flash", "glm-5.1")
        await asyncio.gather(*(self._ask(models[i % 2], f"question {i}", stream=i % 3 == 0) for i in range(12)))

    async def frozen_stream(self) -> None:
        self._say("a long stream is frozen while another model has its turn, and goes on with the same tokens")
        prompt = "tell me a long story"
        calm = await self._ask("dsv4-flash", prompt, tokens=_LONG_TOKENS, stream=True)
        disturbed = asyncio.create_task(self._ask("dsv4-flash", prompt, tokens=_LONG_TOKENS, stream=True))
        await asyncio.sleep(1.5)
        await self._ask("mimo-v2.5-flash", "me first", stream=True)
        frozen = await disturbed
        if frozen.text != calm.text:
            self.problems.append("the frozen stream's tokens differ from those of the undisturbed run")

    async def last_round(self) -> None:
        self._say("and once around, by alias")
        for model in ("glm", "deepseek", "mimo", "coder"):
            await self._ask(model, "once more")
