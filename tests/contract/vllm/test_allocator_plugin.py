"""The plugin in doubles of vLLM's processes: which instance workers get, what its calls become, what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import allocator.core
from allocator import DriverMissing, PluginRefused
from allocator.vllm import register
from allocator.vllm.instance import VllmAllocator
from allocator.vllm.overlay import take_over
from allocator.vllm.settings import from_environment
from allocator.vllm.worker import loaded_libraries
from tests.contract.vllm.fake_vllm import MIB, Process, StockAllocator
from tests.unit.allocator.fake_memory import FakeMemory
from tests.unit.allocator.fake_torch import FakeTorch

RELEASES = ["0.25.1", "0.26.0", "0.27.1", "0.28.0", "0.29.0", "0.30.0", "0.31.0", "0.32.0", "0.33.0"]


class Setup:
    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch, self.memory, self.arguments = patch, FakeMemory(), dict[str, Any]()
        self.torch = FakeTorch(self.memory.malloc, self.memory.free)
        patch.setitem(__import__("sys").modules, "torch", self.torch.module)
        patch.setattr(allocator.core, "Allocator", self._allocator)
        for name in ("", "_PREPARE", "_HOST_GIB", "_SPILL_DIR", "_SLAB_MIB", "_TRIM", "_BUDGET_FILE", "_LINK_SHARE"):
            patch.delenv(f"ROTATOR_ALLOCATOR{name}", raising=False)

    def _allocator(self, **arguments: Any) -> FakeMemory:
        self.arguments = arguments
        return self.memory

    def process(self, version: str = "0.26.0", **options: Any) -> Process:
        return Process(self.patch, self.torch, version, **options)


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> Setup:
    return Setup(monkeypatch)


def registered(setup: Setup, version: str = "0.26.0") -> Process:
    process = setup.process(version)
    register()
    return process


@pytest.mark.parametrize("version", RELEASES)
def test_a_worker_loads_its_weights_into_ours(setup: Setup, version: str) -> None:
    process = registered(setup, version)
    process.worker().rpc("load_model")
    assert isinstance(process.cumem.CuMemAllocator.instance, VllmAllocator)
    assert setup.memory.asked("malloc")[0] == ("weights", 24 * MIB)


@pytest.mark.parametrize("version", RELEASES)
def test_every_release_serves_sleeps_wakes_and_shuts_down(setup: Setup, version: str) -> None:
    worker = registered(setup, version).served()
    for level in (1, 2):
        worker.rpc("sleep", level)
        worker.rpc("wake_up", None)
        assert setup.memory.asleep == set()
    worker.rpc("shutdown")
    assert [call[0] for call in setup.memory.asked("sleep")] == [1, 2]
    assert not setup.torch.aborted


def test_the_temporaries_of_loading_are_back_before_vllm_measures_memory(setup: Setup) -> None:
    registered(setup).worker().rpc("load_model")
    assert setup.memory.nbytes("weights") == 24 * MIB


@pytest.mark.parametrize("version", ["0.29.0", "0.31.0"])
def test_older_releases_have_weights_and_cache(setup: Setup, version: str) -> None:
    registered(setup, version).served()
    assert {tag for tag, _ in setup.memory.segments.values()} == {"weights", "kv_cache"}


@pytest.mark.parametrize("version", ["0.25.1", "0.28.0"])
def test_what_a_release_makes_beside_its_cache_is_kept(setup: Setup, version: str) -> None:
    registered(setup, version).served()
    assert setup.memory.nbytes("kv_cache") == 32 * MIB
    assert setup.memory.nbytes("runtime") == 2 * MIB


@pytest.mark.parametrize("version", ["0.32.0", "0.33.0"])
def test_the_cache_nests_in_runtime_and_scratch_is_workspace(setup: Setup, version: str) -> None:
    registered(setup, version).served()
    sizes = {tag: setup.memory.nbytes(tag) // MIB for tag, _ in setup.memory.segments.values()}
    assert sizes == {"weights": 24, "kv_cache": 32, "runtime": 2, "workspace": 16}


def test_a_wake_by_tag_leaves_the_other_of_weights_and_cache_asleep(setup: Setup) -> None:
    worker = registered(setup, "0.33.0").served()
    worker.rpc("sleep", 1)
    worker.rpc("wake_up", ["weights"])
    assert setup.memory.asleep == {"kv_cache"}
    worker.rpc("wake_up", ["kv_cache"])
    assert setup.memory.asleep == set()


def test_sleeping_and_waking_twice_does_nothing_the_second_time(setup: Setup) -> None:
    worker = registered(setup).served()
    worker.rpc("sleep", 1)
    worker.rpc("sleep", 1)
    worker.rpc("wake_up", None)
    worker.rpc("wake_up", None)
    worker.rpc("wake_up", ["weights"])
    assert setup.memory.asleep == set()


def test_a_discard_takes_only_what_is_awake(setup: Setup) -> None:
    worker = registered(setup, "0.31.0").served()
    worker.rpc("discard", ("kv_cache",))
    worker.rpc("discard", ("kv_cache",))
    assert setup.memory.asked("discard") == [(("kv_cache",),)]


def test_a_pool_without_a_tag_is_kept_at_every_level(setup: Setup) -> None:
    process = registered(setup)
    with process.cumem.CuMemAllocator.get_instance().use_memory_pool():
        kept = setup.torch.empty(MIB)
    assert kept.function == "rotator_malloc_runtime"


def test_a_second_engine_of_the_process_can_load_after_the_first_is_gone(setup: Setup) -> None:
    process = registered(setup)
    worker = process.served()
    worker.worker.model_runner.kept.clear()
    worker.rpc("shutdown")
    process.worker().rpc("load_model")
    assert setup.memory.nbytes("weights") == 24 * MIB


def test_registering_again_and_in_forks_changes_nothing_more(setup: Setup) -> None:
    process = registered(setup)
    getter, warm_up = process.cumem.CuMemAllocator.get_instance, process.wrapper.compile_or_warm_up_model
    register()
    register()
    assert process.cumem.CuMemAllocator.get_instance is getter
    assert process.wrapper.compile_or_warm_up_model is warm_up


def test_processes_without_a_worker_make_no_allocator(setup: Setup) -> None:
    process = registered(setup)
    assert process.cumem.CuMemAllocator.instance is None
    assert setup.memory.calls == []


def test_without_sleep_mode_it_is_inactive_and_says_so(setup: Setup, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="vllm.rotator_allocator")
    process = registered(setup)
    assert process.served(sleep_mode=False).worker.warmed_up
    assert process.cumem.CuMemAllocator.instance is None
    assert "sleep mode is off" in caplog.text


def test_masters_are_taken_in_the_background_once_warm_up_is_over(setup: Setup) -> None:
    worker = registered(setup).worker()
    worker.rpc("load_model")
    worker.rpc("initialize_from_config")
    assert setup.memory.asked("prepare") == []
    assert worker.rpc("compile_or_warm_up_model") == "times"
    assert setup.memory.asked("prepare") == [(False,)]


def test_masters_are_left_to_the_first_sleep_when_told_so(setup: Setup) -> None:
    setup.patch.setenv("ROTATOR_ALLOCATOR_PREPARE", "0")
    registered(setup).served()
    assert setup.memory.asked("prepare") == []


# -- methods for /collective_rpc --


def test_bytes_are_given_back_and_taken_again(setup: Setup) -> None:
    worker = registered(setup).served()
    report = worker.rpc("rotator_sleep_bytes", str(32 * MIB))
    assert report["seconds"] == 0.1
    assert setup.memory.asked("sleep")[-1] == (1, None, 32 * MIB)
    assert setup.memory.asleep == {"kv_cache"}
    assert worker.rpc("rotator_wake")["gib_s"] == 10.0
    assert setup.memory.asleep == set()


@pytest.mark.parametrize(("version", "times"), [("0.26.0", 1), ("0.33.0", 0)])
def test_a_returned_cache_gets_its_scales_where_the_release_sets_them(setup: Setup, version: str, times: int) -> None:
    worker = registered(setup, version).served()
    worker.rpc("rotator_sleep_bytes", MIB)
    worker.rpc("rotator_wake")
    assert worker.worker.model_runner.restored == times


def test_bytes_are_not_taken_from_a_cache_that_a_connector_has_registered(setup: Setup) -> None:
    worker = registered(setup).served(kv_transfer_config=object())
    with pytest.raises(PluginRefused, match="connector"):
        worker.rpc("rotator_sleep_bytes", MIB)


def test_memory_shows_usage_masters_and_the_last_reports(setup: Setup) -> None:
    worker = registered(setup).served()
    worker.rpc("sleep", 1)
    shown = worker.rpc("rotator_memory")
    assert shown["asleep"] == ["kv_cache", "runtime", "weights"]
    assert {row["tag"] for row in shown["usage"]} == {"kv_cache", "runtime", "weights"}
    assert shown["wall_s"].keys() == {"sleep"}
    assert shown["last_sleep"]["seconds"] == 0.1
    assert shown["last_wake"] is None
    assert shown["prepare"] == {"running": False, "bytes_done": 0, "bytes_total": 0, "seconds": 0.0, "error": None}


def test_masters_are_taken_on_request(setup: Setup) -> None:
    worker = registered(setup).served()
    assert worker.rpc("rotator_prepare")["report"] is None
    assert worker.rpc("rotator_prepare", "true")["report"]["bytes_copied"] == 1
    assert [wait for (wait,) in setup.memory.asked("prepare")] == [False, False, True]


def test_masters_go_where_they_are_asked_to_and_are_given_back_on_request(setup: Setup) -> None:
    worker = registered(setup).served()
    for where in ("host", "disk"):
        assert "bytes" in worker.rpc("rotator_masters", where)
    assert [where for (where,) in setup.memory.asked("place_masters")] == ["host", "disk"]
    assert setup.memory.asked("release_masters") == []
    assert "bytes" in worker.rpc("rotator_masters", "none")
    assert len(setup.memory.asked("release_masters")) == 1
    with pytest.raises(PluginRefused, match="tape"):
        worker.rpc("rotator_masters", "tape")


def test_a_worker_attests_what_it_loaded(setup: Setup) -> None:
    process = registered(setup, "0.28.0")
    before = process.worker().rpc("rotator_attest")
    assert before["active"] is False
    said = process.served().rpc("rotator_attest")
    assert said["active"] is True
    assert said["vllm"] == "0.28.0"
    assert said["vllm_path"] == "/opt/vllm/__init__.py"
    assert said["cumem"]["path"] == process.cumem.__file__
    assert len(said["cumem"]["sha256"]) == 64
    assert Path(said["plugin"]["path"]).name == "worker.py"


def test_libraries_are_named_as_the_kernel_maps_them(tmp_path: Path) -> None:
    row = "7f00-7f01 r-xp 00000000 08:01 42 "
    ours = f"{row}/opt/with space/librotator_alloc.so\n"
    others = f"{row}/usr/lib/libc.so.6\n7f02-7f03 rw-p 00000000 00:00 0\n"
    (tmp_path / "maps").write_text(ours + ours + others)
    assert loaded_libraries(tmp_path / "maps") == [Path("/opt/with space/librotator_alloc.so")]


@pytest.mark.parametrize("method", ["rotator_wake", "rotator_memory", "rotator_prepare"])
def test_methods_of_an_allocator_that_is_not_in_use_say_so(setup: Setup, method: str) -> None:
    worker = registered(setup).served(sleep_mode=False)
    with pytest.raises(PluginRefused, match="--enable-sleep-mode"):
        worker.rpc(method)


# -- refusals --


@pytest.mark.parametrize("version", ["0.24.0", "0.25.0", "0.34.0", "1.0.0", "0.26.0rc1", "0.26.1.dev7+g1234567", "dev"])
def test_a_release_that_nobody_read_is_refused_when_sleep_mode_is_on(setup: Setup, version: str) -> None:
    process = setup.process("0.26.0")
    __import__("sys").modules["vllm"].__version__ = version
    register()
    with pytest.raises(PluginRefused, match=version.split("+")[0]):
        process.worker().rpc("load_model")


def test_a_missing_driver_is_refused_with_the_way_out(setup: Setup) -> None:
    def missing(**_: Any) -> Any:
        raise DriverMissing("no libcuda.so.1")

    process = registered(setup)
    setup.patch.setattr(allocator.core, "Allocator", missing)
    with pytest.raises(PluginRefused, match=r"libcuda.*ROTATOR_ALLOCATOR=off"):
        process.worker().rpc("load_model")


def test_a_stock_allocator_that_holds_memory_is_not_replaced(setup: Setup) -> None:
    process = registered(setup)
    process.cumem.CuMemAllocator.instance = StockAllocator(usage=5)
    with pytest.raises(PluginRefused, match="too late"):
        process.worker().rpc("load_model")


def test_a_stock_allocator_that_holds_nothing_is_replaced(setup: Setup) -> None:
    process = registered(setup)
    process.cumem.CuMemAllocator.instance = StockAllocator()
    process.worker().rpc("load_model")
    assert isinstance(process.cumem.CuMemAllocator.instance, VllmAllocator)


@pytest.mark.parametrize("value", ["off", "0", "False"])
def test_switched_off_it_changes_nothing(setup: Setup, value: str) -> None:
    setup.patch.setenv("ROTATOR_ALLOCATOR", value)
    process = registered(setup)
    assert isinstance(process.cumem.CuMemAllocator.get_instance(), StockAllocator)
    assert not hasattr(process.wrapper, "rotator_attest")


def test_a_platform_without_cuda_keeps_its_own(setup: Setup) -> None:
    process = setup.process(cuda=False)
    register()
    assert isinstance(process.cumem.CuMemAllocator.get_instance(), StockAllocator)


def test_settings_reach_the_allocator(setup: Setup, tmp_path: Path) -> None:
    (tmp_path / "budget").touch()
    given = {"HOST_GIB": "1.5", "SLAB_MIB": "64", "SPILL_DIR": str(tmp_path), "LINK_SHARE": "0.25"}
    for name, value in {**given, "BUDGET_FILE": str(tmp_path / "budget")}.items():
        setup.patch.setenv(f"ROTATOR_ALLOCATOR_{name}", value)
    registered(setup).worker().rpc("load_model")
    assert setup.arguments == {
        "host_budget_bytes": 3 << 29,
        "slab_bytes": 64 << 20,
        "spill_dir": tmp_path,
        "budget_file": tmp_path / "budget",
        "link_share": 0.25,
    }


def test_what_is_not_set_is_left_to_the_allocator(setup: Setup) -> None:
    registered(setup).worker().rpc("load_model")
    assert setup.arguments == {}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("", "maybe"),
        ("_PREPARE", "2"),
        ("_HOST_GIB", "lots"),
        ("_HOST_GIB", "-1"),
        ("_HOST_GIB", "nan"),
        ("_SLAB_MIB", "0"),
        ("_SLAB_MIB", "inf"),
        ("_SPILL_DIR", "/nowhere/at/all"),
        ("_BUDGET_FILE", "/nowhere/at/all"),
        ("_LINK_SHARE", "0"),
        ("_LINK_SHARE", "1.5"),
        ("_LINK_SHARE", "half"),
    ],
)
def test_a_setting_that_means_nothing_is_refused_by_name(name: str, value: str) -> None:
    with pytest.raises(PluginRefused, match=f"ROTATOR_ALLOCATOR{name}={value}"):
        from_environment({f"ROTATOR_ALLOCATOR{name}": value})


# -- the overlay --


def overlaid(setup: Setup, version: str) -> Process:
    """A process whose cumem.py ends with the two lines of an overlay."""
    process = setup.process(version)
    take_over(vars(process.cumem))
    return process


@pytest.mark.parametrize("version", ["0.19.0", "0.19.1", "0.20.2", "0.24.0", "0.25.1"])
def test_an_overlaid_file_hands_workers_ours(setup: Setup, version: str) -> None:
    process = overlaid(setup, version)
    worker = process.served()
    assert isinstance(process.cumem.CuMemAllocator.instance, VllmAllocator)
    worker.rpc("sleep", 1)
    worker.rpc("wake_up", None)
    assert worker.rpc("rotator_attest")["cumem"]["path"] == process.cumem.__file__
    assert setup.memory.asked("prepare") == [(False,)]


@pytest.mark.parametrize("version", ["0.18.1", "0.26.0"])
def test_an_overlay_on_another_release_stops_the_import(setup: Setup, version: str) -> None:
    with pytest.raises(PluginRefused, match=version):
        overlaid(setup, version)


def test_an_overlay_of_the_wrong_file_stops_the_import(setup: Setup) -> None:
    setup.process("0.24.0")
    with pytest.raises(PluginRefused, match="wrong overlay"):
        take_over({"__file__": "other.py"})


def test_an_overlay_beside_the_plugin_is_one_allocator(setup: Setup) -> None:
    process = overlaid(setup, "0.25.1")
    getter = process.cumem.CuMemAllocator.get_instance
    register()
    assert process.cumem.CuMemAllocator.get_instance is getter


def test_an_overlay_is_switched_off_by_the_same_variable(setup: Setup) -> None:
    setup.patch.setenv("ROTATOR_ALLOCATOR", "off")
    process = overlaid(setup, "0.19.1")
    assert isinstance(process.cumem.CuMemAllocator.get_instance(), StockAllocator)


def test_the_entry_point_names_what_exists() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    module, _, function = project["entry-points"]["vllm.general_plugins"]["rotator_allocator"].partition(":")
    named: Callable[[], None] = getattr(__import__(module, fromlist=[function]), function)
    assert named is register
