"""Masters taken while the engine serves: never torn, never in anybody's way, and worth nothing once content changed."""

from collections.abc import Callable

import pytest

import allocator as api
from allocator import Allocator
from allocator.box import SimulatedBox
from allocator.simdriver import SimulatedDriver
from tests.system.allocator.engine import MIB, Engine, until

GIB = 1 << 30
CHUNK = 32 * MIB


@pytest.fixture
def engine(allocator: Allocator, driver: SimulatedDriver) -> Engine:
    return Engine(allocator, driver)


def test_after_a_prepare_in_the_background_the_first_sleep_copies_nothing(engine: Engine) -> None:
    assert engine.prepare_in_background() is None
    status = engine.allocator.prepare_status()
    assert status.bytes_done == status.bytes_total == sum(segment.nbytes for segment in engine.kept)
    assert (engine.allocator.sleep().bytes_copied, engine.allocator.asleep_tags()) == (0, set(api.TAGS))
    engine.allocator.wake()
    assert engine.intact()


def test_it_holds_no_device_memory_when_it_is_done(engine: Engine) -> None:
    before = engine.device_bytes()
    engine.prepare_in_background()
    assert engine.device_bytes() == before
    assert {row.tag for row in engine.allocator.memory_usage()} <= set(api.TAGS)


@pytest.mark.parametrize("last", [0, 7, 255])
@pytest.mark.parametrize("seed", range(3))
def test_a_kernel_that_writes_meanwhile_tears_no_master(
    allocator: Allocator, driver: SimulatedDriver, last: int, seed: int
) -> None:
    """Each look at the memory finds other bytes, half of the time those that stand there in the end. A digest and a
    copy that each looked for themselves would agree with what is there then, and the copy would be another."""
    segment = allocator.alloc(GIB + seed * 16 * MIB)
    with driver.context(), driver.stream() as stream:
        driver.write_for(stream, segment.address, segment.content_nbytes, last, 60)
        allocator.prepare(wait=False)
        until(lambda: not allocator.prepare_status().running)
        allocator.sleep()  # waits for the kernel
    allocator.wake()
    assert allocator.read(segment) == bytes([last]) * segment.content_nbytes


def test_a_sleep_in_the_middle_takes_what_is_missing(engine: Engine) -> None:
    for turn in range(20):
        engine.load(turn)
        engine.allocator.prepare(wait=False)
        engine.allocator.sleep()
        engine.allocator.wake()
        assert engine.intact(), f"turn {turn}"


def test_it_goes_on_after_the_wake_where_a_sleep_stopped_it(engine: Engine) -> None:
    engine.allocator.prepare(wait=False)
    engine.allocator.sleep(tags=["kv_cache"])
    engine.allocator.wake()
    until(lambda: not engine.allocator.prepare_status().running)
    assert engine.allocator.prepare_status().error is None
    assert engine.allocator.sleep().bytes_copied == 0
    engine.allocator.wake()
    assert engine.intact()


def test_content_that_changed_since_is_copied_again_and_alone(allocator: Allocator) -> None:
    segment = allocator.alloc(GIB)
    allocator.prepare(wait=False)
    until(lambda: not allocator.prepare_status().running)
    allocator.write(segment, b"new", offset=segment.content_nbytes // 2)
    assert allocator.sleep().bytes_copied == CHUNK
    allocator.wake()
    assert allocator.read(segment, segment.content_nbytes // 2, 3) == b"new"


def test_what_is_allocated_and_freed_meanwhile_is_neither_lost_nor_leaked(engine: Engine) -> None:
    allocator = engine.allocator
    for turn in range(30):
        allocator.prepare(wait=False)
        passing = [allocator.alloc(96 * MIB) for _ in range(3)]
        for segment in passing:
            allocator.write(segment, bytes([turn]) * segment.content_nbytes)
        for segment in passing:
            allocator.free(segment)
    until(lambda: not allocator.prepare_status().running)
    held = sum(row.bytes_masters for row in allocator.memory_usage())
    assert held == allocator.host_memory().bytes_used
    assert held <= 1.01 * sum(segment.nbytes for segment in engine.kept)
    assert engine.intact()


def test_an_address_that_was_freed_and_allocated_anew_does_not_get_the_old_master(allocator: Allocator) -> None:
    """The copy of the old segment may be under way when the new one stands at its address."""
    for turn in range(40):
        old = allocator.alloc(192 * MIB)
        allocator.write(old, b"\x01" * old.content_nbytes)
        allocator.prepare(wait=False)
        allocator.free(old)
        new = allocator.alloc(192 * MIB)
        assert new.address == old.address
        allocator.write(new, bytes([turn + 2]) * new.content_nbytes)
        until(lambda: not allocator.prepare_status().running)
        allocator.sleep()
        allocator.wake()
        assert allocator.read(new) == bytes([turn + 2]) * new.content_nbytes
        allocator.free(new)


def test_a_second_start_begins_again_and_forgets_the_error(engine: Engine) -> None:
    with engine.driver.faults("cuMemcpyDtoDAsync=999"):
        assert "cuMemcpyDtoDAsync" in (engine.prepare_in_background() or "")
    assert engine.intact()
    assert engine.prepare_in_background() is None
    assert engine.allocator.sleep().bytes_copied == 0
    engine.allocator.wake()


def test_a_budget_that_is_too_small_is_told_and_nothing_is_lost(driver: SimulatedDriver) -> None:
    with Allocator(host_budget_bytes=128 * MIB, slab_bytes=64 * MIB, link_share=1.0) as allocator:
        engine = Engine(allocator, driver)
        assert "budget" in (engine.prepare_in_background() or "")
        assert engine.intact()
        assert allocator.host_memory().bytes_registered <= 128 * MIB
        with pytest.raises(api.HostMemoryExhausted):
            allocator.sleep()
        assert engine.intact()


@pytest.mark.parametrize("bracketed", [True, False])
def test_it_spoils_no_graph_capture(engine: Engine, bracketed: bool) -> None:
    """With brackets it rests; without them its calls are of the kind that a capture does not mind."""
    allocator, driver = engine.allocator, engine.driver
    with driver.context(), driver.stream() as stream:
        for _ in range(10):
            allocator.prepare(wait=False)
            if bracketed:
                allocator.capture_begin()
            driver.begin_capture(stream)
            driver.launch(stream, next(iter(engine.kept)).address, 16, 1)
            assert driver.end_capture(stream) == 0
            if bracketed:
                allocator.capture_end()
    until(lambda: not allocator.prepare_status().running)
    assert allocator.prepare_status().error is None
    assert engine.intact()


def test_an_allocator_can_be_closed_in_the_middle(driver: SimulatedDriver) -> None:
    for _ in range(10):
        with Allocator(slab_bytes=64 * MIB) as allocator:
            engine = Engine(allocator, driver)
            allocator.prepare(wait=False)
        assert engine.held_bytes() == [0, 0, 0]


def test_several_threads_start_sleep_and_look_at_once(engine: Engine) -> None:
    import threading

    allocator, done, failures = engine.allocator, threading.Event(), []

    def repeat(action: Callable[[], object]) -> None:
        try:
            while not done.is_set():
                action()
        except Exception as error:
            failures.append(error)

    actions = [lambda: allocator.prepare(wait=False), allocator.prepare_status, allocator.memory_usage]
    threads = [threading.Thread(target=repeat, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    for _ in range(60):
        allocator.sleep()
        allocator.wake()
        assert engine.intact()
    done.set()
    for thread in threads:
        thread.join(timeout=30)
    assert failures == []


SLOW_DEVICE = """
from allocator import Allocator
from allocator.simdriver import SimulatedDriver
from tests.system.allocator.engine import until
driver = SimulatedDriver()
for call in ("cuMemsetD8Async", "cuLaunchKernel", "cuMemcpyDtoHAsync"):
    with driver.context(), Allocator(chunk_bytes=512 << 20, link_share=1.0) as allocator:
        segment = allocator.alloc(1 << 30)
        allocator.write(segment, b"content")
        with driver.faults(call + "=999"):
            allocator.prepare(wait=False)
            until(lambda: not allocator.prepare_status().running)
        assert call in (allocator.prepare_status().error or "")
        print(call, driver.synchronize(), allocator.read(segment, 0, 7).decode())
"""


def test_staging_does_not_go_under_a_copy_that_still_runs(child, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Half a GiB takes 50 ms into staging: what fails behind it must wait before it gives staging back."""
    box = SimulatedBox.create(tmp_path / "box", devices=1, copy_gib_s=0, device_gib_s=10)
    lines = child(SLOW_DEVICE, **box.env()).rest().splitlines()
    assert [line.split()[1:] for line in lines] == [["0", "content"]] * 3


SLOW_SLEEP = """
from allocator import Allocator, DriverError
from allocator.simdriver import SimulatedDriver
driver, allocator = SimulatedDriver(), Allocator(chunk_bytes=64 << 20)
with driver.context():
    first, second = allocator.alloc(1 << 30), allocator.alloc(1 << 30)
    for i, segment in enumerate((first, second)):
        allocator.write(segment, bytes([i + 1]) * segment.content_nbytes)
    # The second call of the sleep that copies out: the first brings the digests.
    for call in ("cuMemcpyDtoHAsync@3=999", "cuStreamSynchronize@2=999", "cuStreamSynchronize@3=999"):
        allocator.release_masters()
        try:
            with driver.faults(call):
                allocator.sleep()
        except DriverError:
            pass
        if allocator.asleep_tags():
            allocator.wake()
        print(driver.synchronize(), allocator.read(first, 0, 1)[0], allocator.read(second, 0, 1)[0])
"""


def test_a_sleep_that_fails_does_not_give_host_memory_back_under_a_copy(child, tmp_path) -> None:  # type: ignore[no-untyped-def]
    box = SimulatedBox.create(tmp_path / "box", devices=1, copy_gib_s=20)
    assert child(SLOW_SLEEP, **box.env()).rest().splitlines() == ["0 1 2"] * 3


SLOW_LINK = """
import json, time
from allocator import Allocator
from allocator.simdriver import SimulatedDriver
from tests.system.allocator.engine import until
driver, seconds = SimulatedDriver(), {}
for share in (1.0, 0.25):
    with Allocator(link_share=share) as allocator:
        segment = allocator.alloc(4 << 30)
        allocator.write(segment, b"content")
        started = time.perf_counter()
        allocator.prepare(wait=False)
        called = time.perf_counter() - started
        until(lambda: not allocator.prepare_status().running)
        seconds[share] = time.perf_counter() - started
        assert allocator.sleep().bytes_copied == 0
        allocator.wake()
        assert allocator.read(segment, 0, 7) == b"content"
print(json.dumps([called, seconds[1.0], seconds[0.25]]))
"""


@pytest.fixture
def slow_link(child: Callable[..., object], tmp_path) -> list[float]:  # type: ignore[no-untyped-def]
    import json

    box = SimulatedBox.create(tmp_path / "box", devices=1, copy_gib_s=50)
    return json.loads(child(SLOW_LINK, **box.env()).rest())  # type: ignore[attr-defined]


def test_the_start_returns_at_once_and_the_link_is_taken_for_its_share_of_the_time(slow_link: list[float]) -> None:
    called_s, alone_s, quarter_s = slow_link
    assert called_s < 0.02
    assert alone_s >= 4 / 50
    assert quarter_s >= 3 * 4 / 50  # a quarter of the link, less what waking up late costs
