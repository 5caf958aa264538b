"""Bad input: a typed error that says what to do, and nothing changed, neither in the state nor on the device."""

from collections.abc import Callable, Iterator

import pytest

import allocator as api
from allocator import Allocator
from allocator.simdriver import SimulatedDriver

GIB = 1 << 30
MIB = 1 << 20
Call = Callable[[Allocator, api.Segment], object]

WHILE_AWAKE: list[tuple[str, Call, type[api.AllocatorError], str]] = [
    ("an unknown tag to allocate", lambda a, s: a.alloc(GIB, tag="wieghts"), api.UnknownTag, "weights, kv_cache"),  # type: ignore[arg-type]
    ("an unknown tag to sleep", lambda a, s: a.sleep(tags=["kv"]), api.UnknownTag, "weights, kv_cache"),  # type: ignore[list-item]
    ("no tag to sleep", lambda a, s: a.sleep(tags=[]), api.UnknownTag, "no tag named"),
    ("no tag to discard", lambda a, s: a.discard([]), api.UnknownTag, "no tag named"),
    ("an unknown level", lambda a, s: a.sleep(level=0), api.UsageError, "there are 1 and 2"),
    ("no bytes to allocate", lambda a, s: a.alloc(0), api.InvalidSize, "at least one byte"),
    ("a negative size", lambda a, s: a.alloc(-1), api.InvalidSize, "at least one byte"),
    ("more than the device has", lambda a, s: a.alloc(97 * GIB), api.InvalidSize, "larger than its device"),
    ("no bytes wanted", lambda a, s: a.sleep(bytes_wanted=0), api.InvalidSize, "leave it out"),
    ("a wake while awake", lambda a, s: a.wake(), api.NotAsleep, "not asleep"),
    ("a wake of a tag that is awake", lambda a, s: a.wake(tags=["weights"]), api.NotAsleep, "not asleep"),
    ("an unknown tag to wake", lambda a, s: a.wake(tags=["weight"]), api.UnknownTag, "weights, kv_cache"),  # type: ignore[list-item]
    ("an unknown tag to prepare", lambda a, s: a.prepare(["x"]), api.UnknownTag, "weights, kv_cache"),  # type: ignore[list-item]
    ("... and in the background", lambda a, s: a.prepare(["x"], wait=False), api.UnknownTag, "weights, kv_cache"),  # type: ignore[list-item]
    ("a foreign pointer to free", lambda a, s: a.free(4096), api.ForeignPointer, "no live segment"),
    ("the middle of a segment to free", lambda a, s: a.free(s.address + 4096), api.ForeignPointer, "no live segment"),
    ("a foreign pointer to pin", lambda a, s: a.pin(4096), api.ForeignPointer, "in no segment"),
    ("an unpin too many", lambda a, s: a.unpin(s), api.Registered, "not registered"),
    ("a read past the end", lambda a, s: a.read(s, s.content_nbytes, 1), api.InvalidSize, "past the end"),
    ("a write past the end", lambda a, s: a.write(s, b"ab", s.content_nbytes - 1), api.InvalidSize, "past the end"),
    ("a negative offset", lambda a, s: a.read(s, -1, 1), api.InvalidSize, "past the end"),
    ("a negative budget", lambda a, s: a.set_host_budget(-1), api.InvalidSize, "None means no bound"),
    ("a capture that never began", lambda a, s: a.capture_end(), api.AllocatorError, "never began"),
]
WHILE_ASLEEP: list[tuple[str, Call, type[api.AllocatorError], str]] = [
    ("a sleep while asleep", lambda a, s: a.sleep(), api.AlreadyAsleep, "already asleep"),
    ("a sleep of a tag that sleeps", lambda a, s: a.sleep(tags=["weights"]), api.AlreadyAsleep, "already asleep"),
    ("a discard of a tag that sleeps", lambda a, s: a.discard(["weights"]), api.AlreadyAsleep, "already asleep"),
    ("an elastic sleep while asleep", lambda a, s: a.sleep(bytes_wanted=1), api.AlreadyAsleep, "already asleep"),
    ("an allocation under a sleeping tag", lambda a, s: a.alloc(GIB), api.TagAsleep, "wake it"),
    ("a read of what sleeps", lambda a, s: a.read(s), api.TagAsleep, "wake its tag"),
    ("a write to what sleeps", lambda a, s: a.write(s, b"x"), api.TagAsleep, "wake its tag"),
    ("a pin of what sleeps", lambda a, s: a.pin(s), api.TagAsleep, "wake its tag"),
]


def named(cases: list[tuple[str, Call, type[api.AllocatorError], str]]) -> pytest.MarkDecorator:
    arguments = [pytest.param(call, kind, words, id=name) for name, call, kind, words in cases]
    return pytest.mark.parametrize(("call", "kind", "words"), arguments)


@pytest.fixture
def segment(allocator: Allocator) -> Iterator[api.Segment]:
    made = allocator.alloc(GIB)
    allocator.write(made, b"content")
    yield made
    if allocator.asleep_tags():
        allocator.wake()
    assert allocator.read(made, 0, 7) == b"content"


@named(WHILE_AWAKE)
def test_bad_input_while_awake(
    allocator: Allocator,
    segment: api.Segment,
    driver: SimulatedDriver,
    call: Call,
    kind: type[api.AllocatorError],
    words: str,
) -> None:
    used = driver.bytes_used(own=True)
    with pytest.raises(kind, match=words):
        call(allocator, segment)
    assert (driver.bytes_used(own=True), allocator.asleep_tags()) == (used, frozenset())


@named(WHILE_ASLEEP)
def test_bad_input_while_asleep(
    allocator: Allocator,
    segment: api.Segment,
    driver: SimulatedDriver,
    call: Call,
    kind: type[api.AllocatorError],
    words: str,
) -> None:
    allocator.sleep()
    driver.clear_log()
    with pytest.raises(kind, match=words):
        call(allocator, segment)
    assert (driver.log(), allocator.asleep_tags()) == ([], set(api.TAGS))


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        pytest.param({"slab_bytes": 0}, api.InvalidSize, "must be positive", id="no slab"),
        pytest.param({"slab_bytes": -1}, api.InvalidSize, "must be positive", id="a negative slab"),
        pytest.param({"chunk_bytes": 0}, api.InvalidSize, "must be positive", id="no chunk"),
        pytest.param({"host_budget_bytes": -1}, api.InvalidSize, "None means no bound", id="a negative budget"),
        pytest.param({"link_share": 0}, api.UsageError, "above 0 and up to 1", id="no share of the link"),
        pytest.param({"link_share": 1.5}, api.UsageError, "above 0 and up to 1", id="more than the link"),
        pytest.param({"driver": "/no-such-driver.so"}, api.DriverMissing, "no-such-driver", id="no driver"),
        pytest.param({"spill_dir": "/no/such/folder"}, api.AllocatorError, "/no/such/folder", id="no spill folder"),
        pytest.param({"budget_file": "/no/such/file"}, api.BudgetFileError, "/no/such/file", id="no budget file"),
    ],
)
def test_an_allocator_that_cannot_be_is_refused(
    driver: SimulatedDriver, options: dict[str, object], kind: type[api.AllocatorError], words: str
) -> None:
    with pytest.raises(kind, match=words):
        Allocator(**options)  # type: ignore[arg-type]


def test_a_spill_folder_that_cannot_be_written_is_named(driver: SimulatedDriver) -> None:
    # Root may write anywhere but here.
    with pytest.raises(api.AllocatorError, match="/proc/self"):
        Allocator(spill_dir="/proc/self")


def test_a_file_that_is_no_budget_is_named(driver: SimulatedDriver, tmp_path) -> None:  # type: ignore[no-untyped-def]
    wrong = tmp_path / "budget"
    wrong.write_text("a hundred gigabytes\n")
    with pytest.raises(api.BudgetFileError, match="rotator-host-budget"):
        Allocator(budget_file=wrong)


def test_a_budget_below_one_slab_is_told_with_the_bytes_that_are_missing(driver: SimulatedDriver) -> None:
    with Allocator(host_budget_bytes=16 * MIB, pack=False) as allocator:
        segment = allocator.alloc(GIB)
        allocator.write(segment, b"content")
        for call in (allocator.sleep, allocator.prepare):
            with pytest.raises(api.HostMemoryExhausted, match="budget") as caught:
                call()
            assert caught.value.bytes_wanted >= GIB
            assert caught.value.bytes_free <= 16 * MIB
        assert allocator.read(segment, 0, 7) == b"content"
        allocator.set_host_budget(None)
        allocator.sleep()
        allocator.wake()
        assert allocator.read(segment, 0, 7) == b"content"
