"""Several processes on one box: bytes are shared, belong to whoever took them, and die with him."""

import json
import os
import signal
from collections.abc import Callable

import pytest

import allocator as api
from allocator import Allocator
from allocator.box import SimulatedBox, driver_path
from allocator.simdriver import SimulatedDriver

GIB = 1 << 30
Start = Callable[..., "object"]

HOLD = """
import sys
from allocator import Allocator
allocator = Allocator()
segment = allocator.alloc({nbytes}, device={device})
print("holds")
sys.stdin.readline()
allocator.close()
print("closed")
sys.stdin.readline()
"""

NVML = """
import json, pynvml
pynvml.nvmlInit()
rows = []
for i in range(pynvml.nvmlDeviceGetCount()):
    handle = pynvml.nvmlDeviceGetHandleByIndex(i)
    assert pynvml.nvmlDeviceGetIndex(pynvml.nvmlDeviceGetHandleByUUID(pynvml.nvmlDeviceGetUUID(handle))) == i
    memory, second = pynvml.nvmlDeviceGetMemoryInfo(handle), pynvml.nvmlDeviceGetMemoryInfo(handle, 0x02000028)
    assert (memory.total, memory.used, memory.free) == (second.total, second.used, second.free)
    rows.append({
        "uuid": pynvml.nvmlDeviceGetUUID(handle),
        "name": pynvml.nvmlDeviceGetName(handle),
        "capability": pynvml.nvmlDeviceGetCudaComputeCapability(handle),
        "bus": pynvml.nvmlDeviceGetPciInfo(handle).busId,
        "utilization": pynvml.nvmlDeviceGetUtilizationRates(handle).gpu,
        "total": memory.total, "used": memory.used, "free": memory.free,
        "processes": {p.pid: p.usedGpuMemory for p in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)},
    })
print(json.dumps(rows))
pynvml.nvmlShutdown()
"""


def shown(child: Start, box: SimulatedBox) -> list[dict]:  # type: ignore[type-arg]
    return json.loads(child(NVML, **box.nvml_env()).rest())  # type: ignore[attr-defined]


def test_killing_a_process_frees_its_bytes(child, box: SimulatedBox, driver: SimulatedDriver) -> None:  # type: ignore[no-untyped-def]
    holder = child(HOLD.format(nbytes=70 * GIB, device=0))
    assert holder.line() == "holds"
    assert driver.bytes_used(0) * box.scale == 70 * GIB
    holder.process.send_signal(signal.SIGKILL)
    holder.process.wait(timeout=30)
    assert driver.bytes_used(0) == 0
    with Allocator() as allocator:
        assert allocator.alloc(90 * GIB).nbytes == 90 * GIB


def test_a_killed_process_is_gone_before_anyone_reaps_it(child, box: SimulatedBox, driver: SimulatedDriver) -> None:  # type: ignore[no-untyped-def]
    holder = child(HOLD.format(nbytes=GIB, device=0))
    assert holder.line() == "holds"
    holder.process.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, holder.process.pid, os.WEXITED | os.WNOWAIT)  # dead, and still a zombie
    assert driver.bytes_used(0) == 0


def test_a_stopped_process_keeps_its_bytes_and_stops_nobody(child, box: SimulatedBox, driver: SimulatedDriver) -> None:  # type: ignore[no-untyped-def]
    holder = child(HOLD.format(nbytes=GIB, device=0))
    assert holder.line() == "holds"
    holder.process.send_signal(signal.SIGSTOP)
    with Allocator() as allocator:
        allocator.alloc(GIB)
        assert driver.bytes_used(0) * box.scale == 2 * GIB


def test_two_processes_share_one_device(child, driver: SimulatedDriver, allocator: Allocator) -> None:  # type: ignore[no-untyped-def]
    """A's wake does not fit while B is there; it says so, and succeeds with the same content when B is gone."""
    mine = allocator.alloc(60 * GIB)
    allocator.write(mine, b"content")
    allocator.sleep()
    other = child(HOLD.format(nbytes=50 * GIB, device=0))
    assert other.line() == "holds"
    assert allocator.device_memory(0).bytes_free == 46 * GIB
    with pytest.raises(api.OutOfMemory) as caught:
        allocator.wake()
    assert (caught.value.bytes_wanted, caught.value.bytes_free) == (60 * GIB, 46 * GIB)
    other.go_on()
    assert other.line() == "closed"
    allocator.wake()
    assert allocator.read(mine, 0, 7) == b"content"


def test_nvml_shows_what_the_driver_counts(child, box: SimulatedBox, allocator: Allocator) -> None:  # type: ignore[no-untyped-def]
    allocator.alloc(10 * GIB, device=1)
    other = child(HOLD.format(nbytes=5 * GIB, device=1))
    assert other.line() == "holds"
    first, second = shown(child, box)
    assert (first["used"], first["free"], first["processes"]) == (0, 96 * GIB, {})
    assert second["processes"] == {str(os.getpid()): 10 * GIB, str(other.process.pid): 5 * GIB}
    assert (second["total"], second["used"], second["free"]) == (96 * GIB, 15 * GIB, 81 * GIB)
    assert (second["uuid"], second["name"], second["capability"]) == (box.uuids[1], box.name, [12, 0])
    assert first["bus"] != second["bus"]
    allocator.sleep()
    assert shown(child, box)[1]["used"] == 5 * GIB
    allocator.wake()


def test_foreign_bytes_count_for_everyone_and_belong_to_nobody(child, box: SimulatedBox, allocator: Allocator) -> None:  # type: ignore[no-untyped-def]
    box.set_foreign_bytes(0, 3 * GIB)
    try:
        assert allocator.device_memory(0).bytes_free == 93 * GIB
        row = shown(child, box)[0]
        assert (row["used"], row["processes"]) == (3 * GIB, {})
    finally:
        box.set_foreign_bytes(0, 0)


def test_a_device_query_hangs_until_it_is_healed_and_other_devices_answer(child, box: SimulatedBox) -> None:  # type: ignore[no-untyped-def]
    program = """
import pynvml
pynvml.nvmlInit()
handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(2)]
print("other", pynvml.nvmlDeviceGetMemoryInfo(handles[1]).used)
print(pynvml.nvmlDeviceGetMemoryInfo(handles[0]).used)
"""
    with box.hanging_nvml(0):
        hung = child(program, **box.nvml_env())
        assert hung.line() == "other 0"
        assert hung.process.poll() is None
    assert hung.rest() == "0"


def test_a_device_query_fails_with_the_code_it_was_given(child, box: SimulatedBox) -> None:  # type: ignore[no-untyped-def]
    program = """
import pynvml
pynvml.nvmlInit()
try:
    pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0))
except pynvml.NVMLError as error:
    print(error.value, error)
"""
    box.fail_nvml(0)
    try:
        assert child(program, **box.nvml_env()).rest() == "15 GPU is lost"
    finally:
        box.heal_nvml(0)


def test_faults_reach_another_process_through_the_box(child, box: SimulatedBox) -> None:  # type: ignore[no-untyped-def]
    program = """
import sys
from allocator import Allocator, OutOfMemory
allocator = Allocator()
segment = allocator.alloc(1 << 30)
allocator.sleep()
print("asleep")
for _ in range(2):
    sys.stdin.readline()
    try:
        allocator.wake()
        print("awake")
    except OutOfMemory:
        print("out of memory")
"""
    engine = child(program)
    assert engine.line() == "asleep"
    box.set_faults("cuMemCreate@2=2", pid=engine.process.pid)
    engine.go_on()
    assert engine.line() == "out of memory"
    box.clear_faults(pid=engine.process.pid)
    engine.go_on()
    assert engine.line() == "awake"


def test_touching_memory_that_sleeps_faults(child) -> None:  # type: ignore[no-untyped-def]
    program = """
import ctypes
from allocator import Allocator
allocator = Allocator()
segment = allocator.alloc(1 << 30)
print(ctypes.string_at(segment.address, 1)[0])
allocator.sleep()
ctypes.string_at(segment.address, 1)
print("not reached")
"""
    engine = child(program)
    assert engine.rest() == "255"
    assert engine.process.returncode == -signal.SIGSEGV


def test_visible_devices_are_renumbered_as_cuda_does(child, box: SimulatedBox, driver: SimulatedDriver) -> None:  # type: ignore[no-untyped-def]
    for name in ("1", box.uuids[1]):
        engine = child(HOLD.format(nbytes=GIB, device=0), CUDA_VISIBLE_DEVICES=name)
        assert engine.line() == "holds"
        assert [driver.bytes_used(i) * box.scale for i in range(2)] == [0, GIB]
        engine.process.kill()
        engine.process.wait(timeout=30)


def test_a_fork_cannot_use_its_parents_driver_and_does_not_hold_its_bytes(  # type: ignore[no-untyped-def]
    child, box: SimulatedBox, driver: SimulatedDriver
) -> None:
    program = """
import os, sys
from allocator import Allocator, AllocatorError
allocator = Allocator()
allocator.alloc(1 << 30)
if os.fork() == 0:
    try:
        allocator.alloc(1 << 30)
    except AllocatorError as error:
        print(error.driver_code)
    sys.stdin.readline()
    os._exit(0)
os._exit(0)
"""
    engine = child(program)
    assert engine.line() == "3"  # not initialized; the parent is gone, the fork lives on
    engine.process.wait(timeout=30)
    assert driver.bytes_used(0) == 0


def test_a_context_takes_bytes_that_stay_while_an_engine_sleeps(child, tmp_path) -> None:  # type: ignore[no-untyped-def]
    box = SimulatedBox.create(tmp_path / "box", devices=1, context_bytes=512 << 20)
    program = """
from allocator import Allocator
allocator = Allocator()
segment = allocator.alloc(1 << 30)
allocator.sleep()
memory = allocator.device_memory()
print(memory.bytes_total - memory.bytes_free)
"""
    assert child(program, **box.env()).rest() == str(512 << 20)


def test_copies_take_the_time_of_the_link(child, tmp_path) -> None:  # type: ignore[no-untyped-def]
    box = SimulatedBox.create(tmp_path / "box", devices=1, copy_gib_s=100)
    program = """
from allocator import Allocator
allocator = Allocator(pack=False)
segment = allocator.alloc(20 << 30)
allocator.sleep()
print(allocator.wake().gib_s)
"""
    assert 20 < float(child(program, **box.env()).rest()) <= 100


def test_a_described_box_is_the_one_that_was_made(box: SimulatedBox) -> None:
    assert SimulatedBox.open(box.path) == box


def test_the_nvml_library_is_the_driver_under_nvmls_name(box: SimulatedBox) -> None:
    assert (box.path / "lib" / "libnvidia-ml.so.1").resolve() == driver_path().resolve()


@pytest.mark.parametrize("wrong", [{"devices": 0}, {"devices": 99}, {"scale": 0}, {"memory_bytes": 4096}])
def test_a_box_that_cannot_be_is_refused(tmp_path, wrong) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="a box has"):
        SimulatedBox.create(tmp_path, **wrong)


SELFTEST = """
import sys
sys.argv = ["selftest", "--cycles", "3", *{options}]
from allocator.selftest import main
sys.exit(main())
"""
FIGURES = ["copy_floor_s", "stock_like_sleep_s", "stock_like_wake_s", "first_sleep_s", "sleep_s", "wake_s"]


def test_the_self_test_passes_without_a_gpu(child) -> None:  # type: ignore[no-untyped-def]
    engine = child(SELFTEST.format(options=["--json"]), ROTATOR_CUDA_DRIVER="", ROTATOR_SIM_BOX="")
    findings = json.loads(engine.rest())
    assert engine.process.returncode == 0
    assert (findings["driver"], findings["cycles"], findings["leaked_bytes"]) == ("simulated", 3, 0)
    assert findings["content_ok"] is True
    assert findings["faults_injected"] >= 40
    assert all(findings[figure] > 0 for figure in FIGURES)
    # One GiB over a link of 50 GiB/s: nothing beats it, and a sleep of what has masters does not use it.
    assert findings["copy_floor_s"] >= 0.98 / 50
    assert findings["wake_s"] >= 0.98 / 50
    assert findings["sleep_s"] < findings["stock_like_sleep_s"]


def test_the_self_test_shows_the_machine_first(child) -> None:  # type: ignore[no-untyped-def]
    engine = child(SELFTEST.format(options=[]), ROTATOR_CUDA_DRIVER="", ROTATOR_SIM_BOX="")
    lines = [line.split()[0] for line in engine.rest().splitlines()]
    wanted = ["driver", "name", "memlock_bytes", "huge_pages", "numa_nodes", "link", "cycles", "content_ok", "wake_s"]
    assert [line for line in lines if line in wanted] == wanted


def test_the_self_test_on_a_box_that_is_full_says_so(child, tmp_path) -> None:  # type: ignore[no-untyped-def]
    box = SimulatedBox.create(tmp_path / "box", devices=1)
    box.set_foreign_bytes(0, box.memory_bytes)
    engine = child(SELFTEST.format(options=[]) + "", **box.env())
    engine.rest()
    assert engine.process.returncode == 2
