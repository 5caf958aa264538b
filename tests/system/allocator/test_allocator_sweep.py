"""Every driver call that an operation makes is failed once, found by its own log: nothing is lost, nothing leaks, the
state is as before, and a retry succeeds. The same with calls that last longer."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

import allocator as api
from allocator import Allocator
from allocator.simdriver import SimulatedDriver
from tests.system.allocator.engine import MIB, Engine

# Answers differ in what an allocator may be tempted to do with them: out of memory, and anything else.
OUT_OF_MEMORY = 2
ANSWERS = [OUT_OF_MEMORY, 999]
REFUSED = (api.DriverError, api.OutOfMemory, api.HostMemoryExhausted)
# What an operation gets over: handing bytes back late is no failure, and staging's context is pushed again.
FORGIVEN = {"cuCtxPushCurrent", "cuMemRelease", "cuMemUnmap", "cuMemHostUnregister"}
# Without memory for digests or for one large extent there is another way.
FORGIVEN_MEMORY = {"cuMemCreate", "cuMemMap", "cuMemSetAccess", "cuMemHostRegister"}


@dataclass(frozen=True)
class Operation:
    """`arrange` brings an awake engine with its content to where `run` can be called again and again."""

    name: str
    arrange: Callable[[Engine], object]
    run: Callable[[Engine], object]


def _asleep(engine: Engine) -> None:
    engine.allocator.sleep()


def _partly_asleep(engine: Engine) -> None:
    engine.warm_cache()
    engine.allocator.sleep(bytes_wanted=260 * MIB)


def _without_masters(engine: Engine) -> None:
    engine.allocator.release_masters()
    engine.warm_cache()


def _with_old_masters(engine: Engine) -> None:
    engine.load(50)
    engine.allocator.prepare()
    engine.load(1)


WAKES = [
    Operation("wake", _asleep, lambda engine: engine.allocator.wake()),
    Operation("wake of what partly stayed", _partly_asleep, lambda engine: engine.allocator.wake()),
]
SLEEPS = [
    Operation("first sleep", _without_masters, lambda engine: engine.allocator.sleep()),
    Operation("sleep of changed content", _with_old_masters, lambda engine: engine.allocator.sleep()),
    Operation("elastic sleep", _without_masters, lambda engine: engine.allocator.sleep(bytes_wanted=260 * MIB)),
    Operation("elastic sleep of all", _with_old_masters, lambda engine: engine.allocator.sleep(bytes_wanted=1 << 40)),
    Operation("discard", _without_masters, lambda engine: engine.allocator.discard(["kv_cache"])),
]
PREPARES = [
    Operation("prepare", _without_masters, lambda engine: engine.allocator.prepare()),
    Operation("prepare of changed content", _with_old_masters, lambda engine: engine.allocator.prepare()),
]


def named(operations: list[Operation]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("operation", operations, ids=lambda operation: operation.name)


@pytest.fixture
def engine(allocator: Allocator, driver: SimulatedDriver) -> Engine:
    return Engine(allocator, driver)


@pytest.fixture
def small_engine(driver: SimulatedDriver) -> Iterator[Engine]:
    """One chunk a segment: the background makes few calls for each."""
    with Allocator(slab_bytes=64 * MIB, chunk_bytes=64 * MIB, link_share=1.0) as allocator:
        yield Engine(allocator, driver, unit_bytes=16 * MIB)
    assert driver.bytes_registered() == 0


def calls(engine: Engine, operation: Operation) -> list[str]:
    """What it calls once everything that is made once exists."""
    for _ in range(2):
        operation.arrange(engine)
        found = engine.calls_of(lambda: operation.run(engine))
        wake_up(engine)
    return found


def wake_up(engine: Engine) -> None:
    if engine.allocator.asleep_tags():
        engine.allocator.wake()


@pytest.mark.parametrize("answer", ANSWERS)
@named(WAKES)
def test_a_wake_survives_the_failure_of_any_of_its_calls(engine: Engine, operation: Operation, answer: int) -> None:
    """Catalogue 1, 2, 5: blocks left mapped, masters dropped too early, blocks marked awake before their copy."""
    names = calls(engine, operation)
    assert {"cuMemCreate", "cuMemMap", "cuMemSetAccess", "cuMemsetD8Async", "cuStreamSynchronize"} <= set(names)
    awake, injected = engine.held_bytes(), 0
    for n, call in enumerate(names, start=1):
        where = f"call {n} of {len(names)}, {call}"
        operation.arrange(engine)
        asleep, tags = engine.held_bytes(), engine.allocator.asleep_tags()
        engine.driver.clear_log()
        with engine.driver.faults(f"*@{n}={answer}"):
            error = refusal(lambda: operation.run(engine))
        # Else it had a shorter way this time, for the copy engine answered quickly; or all was done but the tidying.
        if failed_calls(engine) - {"cuEventDestroy"}:
            assert error is not None, where
            assert error.call in {call + suffix for call in failed_calls(engine) for suffix in ("", "_v2")}, where
            assert engine.allocator.asleep_tags() == tags, where
            assert engine.held_bytes() == asleep, where
            operation.run(engine)
            injected += 1
        assert engine.intact(), where
        assert engine.cache_bytes() <= {0, 7}, where
        assert engine.held_bytes() == awake, where
    assert injected >= len(names) * 3 // 4


@pytest.mark.parametrize("answer", ANSWERS)
@named(SLEEPS)
def test_a_sleep_survives_the_failure_of_any_of_its_calls(engine: Engine, operation: Operation, answer: int) -> None:
    """It stays awake with all its content, the cache too; or, past the point of no return, it sleeps in full."""
    names = calls(engine, operation)
    awake, refused = engine.device_bytes(), set()
    for n, call in enumerate(names, start=1):
        where = f"call {n} of {len(names)}, {call}"
        operation.arrange(engine)
        with engine.driver.faults(f"*@{n}={answer}"):
            try:
                operation.run(engine)
            except REFUSED:
                refused.add(call)
                assert engine.allocator.asleep_tags() == frozenset(), where
        if not engine.allocator.asleep_tags():
            assert engine.intact(), where
            assert engine.cache_bytes() == {7}, where
            assert engine.device_bytes() == awake, where
            # Masters that were taken in full may stay: they are accounted for, and go when asked.
            give_masters_back(engine)
            operation.run(engine)
        engine.allocator.collect()
        assert engine.allocator.asleep_tags(), where
        engine.allocator.wake()
        assert engine.intact(), where
        assert engine.cache_bytes() <= {0, 7}, where
        assert engine.device_bytes() == awake, where
    assert refused >= set(names) - forgiven(answer)


@pytest.mark.parametrize("answer", ANSWERS)
@named(PREPARES)
def test_a_prepare_survives_the_failure_of_any_of_its_calls(engine: Engine, operation: Operation, answer: int) -> None:
    names = calls(engine, operation)
    awake, refused = engine.device_bytes(), set()
    for n, call in enumerate(names, start=1):
        where = f"call {n} of {len(names)}, {call}"
        operation.arrange(engine)
        with engine.driver.faults(f"*@{n}={answer}"):
            try:
                operation.run(engine)
            except REFUSED:
                refused.add(call)
        engine.allocator.collect()
        still_serves(engine, where, awake)
        sleeps_and_wakes(engine, where, awake)
        give_masters_back(engine)
    assert refused >= set(names) - forgiven(answer)


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("arrange", [_without_masters, _with_old_masters])
def test_a_prepare_in_the_background_survives_the_failure_of_any_of_its_calls(
    small_engine: Engine, arrange: Callable[[Engine], None], answer: int
) -> None:
    """It says that it failed, and harms neither what serves nor a later sleep."""
    engine = small_engine
    operation = Operation("background", arrange, Engine.prepare_in_background)
    names = calls(engine, operation)
    awake, reported = engine.device_bytes(), set()
    assert {"cuMemcpyDtoDAsync", "cuLaunchKernel", "cuMemcpyDtoHAsync", "cuStreamSynchronize"} <= set(names)
    for n, call in enumerate(names, start=1):
        where = f"call {n} of {len(names)}, {call}"
        arrange(engine)
        engine.driver.clear_log()
        with engine.driver.faults(f"*@{n}={answer}"):
            error = engine.prepare_in_background()
        if error is not None:
            reported |= failed_calls(engine)
        engine.allocator.collect()
        still_serves(engine, where, awake)
        sleeps_and_wakes(engine, where, awake)
        give_masters_back(engine)
    assert reported >= set(names) - forgiven(answer)


@named([*WAKES, *SLEEPS, *PREPARES])
def test_calls_that_last_longer_change_nothing_but_the_time(engine: Engine, operation: Operation) -> None:
    for call in sorted(set(calls(engine, operation))):
        operation.arrange(engine)
        with engine.driver.faults(f"{call}~1"):
            operation.run(engine)
        wake_up(engine)
        assert engine.intact(), call


def refusal(operation: Callable[[], object]) -> api.AllocatorError | None:
    try:
        operation()
    except REFUSED as error:
        return error
    return None


def forgiven(answer: int) -> set[str]:
    return FORGIVEN | FORGIVEN_MEMORY if answer == OUT_OF_MEMORY else FORGIVEN


def failed_calls(engine: Engine) -> set[str]:
    return {call.removesuffix("!") for call in engine.driver.log() if call.endswith("!")}


def give_masters_back(engine: Engine) -> None:
    registered = engine.driver.bytes_registered()
    assert engine.allocator.release_masters() == engine.allocator.scale * registered
    assert engine.driver.bytes_registered() == 0


def still_serves(engine: Engine, where: str, awake: list[int]) -> None:
    assert engine.allocator.asleep_tags() == frozenset(), where
    assert engine.intact(), where
    assert engine.cache_bytes() == {7}, where
    assert engine.device_bytes() == awake, where


def sleeps_and_wakes(engine: Engine, where: str, awake: list[int]) -> None:
    engine.allocator.sleep()
    assert engine.device_bytes() == [0, 0], where
    engine.allocator.wake()
    assert engine.intact(), where
    assert engine.device_bytes() == awake, where
