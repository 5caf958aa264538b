"""Where masters go: host memory within its bounds, the disk beyond them, and no host memory where there is but one."""

from collections.abc import Callable
from pathlib import Path

import pytest

import allocator as api
from allocator import Allocator
from allocator.box import SimulatedBox
from allocator.simdriver import SimulatedDriver
from tests.system.allocator.engine import MIB, Engine

GIB = 1 << 30
Pattern = Callable[[int, int], bytes]


def test_masters_beyond_the_budget_go_to_disk_and_come_back(
    driver: SimulatedDriver, tmp_path: Path, pattern: Pattern
) -> None:
    with Allocator(host_budget_bytes=GIB, spill_dir=tmp_path) as allocator:
        segments = [allocator.alloc(GIB) for _ in range(3)]
        for turn in range(3):
            for i, segment in enumerate(segments):
                allocator.write(segment, pattern(i + 3 * turn, segment.content_nbytes))
            report = allocator.sleep()
            assert report.bytes_copied == 3 * GIB
            host = allocator.host_memory()
            assert host.bytes_registered <= GIB
            assert report.bytes_spilled == 3 * GIB - host.bytes_used
            assert host.bytes_spilled >= 2 * GIB
            assert allocator.wake().bytes_spilled >= 2 * GIB
            for i, segment in enumerate(segments):
                assert allocator.read(segment) == pattern(i + 3 * turn, segment.content_nbytes)
        assert allocator.sleep().bytes_copied == 0  # unchanged, on disk as in memory
        allocator.wake()
    assert list(tmp_path.iterdir()) == []


def test_a_master_that_the_disk_lost_is_told_and_the_tag_stays_asleep(driver: SimulatedDriver, tmp_path: Path) -> None:
    with Allocator(host_budget_bytes=0, spill_dir=tmp_path) as allocator:
        segment = allocator.alloc(GIB)
        allocator.write(segment, b"content" * 100)
        allocator.sleep()
        for path in _open_files_in(tmp_path):
            with path.open("r+b") as file:  # anew: the allocator's own descriptor takes only aligned writes
                file.write(b"\x00" * 512)
        before = driver.bytes_used(own=True)
        with pytest.raises(api.MasterLost, match="does not read back"):
            allocator.wake()
        assert allocator.asleep_tags() == set(api.TAGS)
        assert driver.bytes_used(own=True) == before


def _open_files_in(folder: Path) -> list[Path]:
    """By this process's descriptors: a spill file may have no name."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            if str(folder) in str(entry.readlink()):
                found.append(entry)
        except OSError:
            continue
    return found


@pytest.mark.parametrize("answer", [2, 999])
def test_a_wake_from_disk_survives_the_failure_of_any_of_its_calls(
    driver: SimulatedDriver, tmp_path: Path, answer: int
) -> None:
    with Allocator(host_budget_bytes=128 * MIB, spill_dir=tmp_path, slab_bytes=64 * MIB) as allocator:
        engine = Engine(allocator, driver, unit_bytes=32 * MIB)
        allocator.sleep()
        calls = engine.calls_of(allocator.wake)
        awake = engine.held_bytes()
        for n, call in enumerate(calls, start=1):
            allocator.sleep()
            asleep = engine.held_bytes()
            try:
                with driver.faults(f"*@{n}={answer}"):
                    allocator.wake()
            except (api.DriverError, api.OutOfMemory, api.HostMemoryExhausted):
                assert engine.held_bytes() == asleep, f"call {n}, {call}"
                allocator.wake()
            assert engine.intact(), f"call {n}, {call}"
            assert engine.held_bytes() == awake, f"call {n}, {call}"


def test_masters_of_awake_tags_make_room_for_those_that_go_to_sleep(driver: SimulatedDriver) -> None:
    with Allocator(host_budget_bytes=2 * GIB) as allocator:
        runtime, weights = allocator.alloc(GIB, tag="runtime"), allocator.alloc(2 * GIB)
        for segment in (runtime, weights):
            allocator.write(segment, b"content")
        allocator.prepare(["runtime"])
        allocator.sleep(tags=["weights"])  # needs all of the budget
        assert allocator.host_memory().bytes_registered <= 2 * GIB
        allocator.wake()
        assert allocator.read(runtime, 0, 7) == allocator.read(weights, 0, 7) == b"content"


def test_a_budget_can_be_tightened_and_masters_that_sleep_need_stay(driver: SimulatedDriver) -> None:
    with Allocator() as allocator:
        segment = allocator.alloc(2 * GIB)
        allocator.write(segment, b"content")
        allocator.sleep()
        allocator.set_host_budget(GIB)
        assert allocator.host_memory().bytes_budget == GIB
        allocator.wake()
        assert allocator.read(segment, 0, 7) == b"content"
        allocator.release_masters()
        with pytest.raises(api.HostMemoryExhausted):
            allocator.sleep()


SHARES = """
import sys
from allocator import Allocator, HostMemoryExhausted
allocator = Allocator(pack=False, budget_file=sys.argv[1])
segment = allocator.alloc(3 << 30)
allocator.write(segment, b"content")
for line in sys.stdin:
    try:
        getattr(allocator, line.strip())()
        print("ok", allocator.host_memory().bytes_registered >> 30)
    except HostMemoryExhausted:
        print("exhausted")
"""


def test_processes_share_one_budget_and_awake_engines_give_way(child, box: SimulatedBox, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    budget = tmp_path / "budget"
    budget.write_text(f"rotator-host-budget 1 {(4 * GIB) // box.scale}\n")
    program = SHARES.replace("sys.argv[1]", repr(str(budget)))
    first, second = child(program), child(program)

    def tell(engine, what: str) -> str:  # type: ignore[no-untyped-def]
        engine.process.stdin.write(what + "\n")
        engine.process.stdin.flush()
        return str(engine.line())

    assert tell(first, "prepare") == "ok 3"  # awake: its masters can be taken again
    assert tell(second, "sleep") == "ok 3"
    assert tell(first, "sleep") == "exhausted"  # nobody can give way
    assert tell(second, "wake") == "ok 3"
    assert tell(first, "sleep") == "ok 3"
    second.process.kill()
    second.process.wait(timeout=30)
    assert tell(first, "wake") == "ok 3"


def test_a_killed_process_gives_its_part_of_the_budget_back(child, box: SimulatedBox, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    budget = tmp_path / "budget"
    budget.write_text(f"rotator-host-budget 1 {(4 * GIB) // box.scale}\n")
    program = SHARES.replace("sys.argv[1]", repr(str(budget)))
    first = child(program)
    first.process.stdin.write("sleep\n")
    first.process.stdin.flush()
    assert first.line() == "ok 3"
    first.process.kill()
    first.process.wait(timeout=30)
    second = child(program)
    second.process.stdin.write("sleep\n")
    second.process.stdin.flush()
    assert second.line() == "ok 3"


UNIFIED = """
import sys
from allocator import Allocator, HostMemoryExhausted
from allocator.simdriver import SimulatedDriver
driver = SimulatedDriver()
allocator = Allocator(spill_dir={spill!r})
weights, cache = allocator.alloc(40 << 30), allocator.alloc(40 << 30, tag="kv_cache")
allocator.write(weights, b"content")
try:
    for _ in range(2):
        report = allocator.sleep()
        used, free = allocator.host_memory().bytes_used, allocator.device_memory().bytes_free
        print(report.bytes_spilled >> 30, used >> 30, free >> 30)
        allocator.wake()
    print(allocator.read(weights, 0, 7).decode(), allocator.device_memory().bytes_free >> 30)
except HostMemoryExhausted as error:
    print(error)
"""


def test_on_unified_memory_masters_go_to_disk_and_a_sleep_frees_what_it_says(child, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Catalogue 17: masters in host memory would be the same RAM once more, and a wake could kill the host."""
    box = SimulatedBox.create(tmp_path / "box", devices=1, copy_gib_s=0, integrated=True)
    (tmp_path / "spill").mkdir()
    lines = child(UNIFIED.format(spill=str(tmp_path / "spill")), **box.env()).rest().splitlines()
    assert lines == ["40 0 96", "0 0 96", "content 16"]


def test_on_unified_memory_level_1_without_a_disk_says_what_to_do(child, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    box = SimulatedBox.create(tmp_path / "box", devices=1, copy_gib_s=0, integrated=True)
    assert "spill directory" in child(UNIFIED.format(spill=None), **box.env()).rest()
