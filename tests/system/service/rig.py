"""A fleet of real processes: a simulated box, stub engines, and the service as `rotator serve` would be run."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import aiohttp

from allocator.box import SimulatedBox

GIB = 1 << 30
SOON_S = 25.0  # a bound on whatever should happen at once: generous, as two cores may be shared by many
BROKEN = (aiohttp.ClientPayloadError, aiohttp.ClientOSError, aiohttp.ServerDisconnectedError, ConnectionError)


@dataclass(slots=True)
class Answer:
    """What one client saw. ``whole`` is whether HTTP ended the answer in order; ``done`` is a stream's [DONE]."""

    status: int = 0
    text: str = ""
    done: bool = False
    whole: bool = False
    error: str | None = None
    broken: str | None = None
    comments: list[str] = field(default_factory=list)
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def claims_to_be_complete(self) -> bool:
        """Whether a client could take it for a full answer."""
        return self.status == 200 and self.error is None and (self.done or (self.whole and self.broken is None))


class Chat:
    """One chat request under way; ``first`` is set when its first token has come."""

    def __init__(
        self, url: str, model: str, prompt: str, tokens: int, stream: bool, headers: Mapping[str, str]
    ) -> None:
        self.answer = Answer()
        self.first = asyncio.Event()
        body = {
            "model": model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": stream,
        }
        self.task = asyncio.create_task(self._run(f"{url}/v1/chat/completions", body, stream, headers))

    async def _run(self, url: str, body: Mapping[str, Any], stream: bool, headers: Mapping[str, str]) -> Answer:
        answer = self.answer
        timeout = aiohttp.ClientTimeout(total=90)
        try:
            async with (
                aiohttp.ClientSession(timeout=timeout) as session,
                session.post(url, json=body, headers=headers) as response,
            ):
                answer.status, answer.headers = response.status, response.headers
                if response.status != 200 or not stream:
                    await self._whole(response)
                else:
                    async for line in response.content:
                        self._line(line.decode().rstrip("\n"))
                answer.whole = True
        except BROKEN as e:
            answer.broken = f"{type(e).__name__}: {e}"
        return answer

    async def _whole(self, response: aiohttp.ClientResponse) -> None:
        body = await response.json()
        if response.status == 200:
            self.answer.text = body["choices"][0]["message"]["content"]
        else:
            self.answer.error = body["error"]["message"]

    def _line(self, line: str) -> None:
        if line == "data: [DONE]":
            self.answer.done = True
        elif line.startswith(":"):
            self.answer.comments.append(line)
        elif line.startswith("data: "):
            event = json.loads(line[6:])
            if "error" in event:
                self.answer.error = event["error"]["message"]
            for choice in event.get("choices", ()):
                self.answer.text += choice["delta"].get("content") or ""
            if self.answer.text:
                self.first.set()

    async def begun(self) -> Self:
        """Return when its first token has come."""
        async with asyncio.timeout(SOON_S):
            await self.first.wait()
        return self

    async def end(self) -> Answer:
        async with asyncio.timeout(90):
            return await self.task

    async def leave(self) -> None:
        """The client goes away."""
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


class Events:
    """All that the event stream of one life of the service told."""

    def __init__(self, url: str) -> None:
        self.seen: list[dict[str, Any]] = []
        self._news = asyncio.Condition()
        self._task = asyncio.create_task(self._follow(url))

    async def _follow(self, url: str) -> None:
        timeout = aiohttp.ClientTimeout(total=None)
        with contextlib.suppress(*BROKEN, aiohttp.ClientError):
            async with (
                aiohttp.ClientSession(timeout=timeout) as session,
                session.get(f"{url}/events?after=0") as answer,
            ):
                async for line in answer.content:
                    if line.startswith(b"data: "):
                        async with self._news:
                            self.seen.append(json.loads(line[6:]))
                            self._news.notify_all()

    def now(self) -> int:
        """A place in the stream, to look from there on."""
        return len(self.seen)

    def find(self, kind: str, engine: str | None = None, since: int = 0) -> list[dict[str, Any]]:
        return [e for e in self.seen[since:] if e["kind"] == kind and engine in (None, e["engine"])]

    async def wait(self, kind: str, engine: str | None = None, since: int = 0, within_s: float = SOON_S) -> Any:
        """The first such event after ``since``."""
        try:
            async with asyncio.timeout(within_s), self._news:
                while not (found := self.find(kind, engine, since)):
                    await self._news.wait()
            return found[0]
        except TimeoutError:
            tail = "\n".join(str(e)[:300] for e in self.seen[-12:])
            raise AssertionError(f"no {kind} of {engine} within {within_s} s; last events:\n{tail}") from None

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


def engine(name: str, **more: Any) -> dict[str, Any]:
    """An engine for the fleet file. ``arguments`` are the stub's; ``weights_gib`` and ``kv_gib`` its size a GPU."""
    gpus = more.pop("gpus", [0])
    weights, kv = more.pop("weights_gib", 8), more.pop("kv_gib", 4)
    misbehave, arguments = more.pop("misbehave", None), more.pop("arguments", [])
    command = [sys.executable, "-m", "rotator.demo.engine", "--name", name, "--port", "{port}"]
    command += ["--gpus", ",".join(map(str, gpus)), "--weights-gib", str(weights), "--kv-gib", str(kv)]
    command += [*arguments, *(["--misbehave", json.dumps(misbehave)] if misbehave else [])]
    return {
        "name": name,
        "gpus": gpus,
        "command": command,
        "start_deadline_s": 40,
        "stop_grace_s": 1,
        "footprint": {"awake_gib": weights + kv + 1, "residue_gib": 1},
        **more,
    }


def merge(base: dict[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in more.items():
        base[key] = merge(dict(base.get(key, {})), value) if isinstance(value, Mapping) else value
    return base


class Rig:
    """``gpus`` GPUs of 20 GiB each, shown: two engines of the default size cannot be awake on one of them together."""

    def __init__(self, folder: Path, engines: list[dict[str, Any]], gpus: int = 1, **settings: Any) -> None:
        self.folder = folder
        self.box = SimulatedBox.create(folder / "box", devices=gpus, memory_bytes=20 * GIB, copy_gib_s=0)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.engines = engines
        self.settings = settings
        self.service: subprocess.Popen[bytes] | None = None
        self.events: Events
        self.last_type = ""
        self._calls: aiohttp.ClientSession | None = None

    # -- the service -------------------------------------------------------------------------------------------------

    def write_fleet(self) -> Path:
        """Write the fleet file from ``engines`` and ``settings``, as they are now."""
        base: dict[str, Any] = {
            "bind": {"port": self.port},
            "state_dir": "state",
            "host_memory_gib": 500,
            "devices": {"sample_every_s": 0.2, "read_deadline_s": 2},
            # Turns without prices: most stories are about what a swap does, and each asks for its own.
            "policies": {
                "min_stay_s": 0.0,
                "drain_bound_s": 0.2,
                "swap_share": None,
                "preempt": False,
                "prewake_chance": None,
            },
            "gateway": {"keepalive_s": 0.2, "freezes_max": 100},
            "recovery": {
                "backoff_first_s": 0.2,
                "backoff_max_s": 2,
                "vram_drain_deadline_s": 10,
                "breaker_failures": 100,  # engines fail again and again here
            },
            "engines": [{**e, "env": {**self.box.env(), **e.get("env", {})}} for e in self.engines],
        }
        path = self.folder / "fleet.yaml"
        path.write_text(json.dumps(merge(base, self.settings), indent=1))
        return path

    async def serve(self, prepare: Callable[[], None] | None = None) -> None:
        """Start the service and return when it is ready."""
        self.spawn(prepare)
        await self.until_ready()
        self.events = Events(self.url)

    def spawn(self, prepare: Callable[[], None] | None = None) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "rotator", "serve", "-c", str(self.write_fleet())]
        environment = {**os.environ, **self.box.nvml_env()}
        with (self.folder / "service.log").open("ab") as log:
            self.service = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                env=environment,
                preexec_fn=prepare,  # noqa: PLW1509 # only limits are set there
            )
        return self.service

    async def until_ready(self, within_s: float = 40.0) -> None:
        async def is_ready() -> bool:
            assert self.service is not None
            assert self.service.poll() is None, f"the service ended:\n{self.log()}"
            with contextlib.suppress(aiohttp.ClientError):
                return (await self.call("GET", "/readyz"))[0] == 200
            return False

        await eventually(is_ready, within_s=within_s, what=lambda: f"readiness; its log ends:\n{self.log()}")

    async def ended(self, within_s: float = SOON_S) -> int:
        """The service's exit code, once it has ended."""
        assert self.service is not None
        return await asyncio.to_thread(self.service.wait, within_s)

    async def kill(self) -> None:
        """kill -9 of the service."""
        assert self.service is not None
        self.service.kill()
        await self.ended()
        await self.events.close()

    async def restart(self) -> None:
        await self.kill()
        await self.serve()

    async def terminate(self) -> int:
        assert self.service is not None
        self.service.send_signal(signal.SIGTERM)
        return await self.ended()

    def log(self) -> str:
        return "\n".join((self.folder / "service.log").read_text(errors="replace").splitlines()[-25:])

    async def close(self) -> None:
        """End every process that names this box: the engines outlive the service by design."""
        if hasattr(self, "events"):
            await self.events.close()
        if self._calls is not None:
            await self._calls.close()
        if self.service is not None:
            self.service.kill()
            self.service.wait()
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        await eventually(lambda: not self.processes(), what="the end of all processes of the rig")

    # -- processes ---------------------------------------------------------------------------------------------------

    def processes(self, mark: str | None = None) -> set[int]:
        """Every living process with the box (or ``mark``) in its environment."""
        wanted = (mark or f"ROTATOR_SIM_BOX={self.box.path}").encode() + b"\0"
        return {pid for pid in _pids() if wanted in _environment(pid)} - {os.getpid()}

    def engine_processes(self, name: str) -> set[int]:
        return self.processes(f"ROTATOR_ENGINE={name}") & self.processes()

    async def pid(self, name: str) -> int:
        (pid,) = (await self.view(name))["pids"]
        return int(pid)

    async def pids(self) -> dict[str, set[int]]:
        return {e["name"]: self.engine_processes(e["name"]) for e in self.engines}

    # -- requests ----------------------------------------------------------------------------------------------------

    def chat(self, model: str, prompt: str = "hello", tokens: int = 8, stream: bool = True, **headers: str) -> Chat:
        return Chat(self.url, model, prompt, tokens, stream, headers)

    async def say(self, model: str, prompt: str = "hello", tokens: int = 8, stream: bool = False) -> str:
        """A request that must be answered whole. Returns the text."""
        answer = await self.chat(model, prompt, tokens, stream).end()
        assert answer.status == 200, f"{answer.status}: {answer.error}\n{self.log()}"
        assert answer.whole, answer.broken
        assert answer.error is None
        assert answer.done or not stream
        return answer.text

    async def call(self, method: str, path: str, **more: Any) -> tuple[int, Any]:
        """Status and JSON of an operator's request (or of one to an engine, by its whole URL)."""
        url = path if path.startswith("http") else self.url + path
        if self._calls is None:
            self._calls = aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(total=60), connector=aiohttp.TCPConnector(force_close=True)
            )
        async with self._calls.request(method, url, **more) as answer:
            self.last_type = answer.content_type
            return answer.status, await answer.json(content_type=None)

    async def get(self, path: str) -> Any:
        status, body = await self.call("GET", path)
        assert status == 200, body
        return body

    async def post(self, path: str, **body: Any) -> Any:
        status, answer = await self.call("POST", path, json=body or None)
        assert status in (200, 202), answer
        return answer

    async def problem(self, method: str, path: str, **body: Any) -> Any:
        """A request that must be refused. Returns the problem (RFC 9457)."""
        status, answer = await self.call(method, path, json=body or None)
        assert status >= 400, answer
        assert self.last_type == "application/problem+json"
        assert answer["status"] == status
        assert answer["title"]
        assert answer["detail"]
        return answer

    async def readiness(self) -> Any:
        return (await self.call("GET", "/readyz"))[1]

    async def view(self, name: str) -> Any:
        return await self.get(f"/engines/{name}")

    async def state(self, name: str) -> str:
        return str((await self.view(name))["state"])

    async def misbehave(self, name: str, **how: Any) -> None:
        """Tell an engine to misbehave from now on, in these ways only."""
        status, body = await self.call(
            "POST", f"{(await self.view(name))['url']}/stub/misbehave", json={"reset": True, **how}
        )
        assert status == 200, body

    async def stub_state(self, name: str) -> Any:
        return await self.get(f"{(await self.view(name))['url']}/stub/state")

    # -- what must hold ----------------------------------------------------------------------------------------------

    async def until_state(self, name: str, *states: str, within_s: float = SOON_S) -> None:
        async def reached() -> bool:
            return await self.state(name) in states

        await eventually(reached, within_s=within_s, what=lambda: f"{name} {states}; log:\n{self.log()}")

    async def settled(self) -> None:
        """Return when no swap is under way and every engine rests."""

        async def rests() -> bool:
            moving = {"starting", "draining", "falling_asleep", "waking", "stopping"}
            return not moving & {e["state"] for e in await self.get("/engines")} and not await self._claimed()

        await eventually(rests, what=lambda: f"rest; log:\n{self.log()}")

    async def _claimed(self) -> bool:
        return any(g["claimed_by"] for g in await self.get("/gpus"))

    async def _nothing_open(self) -> bool:
        return not (await self.get("/ledger?table=transitions&result=open"))["rows"]

    async def check(self) -> None:
        """The ledger says what the devices say, nothing is half done, no process is doubled or left over."""
        await self.settled()
        check: Any = {}

        async def matches() -> bool:
            check.update(await self.get("/ledger/check"))
            return bool(check["matches"])

        await eventually(matches, within_s=5, what=lambda: f"the ledger like the devices: {check}")
        await eventually(self._nothing_open, within_s=5, what="an outcome of every transition")
        assert self.service is not None
        views = {e["name"]: e for e in await self.get("/engines")}
        live = {name for name, e in views.items() if e["state"] in ("awake", "asleep")}
        for name, pids in (await self.pids()).items():
            assert len(pids) == (name in live), f"{name} is {views[name]['state']} with processes {pids}"
        for name in live:
            sleeping = (await self.get(f"{views[name]['url']}/is_sleeping"))["is_sleeping"]
            assert sleeping == (views[name]["state"] == "asleep"), name


@contextlib.asynccontextmanager
async def rig_up(folder: Path, engines: list[dict[str, Any]], gpus: int = 1, **settings: Any) -> AsyncIterator[Rig]:
    """A rig with its service running; whatever happens, none of its processes stays."""
    rig = Rig(folder, engines, gpus, **settings)
    try:
        await rig.serve()
        yield rig
    finally:
        await rig.close()


async def eventually(
    condition: Callable[[], bool] | Callable[[], Awaitable[bool]],
    *,
    within_s: float = SOON_S,
    what: str | Callable[[], str] = "it",
) -> None:
    """Look often until the condition holds; fails by name after ``within_s`` seconds."""
    try:
        async with asyncio.timeout(within_s):
            while True:
                result = condition()
                if await result if isinstance(result, Awaitable) else result:
                    return
                await asyncio.sleep(0.02)
    except TimeoutError:
        words = what if isinstance(what, str) else what()
        raise AssertionError(f"did not happen within {within_s} s: {words}") from None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _environment(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()  # empty for a zombie
    except OSError:
        return b""
