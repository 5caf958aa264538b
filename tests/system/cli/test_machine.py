"""The machine as ``rotator check`` sees it, asked for real."""

import fcntl
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rotator.cli.surroundings import Machine


@pytest.fixture
def listener() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_port_in_use_is_told_with_its_process(listener: int):
    holder = Machine().port_holder("127.0.0.1", listener)
    assert holder is not None
    assert f"process {os.getpid()} (" in holder


def test_a_port_is_free_again_once_its_listener_is_gone():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert Machine().port_holder("127.0.0.1", port) is None


def test_the_service_is_who_holds_the_ledger_and_listens(tmp_path: Path, listener: int):
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    assert Machine().service_pid(url, listener) is None
    with (tmp_path / "ledger.db.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write(str(os.getpid()))
        lock.flush()
        assert Machine().service_pid(url, listener) == os.getpid()
        assert Machine().service_pid(url, listener + 1) is None
    assert Machine().service_pid("postgresql://db/rotator", listener) is None


def test_an_engine_is_known_by_the_marks_of_its_own_service(tmp_path: Path):
    listens = (
        "import socket; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True); input()"
    )
    marked = {"ROTATOR_ENGINE": "a", "ROTATOR_SERVICE": "this one"}
    with subprocess.Popen(
        [sys.executable, "-c", listens], env=marked, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as engine:
        assert engine.stdout is not None
        port = int(engine.stdout.readline())
        assert Machine().engine_on(port, tmp_path) is None
        (tmp_path / "service_id").write_text("another")
        assert Machine().engine_on(port, tmp_path) is None
        (tmp_path / "service_id").write_text("this one")
        assert Machine().engine_on(port, tmp_path) == "a"
        assert Machine().engine_of(engine.pid, tmp_path) == "a"
        assert Machine().engine_of(os.getpid(), tmp_path) is None
        engine.communicate("")


def test_an_address_that_is_not_this_machines_is_told():
    assert Machine().port_holder("192.0.2.1", 8400) is not None


def test_a_program_is_found_as_the_launcher_would_find_it(tmp_path: Path):
    tool = tmp_path / "tool"
    tool.write_text("#!/bin/sh\n")
    machine = Machine()
    assert machine.program_problem(str(tool), None, None) == "it is not executable"
    tool.chmod(0o755)
    assert machine.program_problem(str(tool), None, None) is None
    assert machine.program_problem("./tool", str(tmp_path), None) is None
    assert machine.program_problem("tool", None, str(tmp_path)) is None
    assert machine.program_problem("tool", None, "/nowhere") == "it is nowhere on PATH"
    assert machine.program_problem("/nowhere/tool", None, None) == "no such file"
    assert "is no directory" in (machine.program_problem("tool", "/nowhere", str(tmp_path)) or "")


def test_a_folder_can_be_written_if_it_is_there_or_can_be_made(tmp_path: Path):
    machine = Machine()
    assert machine.unwritable(tmp_path) is None
    assert machine.unwritable(tmp_path / "a" / "b") is None
    (tmp_path / "file").touch()
    assert machine.unwritable(tmp_path / "file") == "it is no directory"
    assert machine.unwritable(tmp_path / "file" / "b") is not None


def test_asking_whether_a_folder_can_be_written_leaves_nothing_behind(tmp_path: Path):
    Machine().unwritable(tmp_path)
    Machine().unwritable(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_a_ledger_is_judged_by_its_url_without_being_made(tmp_path: Path):
    machine = Machine()
    assert machine.ledger_problem(f"sqlite:///{tmp_path}/ledger.sqlite3") is None
    assert list(tmp_path.iterdir()) == []
    assert machine.ledger_problem("no url") is not None


def test_the_hosts_memory_is_more_than_nothing():
    memory = Machine().host_memory()
    assert 0 < memory.available_bytes <= memory.total_bytes


def test_a_path_exists_or_not(tmp_path: Path):
    assert Machine().exists(tmp_path)
    assert not Machine().exists(tmp_path / "x")
