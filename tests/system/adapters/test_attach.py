"""Attached engines: real listeners in real processes."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rotator.adapters import attach
from rotator.adapters.attach import AttachLauncher
from rotator.adapters.loopback import Answer, free_loopback_port, port_in_use, try_connect
from rotator.ports import Handle, LaunchError, LaunchSpec

# Listens, and has a worker in a session of its own.
ENGINE = (
    "import socket, subprocess, sys, signal\n"
    "s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)\n"
    "s.bind(('127.0.0.1', int(sys.argv[1]))); s.listen(64)\n"
    "w = subprocess.Popen([sys.executable, '-c', 'import sys; sys.stdin.read()'], stdin=subprocess.PIPE,\n"
    "                     start_new_session=True)\n"
    "print(w.pid, flush=True)\n"
    "signal.pause()"
)


class Running:
    def __init__(self, port: int) -> None:
        self.port = port
        self.process = subprocess.Popen([sys.executable, "-c", ENGINE, str(port)], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.worker = int(self.process.stdout.readline())
        self.spec = spec(port)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()


def spec(port: int, host: str = "127.0.0.1") -> LaunchSpec:
    return LaunchSpec("dsv4-flash", "attach", (), {}, f"http://{host}:{port}", "")


@pytest.fixture
def running() -> Iterator[Running]:
    started = Running(free_loopback_port())
    yield started
    started.end()


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A listener whose backlog is full: connections to it are neither taken nor refused."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port = listener.getsockname()[1]
        waiting = [socket.socket() for _ in range(4)]
        for client in waiting:
            client.setblocking(False)
            client.connect_ex(("127.0.0.1", port))
        yield port
        for client in waiting:
            client.close()


async def test_an_attached_engine_is_found_where_it_runs(running: Running):
    launcher = AttachLauncher()
    handle = await launcher.find(running.spec, None)
    assert handle == Handle("dsv4-flash", "attach", running.spec.url, {"host": "127.0.0.1", "port": running.port})
    assert await launcher.is_alive(handle)


async def test_one_that_does_not_run_is_not_found():
    assert await AttachLauncher().find(spec(free_loopback_port()), None) is None


async def test_starting_and_stopping_are_refused_with_what_to_do(running: Running):
    launcher = AttachLauncher()
    with pytest.raises(LaunchError, match=r"is attached .*: start it where it runs"):
        await launcher.start(running.spec)
    handle = await launcher.find(running.spec, None)
    assert handle is not None
    with pytest.raises(LaunchError, match=r"is attached .*: stop it where it runs"):
        await launcher.stop(handle, grace_s=0)
    assert running.process.poll() is None


async def test_its_processes_are_the_listener_and_all_it_started(running: Running):
    launcher = AttachLauncher()
    handle = await launcher.find(running.spec, None)
    assert handle is not None
    for _ in range(2):
        assert await launcher.pids(handle) == {running.process.pid, running.worker}


async def test_its_processes_are_those_of_its_next_life_after_a_restart(running: Running):
    launcher = AttachLauncher()
    handle = await launcher.find(running.spec, None)
    assert handle is not None
    first = await launcher.pids(handle)
    running.end()
    again = Running(running.port)
    try:
        assert await launcher.pids(handle) == {again.process.pid, again.worker}
        assert first.isdisjoint({again.process.pid, again.worker})
    finally:
        again.end()


async def test_processes_on_another_machine_are_unknown():
    handle = Handle("dsv4-flash", "attach", "http://192.0.2.1:8000", {})
    assert await AttachLauncher().pids(handle) == frozenset()


async def test_its_exit_is_seen_after_three_refusals(running: Running, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attach, "WATCH_EVERY_S", 0.02)
    launcher = AttachLauncher()
    handle = await launcher.find(running.spec, None)
    assert handle is not None
    waiting = asyncio.create_task(launcher.wait_exit(handle))
    await asyncio.wait([waiting], timeout=0.2)
    assert not waiting.done()
    running.end()
    async with asyncio.timeout(10):
        assert "refused 3 connections in a row" in await waiting
    assert not await launcher.is_alive(handle)


async def test_a_stopped_engine_is_not_gone(running: Running, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attach, "WATCH_EVERY_S", 0.01)
    launcher = AttachLauncher()
    handle = await launcher.find(running.spec, None)
    assert handle is not None
    os.kill(running.process.pid, signal.SIGSTOP)
    waiting = asyncio.create_task(launcher.wait_exit(handle))
    await asyncio.wait([waiting], timeout=0.3)
    assert not waiting.done()
    waiting.cancel()
    assert await launcher.is_alive(handle)


async def test_a_connection_that_is_not_answered_is_no_refusal(silent_port: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attach, "CONNECT_DEADLINE_S", 0.1)
    monkeypatch.setattr(attach, "WATCH_EVERY_S", 0.01)
    assert await try_connect("127.0.0.1", silent_port, deadline_s=0.1) is Answer.SILENT
    launcher = AttachLauncher()
    assert await launcher.find(spec(silent_port), None) is None
    handle = Handle("dsv4-flash", "attach", f"http://127.0.0.1:{silent_port}", {})
    assert await launcher.is_alive(handle)
    waiting = asyncio.create_task(launcher.wait_exit(handle))
    await asyncio.wait([waiting], timeout=0.6)
    assert not waiting.done()
    waiting.cancel()


async def test_a_name_with_several_addresses_that_all_refuse_is_a_refusal():
    assert await try_connect("localhost", free_loopback_port(), deadline_s=5) is Answer.REFUSED


@pytest.mark.parametrize("url", ["http://", "http://host:99999", "nonsense"])
async def test_a_url_that_is_none_is_told(url: str):
    with pytest.raises(LaunchError, match="is no URL of an engine: give http://host:port"):
        await AttachLauncher().find(LaunchSpec("dsv4-flash", "attach", (), {}, url, ""), None)


def test_a_port_in_use_names_its_holder(running: Running):
    holder = port_in_use(running.port)
    assert holder is not None
    assert holder.pid == running.process.pid
    assert str(holder) == f"{holder.name} (pid {holder.pid})"
    assert Path(f"/proc/{holder.pid}/comm").read_text().strip() in str(holder.name)


def test_a_port_that_lingers_after_its_server_left_is_free():
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        client = socket.create_connection(("127.0.0.1", port))
        accepted, _ = server.accept()
        accepted.close()  # the side that closes first lingers
        client.close()
    assert port_in_use(port) is None


def test_free_ports_are_free_and_none_of_those_to_avoid():
    given: set[int] = set()
    for _ in range(50):
        port = free_loopback_port(given)
        assert port not in given
        assert port_in_use(port) is None
        given.add(port)


def test_a_port_kept_for_an_engine_is_none_that_outgoing_connections_get():
    first_outgoing = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert first_outgoing <= 20_000 or all(free_loopback_port() < first_outgoing for _ in range(20))
