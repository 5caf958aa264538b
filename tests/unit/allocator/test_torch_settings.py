"""Expandable segments: off inside a region, and everything else as it was, whichever name set them."""

import threading
from collections.abc import Callable
from typing import Any

import pytest

from allocator import TorchUnsupported
from allocator.torch_settings import from_environment, is_expandable, with_expandable

Make = Callable[..., Any]
SETTINGS = "max_split_size_mb:512,expandable_segments:True,garbage_collection_threshold:0.8"


def test_they_are_off_inside_and_back_after(make: Make) -> None:
    bench = make(settings=SETTINGS)
    with bench.allocator.region("weights"):
        assert not is_expandable(bench.torch.settings)
        assert "max_split_size_mb:512" in bench.torch.settings
        assert "garbage_collection_threshold:0.8" in bench.torch.settings
    assert sorted(bench.torch.settings.split(",")) == sorted(SETTINGS.split(","))


def test_the_last_region_to_end_restores_them(make: Make) -> None:
    bench = make(settings=SETTINGS)
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with bench.allocator.region("kv_cache"):
            entered.set()
            leave.wait(5)

    thread = threading.Thread(target=other)
    with bench.allocator.region("weights"):
        thread.start()
        entered.wait(5)
    assert not is_expandable(bench.torch.settings)
    leave.set()
    thread.join()
    assert is_expandable(bench.torch.settings)


def test_a_graph_pool_switches_them_off_too(make: Make) -> None:
    bench = make(settings=SETTINGS)
    with bench.allocator.graph_pool():
        assert not is_expandable(bench.torch.settings)
    assert is_expandable(bench.torch.settings)


def test_settings_without_them_are_left_alone(make: Make) -> None:
    bench = make(settings="max_split_size_mb:512")
    with bench.allocator.region("weights"):
        pass
    assert bench.torch.writes == []


def test_a_torch_that_keeps_them_on_is_refused(make: Make) -> None:
    bench = make(settings=SETTINGS)
    bench.torch.stuck = True
    with pytest.raises(TorchUnsupported, match="start without"):
        bench.allocator.region("weights").__enter__()


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_a_torch_that_does_not_tell_is_judged_by_either_variable(
    make: Make, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    bench = make(settings=SETTINGS)
    bench.torch.module.cuda.memory._snapshot = None
    monkeypatch.setenv(name, SETTINGS)
    with pytest.raises(TorchUnsupported):  # it cannot say either whether the write took: refused rather than hoped
        bench.allocator.region("weights").__enter__()


def test_the_newer_name_wins() -> None:
    both = {"PYTORCH_CUDA_ALLOC_CONF": "a:1", "PYTORCH_ALLOC_CONF": "b:2"}
    assert from_environment(both) == "b:2"
    assert from_environment({"PYTORCH_CUDA_ALLOC_CONF": "a:1"}) == "a:1"
    assert from_environment({}) == ""


@pytest.mark.parametrize(
    ("settings", "expandable"),
    [
        ("expandable_segments:True", True),
        (" expandable_segments : true ", True),
        ("max_split_size_mb:1,expandable_segments:1", True),
        ("expandable_segments:False", False),
        ("", False),
    ],
)
def test_a_settings_string_is_read_as_torch_reads_it(settings: str, expandable: bool) -> None:
    assert is_expandable(settings) is expandable


def test_one_option_changes_and_the_others_stay() -> None:
    assert with_expandable("a:1,expandable_segments:True,b:[c:2]", enabled=False) == (
        "a:1,b:[c:2],expandable_segments:False"
    )
    assert with_expandable("", enabled=True) == "expandable_segments:True"
