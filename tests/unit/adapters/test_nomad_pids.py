"""Whose a process is, by three signs: its control group, its environment, the engine's port."""

from pathlib import Path

import pytest

from rotator.adapters.nomad_pids import AllocationProcesses

ALLOC = "11111111-2222-3333-4444-555555555555"
OTHER = "99999999-2222-3333-4444-555555555555"
CONTAINER = "/nomad.slice/reserve.slice/docker-" + "ab" * 32 + ".scope"


class Machine:
    """A /proc as files."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def add(
        self,
        pid: int,
        *,
        ppid: int = 1,
        session: int | None = None,
        cgroup: str = "/system.slice/ssh.service",
        alloc: str = "",
        readable: bool = True,
        state: str = "S",
    ) -> None:
        entry = self.root / str(pid)
        entry.mkdir(exist_ok=True)
        session = pid if session is None else session
        after = f"{state} {ppid} {session} {session} 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 {pid}00 0 0"
        (entry / "stat").write_text(f"{pid} (a (strange) name) {after}")
        (entry / "cgroup").write_text(f"0::{cgroup}\n")
        if readable:
            (entry / "environ").write_bytes(b"A=1\0" + (f"NOMAD_ALLOC_ID={alloc}".encode() if alloc else b"") + b"\0")

    def of(self, *allocs: str, port: int | None = None, listening: tuple[int, ...] = ()) -> set[int]:
        reader = AllocationProcesses(self.root, lambda _: listening)
        return {proc.pid for proc in reader.of(allocs, port)}


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    made = Machine(tmp_path)
    made.add(1, ppid=0)
    made.add(500)
    (tmp_path / "self").mkdir()
    return made


def test_a_control_group_named_for_the_allocation_is_enough(machine: Machine):
    machine.add(10, cgroup=f"/nomad.slice/share.slice/{ALLOC}.vllm.scope", readable=False)
    assert machine.of(ALLOC) == {10}
    assert machine.of(OTHER) == set()


def test_an_environment_brings_its_whole_container(machine: Machine):
    machine.add(10, cgroup=CONTAINER, alloc=ALLOC)
    machine.add(11, cgroup=CONTAINER, readable=False)  # a rank that overwrote its environment by its title
    assert machine.of(ALLOC) == {10, 11}


def test_children_and_sessions_follow_without_a_container(machine: Machine):
    machine.add(10, alloc=ALLOC)
    machine.add(11, ppid=10, readable=False)
    machine.add(12, ppid=1, session=10, readable=False)
    assert machine.of(ALLOC) == {10, 11, 12}


def test_strangers_in_a_shared_slice_are_not_taken_in(machine: Machine):
    machine.add(10, cgroup="/user.slice", alloc=ALLOC)
    machine.add(11, cgroup="/user.slice")
    assert machine.of(ALLOC) == {10}


def test_a_process_of_another_allocation_stays_anothers_whoever_started_it(machine: Machine):
    machine.add(10, alloc=ALLOC)
    machine.add(11, ppid=10, alloc=OTHER)
    assert machine.of(ALLOC) == {10}


def test_the_port_tells_where_nothing_else_may_be_read(machine: Machine):
    machine.add(10, cgroup=CONTAINER, readable=False)
    machine.add(11, cgroup=CONTAINER, readable=False)
    assert machine.of(ALLOC) == set()
    assert machine.of(ALLOC, port=8001, listening=(10,)) == {10, 11}


def test_a_port_that_another_allocation_holds_is_no_sign(machine: Machine):
    machine.add(10, alloc=OTHER)
    assert machine.of(ALLOC, port=8001, listening=(10,)) == set()


def test_zombies_hold_nothing(machine: Machine):
    machine.add(10, alloc=ALLOC, state="Z")
    assert machine.of(ALLOC) == set()


def test_no_allocation_has_no_processes(machine: Machine):
    machine.add(10, alloc="")
    assert machine.of() == set()


def test_what_ends_is_forgotten_and_what_comes_is_seen(machine: Machine):
    reader = AllocationProcesses(machine.root, lambda _: ())
    machine.add(10, alloc=ALLOC)
    assert [p.pid for p in reader.of([ALLOC])] == [10]
    for file in (machine.root / "10").iterdir():
        file.unlink()
    (machine.root / "10").rmdir()
    machine.add(11, alloc=ALLOC)
    assert [p.pid for p in reader.of([ALLOC])] == [11]
