"""An engine's operators' side, in the dialect of its vLLM release (0.19 to 0.33). Parameters of a sleep go into the
query string only: a body is ignored there, so that a level sent in it would silently mean 1."""

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from rotator.adapters.vllm_answers import PROBES, read_probe, unwelcome
from rotator.adapters.vllm_counters import read_counters
from rotator.adapters.vllm_dialect import Dialect, Mode, dialect_of
from rotator.adapters.vllm_http import Answer, Deadline, EngineHttp, Exchange
from rotator.core.values import Level
from rotator.ports import EngineCounters, EngineError, EngineRefused, EngineUnreachable, Generation, Probe
from rotator.ports_nodes import Doors

log = logging.getLogger(__name__)


class VllmControl:
    """EngineControl over HTTP. Every method raises EngineTimeout, EngineUnreachable or EngineRefused, and nothing else.
    ``connect_s`` bounds a connection's set-up: an engine on loopback answers that at once or not at all. ``exchange``
    carries the requests instead of HTTP: simulations replace the network there. ``doors`` lets them through agents."""

    def __init__(
        self, *, connect_s: float = 5.0, exchange: Exchange | None = None, doors: Doors = lambda _: None
    ) -> None:
        self._http = EngineHttp(connect_s=connect_s, exchange=exchange, doors=doors)
        self._noted: set[tuple[str, str]] = set()

    async def version(self, url: str, *, deadline_s: float) -> str:
        return await self._version(url, Deadline(deadline_s))

    async def is_healthy(self, url: str, *, deadline_s: float) -> bool:
        try:
            await self._http.call("GET", url, "/health", Deadline(deadline_s))
        except EngineError:
            return False
        return True

    async def is_sleeping(self, url: str, *, deadline_s: float) -> bool:
        return await self._is_sleeping(url, Deadline(deadline_s))

    async def served_models(self, url: str, *, deadline_s: float) -> tuple[str, ...]:
        answer = await self._http.call("GET", url, "/v1/models", Deadline(deadline_s))
        cards = answer.mapping().get("data")
        if not isinstance(cards, list):
            raise EngineUnreachable(f"{answer.where} lists no models: is it really vLLM?")
        return tuple(str(card["id"]) for card in cards if isinstance(card, dict) and "id" in card)

    async def can_freeze(self, url: str, levels: Collection[Level], *, deadline_s: float) -> bool:
        dialect = await self._dialect(url, Deadline(deadline_s))
        return dialect.knows_mode and all(dialect.sleep_mode(at, abort=False) is Mode.KEEP for at in levels)

    async def sleep(self, url: str, *, level: Level, abort: bool, deadline_s: float) -> None:
        deadline = Deadline(deadline_s)
        mode = (await self._dialect(url, deadline)).sleep_mode(level, abort=abort)
        query = (("level", str(int(level))), ("mode", mode.value))
        answer = await self._http.call("POST", url, "/sleep", deadline, query=query)
        if not _says(answer, "sleeping", level):
            await self._expect_sleeping(url, True, deadline)

    async def wake(self, url: str, *, level: Level, deadline_s: float) -> None:
        deadline = Deadline(deadline_s)
        match level:
            case Level.PAUSE:
                await self._wake_tags(url, ("scheduling",), deadline)
            case Level.HOST:
                await self._wake_tags(url, (), deadline)
            case Level.DISCARD:
                await self._wake_discarded(url, await self._dialect(url, deadline), deadline)

    async def resume(self, url: str, *, deadline_s: float) -> None:
        await self._wake_tags(url, ("scheduling",), Deadline(deadline_s))

    async def sleep_bytes(self, url: str, *, bytes_per_gpu: int, deadline_s: float) -> None:
        deadline = Deadline(deadline_s)
        if not await self._is_sleeping(url, deadline):  # one that sleeps so already only frees more
            query = (("level", str(int(Level.PAUSE))), ("mode", Mode.KEEP.value))
            answer = await self._http.call("POST", url, "/sleep", deadline, query=query)
            if not _says(answer, "sleeping", Level.PAUSE):
                await self._expect_sleeping(url, True, deadline)
            # Nothing may hold a block of a cache that goes: requests in flight are computed again from their tokens.
            reset = (("reset_running_requests", "true"),)
            await self._http.call("POST", url, "/reset_prefix_cache", deadline, query=reset)
        await self._rpc(url, "rotator_sleep_bytes", (bytes_per_gpu,), deadline)

    async def wake_bytes(self, url: str, *, deadline_s: float) -> None:
        deadline = Deadline(deadline_s)
        await self._rpc(url, "rotator_wake", (), deadline)
        await self._wake_tags(url, ("scheduling",), deadline)

    async def place_masters(self, url: str, *, where: str, deadline_s: float) -> None:
        await self._rpc(url, "rotator_masters", (where,), Deadline(deadline_s))

    async def attest(self, url: str, paths: Sequence[str], *, deadline_s: float) -> Sequence[Any]:
        """What each rank says of the files that it runs. Raises EngineRefused where no overlay is mounted."""
        body = {"method": "overlay_attest", "args": [list(paths)]}
        answer = await self._http.call("POST", url, "/collective_rpc", Deadline(deadline_s), body=body)
        ranks = answer.mapping().get("results")
        return ranks if isinstance(ranks, list) else ()

    async def _rpc(self, url: str, method: str, args: Sequence[Any], deadline: Deadline) -> None:
        """Have every rank of the engine run one of our own methods, which its allocator's plugin brings."""
        await self._http.call("POST", url, "/collective_rpc", deadline, body={"method": method, "args": list(args)})

    async def generate(self, url: str, model: str, probe: Probe, *, deadline_s: float) -> Generation:
        """Try the routes on which a model may answer, most models on the first; what a pooling model answers is a
        vector, see ``vllm_answers``."""
        deadline = Deadline(deadline_s)
        refusals: list[EngineRefused] = []
        for route in PROBES:
            try:
                answer = await self._http.call("POST", url, route.path, deadline, body=route.body(model, probe))
            except EngineRefused as e:
                if not unwelcome(e):
                    raise
                refusals.append(e)
                continue
            return read_probe(route, answer.mapping())
        raise EngineRefused("no route answers a probe: " + "; ".join(map(str, refusals)), refusals[0].status)

    async def metrics(self, url: str, *, deadline_s: float) -> str:
        answer = await self._http.call("GET", url, "/metrics", Deadline(deadline_s))
        return answer.body.decode(errors="replace")

    async def counters(self, url: str, *, deadline_s: float) -> EngineCounters:
        return read_counters(await self.metrics(url, deadline_s=deadline_s), f"{url}/metrics")

    async def close(self) -> None:
        await self._http.close()

    async def _version(self, url: str, deadline: Deadline) -> str:
        answer = await self._http.call("GET", url, "/version", deadline)
        version = answer.mapping().get("version")
        if not isinstance(version, str):
            raise EngineUnreachable(f"{answer.where} tells no version: is it really vLLM?")
        return version

    async def _dialect(self, url: str, deadline: Deadline) -> Dialect:
        dialect = dialect_of(await self._version(url, deadline))
        if dialect.note and (url, dialect.version) not in self._noted:
            self._noted.add((url, dialect.version))
            log.warning("engine at %s: %s", url, dialect.note)
        return dialect

    async def _is_sleeping(self, url: str, deadline: Deadline) -> bool:
        answer = await self._http.call("GET", url, "/is_sleeping", deadline)
        sleeping = answer.mapping().get("is_sleeping")
        if not isinstance(sleeping, bool):
            raise EngineUnreachable(f"{answer.where} does not say whether it sleeps: is it really vLLM?")
        return sleeping

    async def _expect_sleeping(self, url: str, expected: bool, deadline: Deadline) -> None:
        """Where the answer was empty, ask: an unknown tag, for one, makes a wake a no-op that answers 200."""
        if await self._is_sleeping(url, deadline) is not expected:
            asked, still = ("sleep", "awake") if expected else ("wake up", "asleep")
            raise EngineRefused(f"{url}: it answered that it did {asked}, but says that it is {still}", 200)

    async def _wake_tags(self, url: str, tags: Sequence[str], deadline: Deadline, *, partly: bool = False) -> None:
        query = [("tags", tag) for tag in tags]
        answer = await self._http.call("POST", url, "/wake_up", deadline, query=query)
        if not partly and not _says(answer, "awake"):
            await self._expect_sleeping(url, False, deadline)

    async def _wake_discarded(self, url: str, dialect: Dialect, deadline: Deadline) -> None:
        """After level 2. Where a partial wake stays paused, nothing runs before weights and caches are fit for it: the
        last step resumes. Elsewhere nothing is frozen (``sleep_mode``), and waking the whole engine first keeps every
        forward pass, also a data-parallel peer's idle one, on mapped memory."""
        staged = dialect.partial_wake_stays_paused
        await self._wake_tags(url, ("weights",) if staged else (), deadline, partly=staged)
        await self._http.call("POST", url, "/collective_rpc", deadline, body={"method": "reload_weights"})
        await self._http.call("POST", url, "/reset_prefix_cache", deadline)
        if staged:
            await self._wake_tags(url, ("kv_cache",), deadline)


def _says(answer: Answer, status: str, level: Level | None = None) -> bool:
    """Whether the body (from 0.32) says what was asked for. False where there is none (up to 0.31). Raises
    EngineRefused where it says something else under a 200."""
    body: Any = answer.json()
    if not isinstance(body, Mapping) or "status" not in body:
        return False
    told_level = body.get("level", level)
    if body["status"] != status or (level is not None and told_level != int(level)):
        raise EngineRefused(f"{answer.where}: it answered 200, but its body says {dict(body)}", 200)
    return True
