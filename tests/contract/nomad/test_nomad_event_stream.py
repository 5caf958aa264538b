"""The event stream byte by byte: no chunks, no length, lines that come in pieces, and every way in which it ends."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from pathlib import Path

import pytest

from rotator.adapters import nomad_stream
from rotator.adapters.nomad_access import NomadAccess
from rotator.adapters.nomad_stream import Told, follow
from rotator.ports import LauncherAway
from tests.nomad_double import NomadDouble
from tests.nomad_double.sample import sample_job

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n"


class Server:
    """Answers one request with what a test writes, piece by piece."""

    def __init__(self) -> None:
        self.asked = ""
        self._writer: asyncio.Future[asyncio.StreamWriter] = asyncio.get_running_loop().create_future()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.asked = (await reader.readuntil(b"\r\n\r\n")).decode()
        self._writer.set_result(writer)
        with contextlib.suppress(ConnectionError):
            await reader.read()
        writer.close()

    async def send(self, piece: bytes) -> None:
        writer = await self._writer
        writer.write(piece)
        await writer.drain()

    async def end(self) -> None:
        (await self._writer).close()


@pytest.fixture
async def server() -> AsyncIterator[tuple[Server, Callable[..., AsyncGenerator[Told, None]]]]:
    made = Server()
    listening = await asyncio.start_server(made.serve, "127.0.0.1", 0)
    access = NomadAccess(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}", "models", token="s3cret")
    yield made, lambda *jobs, index=0: follow(access, jobs, index)
    listening.close()


async def told(lines: AsyncGenerator[Told, None]) -> Told:
    async with asyncio.timeout(5):
        return await anext(lines)


Rig = tuple[Server, Callable[..., AsyncGenerator[Told, None]]]


async def test_it_asks_for_its_jobs_alone_from_where_it_was(server: Rig) -> None:
    made, follow_ = server
    lines = follow_("vllm-a", "vllm-b", index=41)
    first = asyncio.create_task(told(lines))
    await made.send(HEAD + b"{}\n")
    assert await first == Told(41, frozenset())
    assert made.asked.startswith("GET /v1/event/stream?index=41&namespace=models&topic=Job:vllm-a")
    assert made.asked.count("topic=Allocation:") == 2
    assert "X-Nomad-Token: s3cret" in made.asked
    await lines.aclose()


async def test_a_small_event_is_told_as_soon_as_its_line_is_whole(server: Rig) -> None:
    made, follow_ = server
    lines = follow_("vllm-a")
    first = asyncio.create_task(told(lines))
    await made.send(HEAD + b"{}\n")
    await first
    event = asyncio.create_task(told(lines))
    await made.send(b'{"Index":42,"Events":[{"Topic":"Allocation","Key":"al')
    await asyncio.sleep(0.05)
    assert not event.done()
    await made.send(b'loc-1","FilterKeys":["vllm-a"]}]}\n')  # far from 512 bytes
    assert await event == Told(42, frozenset({"alloc-1", "vllm-a"}))
    await lines.aclose()


async def test_lines_that_come_together_are_told_one_by_one(server: Rig) -> None:
    made, follow_ = server
    lines = follow_("a")
    first = asyncio.create_task(told(lines))
    await made.send(HEAD + b'{}\n{"Index":7,"Events":[{"Key":"a"}]}\n{}\n{"Index":9,"Events":null}\n')
    assert [await first, *[await told(lines) for _ in range(3)]] == [
        Told(0, frozenset()),
        Told(7, frozenset({"a"})),
        Told(0, frozenset()),
        Told(9, frozenset()),
    ]
    await lines.aclose()


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        (HEAD + b"{}\nnot JSON\n", "sent what is no JSON"),
        (HEAD + b"{}\n[1]\n", "sent what is no event"),
        (HEAD + b'{"Index": "soon"}\n', "sent what is no event"),
        (HEAD + b'{"Index": 7, "Events": [1]}\n', "sent what is no event"),
        (HEAD + b'{"Index": 7, "Events": [{"Key": "a", "FilterKeys": 3}]}\n', "sent what is no event"),
        (b"HTTP/1.1 403 Forbidden\r\nContent-Length: 17\r\n\r\nPermission denied", "403 Permission denied"),
        (b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 17\r\n\r\nNo cluster leader", "500 No cluster leader"),
    ],
)
async def test_what_is_no_stream_of_events_is_refused(server: Rig, sent: bytes, words: str) -> None:
    made, follow_ = server
    lines = follow_("a")
    reading = asyncio.create_task(_drained(lines))
    await made.send(sent)
    with pytest.raises(LauncherAway, match=words):
        await reading


async def test_an_end_and_a_break_are_told_apart_from_silence(server: Rig) -> None:
    made, follow_ = server
    reading = asyncio.create_task(_drained(follow_("a")))
    await made.send(HEAD + b"{}\n")
    await made.end()
    with pytest.raises(LauncherAway, match="event stream ended"):
        await reading


async def test_a_connection_without_heartbeats_is_dead(server: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nomad_stream, "SILENCE_MAX_S", 0.2)
    made, follow_ = server
    reading = asyncio.create_task(_drained(follow_("a")))
    await made.send(HEAD + b"{}\n")
    with pytest.raises(LauncherAway, match="not even a heartbeat came"):
        await reading


async def test_a_line_without_an_end_is_not_kept_for_ever(server: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nomad_stream, "LINE_BYTES_MAX", 1 << 20)
    made, follow_ = server
    reading = asyncio.create_task(_drained(follow_("a")))
    await made.send(HEAD)
    with contextlib.suppress(ConnectionError):
        for _ in range(24):
            await made.send(b"x" * (1 << 16))
    with pytest.raises(LauncherAway, match="a line of more than 1 MiB"):
        await reading


async def test_the_double_tells_of_a_registration_as_nomad_does(tmp_path: Path) -> None:
    async with NomadDouble(tmp_path, heartbeat_s=5) as nomad:
        lines = follow(NomadAccess(nomad.address), ("vllm-a",), 0)
        assert await told(lines) == Told(0, frozenset())
        await nomad.cluster.register(sample_job("vllm-b"))
        await nomad.cluster.register(sample_job("vllm-a"))
        assert "vllm-a" in (await told(lines)).jobs
        await lines.aclose()


async def _drained(lines: AsyncGenerator[Told, None]) -> None:
    async with asyncio.timeout(5), contextlib.aclosing(lines):
        async for _ in lines:
            pass
