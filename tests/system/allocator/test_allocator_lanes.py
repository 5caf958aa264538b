"""Copies of a wake right behind a sleep: by kernels while the copy engine clears what was given back, and by both."""

from pathlib import Path

from allocator.box import SimulatedBox

AWAKE = """
from allocator import Allocator, DriverError
from allocator.simdriver import SimulatedDriver
allocator, driver = Allocator(pack=False), SimulatedDriver()
segments = [allocator.alloc(1 << 30) for _ in range(8)]
def intact():
    return all(allocator.read(s) == bytes([i + 1]) * s.content_nbytes for i, s in enumerate(segments))
for i, segment in enumerate(segments):
    allocator.write(segment, bytes([i + 1]) * segment.content_nbytes)
cache = allocator.alloc(8 << 30, tag="kv_cache")
allocator.prepare()
"""
BEHIND_A_SLEEP = (
    AWAKE
    + """
seconds = []
for _ in range(2):
    allocator.sleep()
    driver.clear_log()
    seconds.append(allocator.wake().seconds)
    assert intact()
print(min(seconds), driver.log().count("cuLaunchKernel"), driver.log().count("cuMemcpyHtoDAsync"))
"""
)
FAILING = (
    AWAKE
    + """
awake = driver.bytes_used(0, own=True)
for call in ("cuEventCreate@1", "cuEventRecord@5", "cuEventQuery@3", "cuLaunchKernel@4", "cuStreamSynchronize@1"):
    allocator.sleep()
    asleep = (driver.bytes_used(0, own=True), allocator.asleep_tags())
    with driver.faults(f"{call}=999"):
        try:
            allocator.wake()
            print(call, "was survived")
        except DriverError as error:
            assert error.call in call, error
    assert (driver.bytes_used(0, own=True), allocator.asleep_tags()) == asleep, call
    allocator.wake()
    assert intact() and driver.bytes_used(0, own=True) == awake, call
print("done")
"""
)


def test_a_wake_right_behind_a_sleep_does_not_wait_for_the_engine_that_clears_memory(child, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """16 GiB at 20 GiB/s keep the copy engine busy for 0.8 s; 8 GiB of weights take 0.16 s over the link, and as long
    again where the engine takes turns. The second run's driver has no such kernel."""
    box = SimulatedBox.create(tmp_path / "box", devices=1, copy_gib_s=50, clear_gib_s=20, scale=1024)
    seconds, launched, _ = child(BEHIND_A_SLEEP, **box.env()).rest().split()
    without, none, _ = child(BEHIND_A_SLEEP, **box.env(), ROTATOR_SIM_FAULTS="cuModuleGetFunction@2=500").rest().split()
    assert (int(launched) > 0, int(none)) == (True, 0)
    assert float(seconds) < float(without)


def test_an_engine_that_has_cleared_all_takes_over_from_the_kernels(child, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """16 GiB at 160 GiB/s: free after 0.1 s, while 8 GiB, 64 parts, take 0.8 s over this link."""
    box = SimulatedBox.create(tmp_path / "box", devices=1, copy_gib_s=10, clear_gib_s=160, scale=1024)
    seconds, by_kernel, by_engine = child(BEHIND_A_SLEEP, **box.env()).rest().split()
    assert float(seconds) > 0.75  # two lanes, one wire
    assert 0 < int(by_kernel) < 48
    assert int(by_engine) > 16


def test_a_wake_in_two_lanes_that_fails_leaves_all_as_it_was_and_can_be_retried(child, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    box = SimulatedBox.create(tmp_path / "box", devices=1, copy_gib_s=50, clear_gib_s=20, scale=1024)
    assert child(FAILING, **box.env()).rest() == "done"
