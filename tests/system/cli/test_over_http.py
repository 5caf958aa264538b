"""The command line as its own process, against the API on a real socket."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator

import pytest
import uvicorn

from rotator.cli import errors
from rotator.service.api import create_api
from rotator.service.events import EventBus
from rotator.service.keys import Keys
from tests.unit.api.conftest import key
from tests.unit.api.fakes import FakeOperations


class Server:
    def __init__(self, url: str, bus: EventBus, ops: FakeOperations) -> None:
        self.url, self.bus, self.ops = url, bus, ops

    async def rotator(self, *arguments: str) -> tuple[int, str, str]:
        process = await self.start(*arguments)
        async with asyncio.timeout(60):
            out, err = await process.communicate()
        assert process.returncode is not None
        return process.returncode, out.decode(), err.decode()

    async def start(self, *arguments: str) -> asyncio.subprocess.Process:
        env = {
            **os.environ,
            "ROTATOR_URL": self.url,
            "ROTATOR_KEY": "operate-secret",
            "http_proxy": "http://127.0.0.1:1",
        }
        pipe = asyncio.subprocess.PIPE
        command = (sys.executable, "-m", "rotator.cli", *arguments)
        return await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe, env=env)


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    bus, ops, keys = EventBus(), FakeOperations(), Keys([key("operate")])
    app = create_api(ops, bus, authorize=keys.authorize, guard=keys.guard, keepalive_s=0.05)
    running = uvicorn.Server(uvicorn.Config(app, "127.0.0.1", 0, log_level="warning"))
    task = asyncio.create_task(running.serve())
    async with asyncio.timeout(10):
        while not running.started:  # noqa: ASYNC110 - uvicorn has no event for it; bounded above
            await asyncio.sleep(0.01)
    port = running.servers[0].sockets[0].getsockname()[1]
    yield Server(f"http://127.0.0.1:{port}", bus, ops)
    bus.publish("service.stopping")
    running.should_exit = True
    async with asyncio.timeout(10):
        await task


async def test_a_look_and_an_act_go_over_the_wire_and_around_any_proxy(server: Server):
    code, out, _ = await server.rotator("engines", "org/small", "--json")
    assert (code, json.loads(out)["name"]) == (errors.OK, "org/small")
    code, out, err = await server.rotator("wake", "glm")
    assert (code, out, err) == (errors.OK, "glm-5.1: wake done in 2.10 s, it is awake (wake 1.90)\n", "")


async def test_a_refusal_over_the_wire_is_one_line(server: Server):
    code, out, err = await server.rotator("release", "glm")
    assert (code, out) == (errors.REFUSED, "")
    assert err == "rotator: key 'a operate' lacks scope 'admin': ask for one that has it\n"


async def test_events_arrive_while_they_happen(server: Server):
    process = await server.start("events", "--json", "--after", "0", "--count", "2")
    assert process.stdout is not None
    server.bus.publish("engine.awake", "glm-5.1")
    async with asyncio.timeout(30):
        first = json.loads(await process.stdout.readline())
        server.bus.publish("engine.asleep", "glm-5.1")
        second = json.loads(await process.stdout.readline())
        assert await process.wait() == errors.OK
    assert [first["kind"], second["kind"]] == ["engine.awake", "engine.asleep"]


async def test_following_events_ends_quietly_with_the_service(server: Server):
    process = await server.start("events", "--after", "0")
    server.bus.publish("service.stopping")
    async with asyncio.timeout(30):
        out, err = await process.communicate()
    assert (process.returncode, err) == (errors.OK, b"")
    assert b"service.stopping" in out


@pytest.mark.parametrize(
    ("head", "arguments"),
    [
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n8\r\n: open\n\n\r\n", ("events",)),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nline\n\r\n", ("logs", "a", "-f")),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 999\r\n\r\n{", ("status",)),
        (b"", ("wake", "a")),
    ],
)
async def test_a_service_that_is_killed_meanwhile_is_told_as_that(head: bytes, arguments: tuple[str, ...]):
    async def dies(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(head)
        writer.close()

    async with await asyncio.start_server(dies, "127.0.0.1", 0) as listening:
        url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        code, _, err = await Server(url, EventBus(), FakeOperations()).rotator(*arguments)
    assert code == errors.UNREACHABLE, err
    (line,) = err.splitlines()
    assert "the connection broke before the answer was whole" in line


async def test_a_service_that_is_not_there_is_told_without_a_traceback(server: Server):
    code, out, err = await server.rotator("status", "--url", "http://127.0.0.1:1")
    assert (code, out) == (errors.UNREACHABLE, "")
    assert len(err.splitlines()) == 1
    assert "cannot reach the service" in err
