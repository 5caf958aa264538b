"""The patches on the sleep allocator and what stands above it, on modules of vLLM's shapes over a fake driver."""

import ast

import pytest

from overlays.build import Result, View, apply_all, known_version, probe, try_patch
from overlays.patch import Finding, Verdict
from overlays.patches import (
    allocator_hook,
    attest,
    driver_state,
    failed_rank_guard,
    stream_aware_free,
    transactional_wake,
)
from overlays.registry import all_patches, ordered
from overlays.sources import Memory
from tests.overlay_sleep_files import CUMEM, ENGINE, EXECUTOR, MIDDLE, NEW, OLD, WORKER, cumem, stock

SLEEP = ordered(
    module.PATCH for module in (attest, driver_state, failed_rank_guard, stream_aware_free, transactional_wake)
)
SHAPES = {"old": (OLD, "0.19.1"), "middle": (MIDDLE, "0.26.0"), "new": (NEW, "0.33.0")}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_has_the_bugs_and_loses_them(shape: str) -> None:
    files, version = SHAPES[shape]
    patched = apply_all(Memory(stock(files), version), SLEEP)
    results = {outcome.patch: outcome.result for outcome in patched.outcomes}
    waits_itself = Result.APPLIED if files is OLD else Result.UPSTREAM
    assert results == {
        "attest": Result.APPLIED,
        "driver-state": Result.APPLIED,
        "failed-rank-guard": Result.APPLIED,
        "stream-aware-free": waits_itself,
        "transactional-wake": Result.APPLIED,
    }, [outcome for outcome in patched.outcomes if outcome.result is Result.FAILED]
    assert set(patched.files) == {CUMEM, ENGINE, EXECUTOR, WORKER}


@pytest.mark.parametrize("patch", SLEEP, ids=lambda patch: patch.name)
def test_each_patch_stands_alone(patch: object) -> None:
    assert try_patch(patch, Memory(stock(OLD), "0.19.1")).result is Result.APPLIED  # type: ignore[arg-type]


def test_what_was_patched_once_is_upstream_the_second_time() -> None:
    build = Memory(stock(NEW), "0.33.0")
    once = apply_all(build, SLEEP)
    again = apply_all(Memory({**stock(NEW), **once.files}, "0.33.0"), SLEEP)
    assert {outcome.result for outcome in again.outcomes} == {Result.UPSTREAM}
    assert not again.files


def test_bytes_outside_the_edits_stay() -> None:
    text = cumem(OLD).replace("\n", "\r\n", 3) + "# ünïcode at the end"
    patched = apply_all(Memory({**stock(OLD), CUMEM: text}, "0.19.1"), [stream_aware_free.PATCH])
    before, after = text.encode(), patched.files[CUMEM]
    added = len(after) - len(before)
    start = next(index for index, pair in enumerate(zip(before, after, strict=False)) if pair[0] != pair[1])
    assert after[:start] + after[start + added :] == before


def test_a_wake_that_copies_another_way_fails_closed() -> None:
    mapped = "                create_and_map(handle)\n"
    strange = cumem(MIDDLE).replace(mapped, mapped + "                self.pointer_to_data[ptr] = data\n")
    outcome = try_patch(transactional_wake.PATCH, Memory({**stock(), CUMEM: strange}, "0.26.0"))
    assert outcome.result is Result.FAILED
    assert "does not know" in outcome.reason


def test_an_allocator_that_moved_is_found_by_its_shape() -> None:
    files = stock()
    files["vllm/memory/pool.py"] = files.pop(CUMEM)
    patched = apply_all(Memory(files, "0.26.0"), [transactional_wake.PATCH])
    assert patched.outcomes[0].result is Result.APPLIED
    assert set(patched.files) == {"vllm/memory/pool.py"}


def test_an_allocator_that_could_be_in_two_files_fails_closed() -> None:
    files = stock()
    files["vllm/memory/pool.py"] = files["vllm/memory/other.py"] = files.pop(CUMEM)
    assert try_patch(transactional_wake.PATCH, Memory(files, "0.26.0")).result is Result.FAILED


def test_a_file_that_is_gone_in_a_known_release_fails_closed() -> None:
    files = stock()
    del files[CUMEM]
    assert try_patch(driver_state.PATCH, Memory(files, "0.26.0")).result is Result.FAILED


@pytest.mark.parametrize("version", ["0.1.dev1+g12345", "", "main"])
def test_a_build_whose_version_says_nothing_is_judged_by_its_code(version: str) -> None:
    assert known_version(version) is None
    assert try_patch(transactional_wake.PATCH, Memory(stock(), version)).result is Result.APPLIED


def test_a_release_outside_the_range_is_left_alone() -> None:
    assert try_patch(transactional_wake.PATCH, Memory(stock(), "0.18.0")).result is Result.NOT_APPLICABLE


def test_a_probe_that_breaks_fails_the_patch() -> None:
    broken = cumem(MIDDLE).replace("def sleep(self, offload_tags=None):", "def sleep(self):")
    outcome = try_patch(transactional_wake.PATCH, Memory({**stock(), CUMEM: broken}, "0.26.0"))
    assert outcome.result is Result.FAILED
    assert "the probe cannot tell" in outcome.reason


def test_a_probe_that_never_ends_is_given_up() -> None:
    endless = cumem(MIDDLE).replace(
        "            handle = data.handle\n", "            while True:\n                pass\n", 1
    )
    build = Memory({**stock(), CUMEM: endless}, "0.26.0")
    said = probe(transactional_wake.PATCH, View(build, {}, {"cumem": CUMEM}), deadline_s=0.05)
    assert isinstance(said, Verdict)
    assert said.finding is Finding.UNKNOWN
    assert "not done after" in said.evidence


def test_a_marker_in_the_text_retires_nothing() -> None:
    marker = "        # torch.cuda.synchronize(), vLLM #43020\n"
    marked = cumem(OLD).replace("        data.cpu_backup_tensor = None\n", marker, 1)
    outcome = try_patch(stream_aware_free.PATCH, Memory({**stock(OLD), CUMEM: marked}, "0.19.1"))
    assert outcome.result is Result.APPLIED


def test_the_hook_comes_last_and_only_where_plugins_do_not_reach() -> None:
    early = apply_all(Memory(stock(OLD), "0.19.1"), [*SLEEP, allocator_hook.PATCH])
    assert early.outcomes[-1].result is Result.APPLIED
    assert ast.unparse(ast.parse(early.files[CUMEM]).body[-1]) == "take_over(globals())"
    assert try_patch(allocator_hook.PATCH, Memory(stock(), "0.26.0")).result is Result.NOT_APPLICABLE


def test_every_patch_says_why_and_when_it_may_go() -> None:
    for patch in all_patches():
        assert patch.why
        assert patch.drop_when
        assert patch.required or patch.opt_in or patch.why
