"""What is put into the sleep allocator, over a fake driver: any call may fail, at any time."""

import contextlib
import ctypes
import random
from types import SimpleNamespace
from typing import Any

import pytest

from overlays.build import View, apply_all
from overlays.patches import driver_state, transactional_wake
from overlays.patches._cumem import GRANULARITY, DriverError, Rig
from overlays.payload.block_states import BlockStates
from overlays.sources import Memory
from tests.overlay_sleep_files import CUMEM, NEW, stock

CALLS = ("create", "map", "set_access", "copy_in", "copy_out", "unmap", "release", "pin")


@pytest.fixture(scope="module")
def patched() -> Any:
    build = Memory(stock(NEW), "0.33.0")
    files = apply_all(build, [transactional_wake.PATCH, driver_state.PATCH]).files
    return lambda: Rig(View(build, files, {"cumem": CUMEM}))


@pytest.mark.parametrize("seed", range(30))
def test_whatever_fails_no_byte_is_lost_and_no_memory_leaks(patched: Any, seed: int) -> None:
    dice = random.Random(seed)
    machine = patched()
    blocks = {machine.allocate("weights", fill=fill): fill for fill in range(1, 6)}
    for _ in range(12):
        machine.driver.fail = {dice.choice(CALLS): dice.randrange(12)} if dice.random() < 0.7 else {}
        if dice.random() < 0.2:
            machine.driver.error = "out of memory"
        step = dice.choice((lambda: machine.allocator.sleep(("weights",)), machine.allocator.wake_up))
        with contextlib.suppress(DriverError):
            step()
        if blocks and dice.random() < 0.15:
            block = dice.choice(sorted(blocks))
            machine.driver.fail = {}
            machine.driver.error = ""
            machine.free(block)
            del blocks[block]
    machine.driver.fail = {}
    machine.allocator.sleep(("weights",))
    assert machine.driver.physical_bytes() == 0
    machine.allocator.wake_up()
    assert {block: machine.content(block) for block in blocks} == blocks
    assert machine.driver.physical_bytes() == len(blocks) * GRANULARITY


def test_a_free_while_asleep_takes_one_small_piece_of_memory(patched: Any) -> None:
    machine = patched()
    block = machine.allocate("weights", size=8 * GRANULARITY)
    machine.allocator.sleep(("weights",))
    held: list[int] = []
    unmap = machine.driver.unmap
    machine.driver.unmap = lambda *args: (held.append(machine.driver.physical_bytes()), unmap(*args))[1]
    machine.free(block)
    assert held == [GRANULARITY]
    assert machine.driver.physical_bytes() == 0
    assert not machine.driver.error


def test_a_free_while_asleep_that_runs_out_half_way_leaves_nothing(patched: Any) -> None:
    machine = patched()
    block = machine.allocate("weights", size=8 * GRANULARITY)
    machine.allocator.sleep(("weights",))
    machine.driver.lasting = {"map": 3}
    machine.free(block)
    assert machine.driver.physical_bytes() == 0


def test_a_free_of_what_is_unknown_answers_all_the_same(patched: Any) -> None:
    machine = patched()
    assert machine.allocator.python_free_callback(0x1234) == (0, 0, 0x1234, 0)


def test_a_full_device_lets_a_sleeping_block_be_freed(patched: Any) -> None:
    machine = patched()
    kept, block = machine.allocate("weights", fill=7), machine.allocate("weights")
    machine.allocator.sleep(("weights",))
    machine.driver.lasting = {"create": 0}
    machine.free(block)
    machine.driver.lasting = {}
    machine.allocator.wake_up()
    assert machine.content(kept) == 7


def states(frugal: bool, fail_at: int) -> tuple[BlockStates, dict[int, Any]]:
    """Three sleeping blocks with masters; the copy number `fail_at` fails."""
    cells = [ctypes.c_ulonglong(0) for _ in range(3)]
    records: dict[int, Any] = {
        address: SimpleNamespace(
            handle=(0, GRANULARITY, address, ctypes.addressof(cell)),
            tag="weights",
            is_asleep=True,
            overlay_mapped=False,
            cpu_backup_tensor=SimpleNamespace(data_ptr=lambda: 1, numel=lambda: 1, element_size=lambda: 1, cell=cell),
        )
        for address, cell in enumerate(cells)
    }
    copies: list[int] = []

    def copy(to: int, source: int, size: int) -> None:
        copies.append(to)
        if len(copies) == fail_at:
            raise RuntimeError("copy failed")

    log = SimpleNamespace(error=lambda *args: None, warning=lambda *args: None)
    made = BlockStates(lambda h: None, lambda h: None, copy, lambda device: None, lambda device: frugal, log)
    return made, records


def test_masters_are_kept_until_the_whole_wake_is_done() -> None:
    blocks, records = states(frugal=False, fail_at=3)
    with pytest.raises(RuntimeError):
        blocks.wake(records, lambda data: True, lambda address, data: None)
    assert [blocks.asleep(data) for data in records.values()] == [True, True, True]
    assert all(data.cpu_backup_tensor is not None for data in records.values())
    assert not any(blocks.mapped(data) for data in records.values())


def test_on_unified_memory_each_master_goes_as_its_block_comes() -> None:
    blocks, records = states(frugal=True, fail_at=3)
    with pytest.raises(RuntimeError):
        blocks.wake(records, lambda data: True, lambda address, data: None)
    assert [blocks.asleep(data) for data in records.values()] == [False, False, True]
    assert [data.cpu_backup_tensor is None for data in records.values()] == [True, True, False]
    blocks.wake(records, lambda data: True, lambda address, data: None)
    assert not any(blocks.asleep(data) for data in records.values())
