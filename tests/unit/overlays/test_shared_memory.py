"""The pruner that bundles carry into vLLM."""

import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import shared_memory as reports
from overlays.payload import shared_memory
from overlays.payload.shared_memory import ANY_GPU_KIB, KIB, Gpu, Pruner, read_gpu
from overlays.probing import load

H100, A100, SM120 = Gpu((9, 0), 232448), Gpu((8, 0), 166912), Gpu((12, 0), 101376)


@dataclass(frozen=True)
class Config:
    """As triton.Config: what is compared is identity, so equal ones are told apart."""

    bytes: int
    num_warps: int = 4
    num_stages: int = 3
    kwargs: Mapping[str, int] = field(default_factory=dict)


def said(config: Any, arguments: Mapping[str, Any], gpu: Gpu) -> int:
    return int(config.bytes)


def pruner(gpu: Gpu | None, estimate: Any = said) -> Pruner:
    return Pruner("a_kernel", estimate, lambda: gpu)


configs = st.lists(st.integers(0, 300 * KIB).map(Config), min_size=1, max_size=20)
gpus = st.sampled_from([H100, A100, SM120, Gpu((7, 5)), Gpu()])


class TestPruning:
    @given(configs=configs, gpu=gpus)
    def test_what_fits_stays_as_it_is_and_in_order(self, configs: list[Config], gpu: Gpu) -> None:
        fitting = [config for config in configs if config.bytes <= gpu.budget_bytes]
        kept = pruner(gpu)(configs, {})
        if fitting:
            assert [id(config) for config in kept] == [id(config) for config in fitting]

    @given(configs=configs, gpu=gpus)
    def test_without_any_that_fits_the_first_of_the_smallest_is_tried(self, configs: list[Config], gpu: Gpu) -> None:
        kept = pruner(gpu)(configs, {})
        if all(config.bytes > gpu.budget_bytes for config in configs):
            assert [id(config) for config in kept] == [id(min(configs, key=lambda config: config.bytes))]

    @given(configs=configs, gpu=gpus)
    def test_pruning_twice_is_pruning_once(self, configs: list[Config], gpu: Gpu) -> None:
        once = pruner(gpu)(configs, {})
        assert pruner(gpu)(once, {}) == once

    @given(configs=configs)
    def test_more_memory_never_means_fewer_configurations(self, configs: list[Config]) -> None:
        fits = [pruner(gpu)(configs, {}) for gpu in (SM120, A100, H100)]
        assert len(fits[0]) <= len(fits[1]) <= len(fits[2])

    def test_a_configuration_of_exactly_the_limit_fits(self) -> None:
        exact, above, small = Config(101376), Config(101377), Config(10)
        assert pruner(SM120)([exact, above, small], {}) == [exact, small]

    def test_without_cuda_everything_is_kept(self) -> None:
        large = [Config(10**9), Config(10**8)]
        assert pruner(None)(large, {}) == large

    def test_an_empty_list_stays_empty_without_a_word(self, caplog: pytest.LogCaptureFixture) -> None:
        assert pruner(SM120)([], {}) == []
        assert not caplog.records

    def test_what_cannot_be_estimated_is_kept(self) -> None:
        def estimate(config: Config, arguments: Mapping[str, Any], gpu: Gpu) -> int:
            return config.bytes if config.bytes else arguments["missing"]

        odd, large = Config(0), Config(10**9)
        assert pruner(SM120, estimate)([large, odd], {}) == [odd]

    def test_arguments_by_position_and_by_name_reach_the_estimate(self) -> None:
        def estimate(config: Config, arguments: Mapping[str, Any], gpu: Gpu) -> int:
            return int(arguments["K"]) * int(arguments["BT"])

        assert len(pruner(SM120, estimate)([Config(0), Config(1)], {"K": 64}, BT=64)) == 2

    def test_an_argument_may_have_any_name(self) -> None:
        assert pruner(SM120)([Config(1)], {"configs": 1}, named=2, self=3) == [Config(1)]


class TestWarning:
    def test_one_warning_tells_kernel_limit_and_need(self, caplog: pytest.LogCaptureFixture) -> None:
        prune = pruner(SM120)
        with caplog.at_level(logging.WARNING, "vllm.rotator_shared_memory"):
            for _ in range(3):
                prune([Config(200_000), Config(150_000)], {})
        assert len(caplog.records) == 1
        text = caplog.records[0].getMessage()
        assert "a_kernel" in text
        assert "101376" in text
        assert "150000" in text

    def test_every_kernel_warns_for_itself(self, caplog: pytest.LogCaptureFixture) -> None:
        for _ in range(2):
            pruner(SM120)([Config(200_000)], {})
        assert len(caplog.records) == 2

    def test_nothing_is_said_where_something_fits(self, caplog: pytest.LogCaptureFixture) -> None:
        pruner(SM120)([Config(200_000), Config(10)], {})
        assert not caplog.records


class TestBudget:
    @pytest.mark.parametrize(
        ("capability", "kib"), [((9, 0), 227), ((8, 0), 163), ((12, 0), 99), ((12, 1), 99), ((7, 5), 64), ((3, 7), 48)]
    )
    def test_without_the_drivers_word_the_capability_tells(self, capability: tuple[int, int], kib: int) -> None:
        assert Gpu(capability).budget_bytes == kib * KIB

    def test_the_drivers_word_goes_before_the_table(self) -> None:
        assert Gpu((9, 0), 100_000).budget_bytes == 100_000

    def test_nothing_known_means_what_every_gpu_has(self) -> None:
        assert Gpu().budget_bytes == ANY_GPU_KIB * KIB == 49152


def fake_torch(properties: object, cuda: str | None = "13.0") -> SimpleNamespace:
    device = SimpleNamespace(get_device_properties=lambda index: properties, current_device=lambda: 0)
    return SimpleNamespace(version=SimpleNamespace(cuda=cuda), cuda=device)


class TestReading:
    def read(self, monkeypatch: pytest.MonkeyPatch, torch: object) -> Gpu | None:
        monkeypatch.setitem(sys.modules, "torch", torch)
        return read_gpu()

    def test_the_limit_is_what_the_driver_says_a_block_can_opt_in_to(self, monkeypatch: pytest.MonkeyPatch) -> None:
        properties = SimpleNamespace(major=12, minor=0, shared_memory_per_block_optin=101376)
        assert self.read(monkeypatch, fake_torch(properties)) == SM120

    @pytest.mark.parametrize("optin", [0, -1, None, "much"])
    def test_a_limit_that_makes_no_sense_is_not_believed(self, monkeypatch: pytest.MonkeyPatch, optin: object) -> None:
        properties = SimpleNamespace(major=12, minor=1, shared_memory_per_block_optin=optin)
        assert self.read(monkeypatch, fake_torch(properties)) == Gpu((12, 1))

    def test_an_older_torch_tells_the_capability_only(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.read(monkeypatch, fake_torch(SimpleNamespace(major=8, minor=0))) == Gpu((8, 0))

    def test_another_makers_gpu_is_left_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.read(monkeypatch, fake_torch(SimpleNamespace(), cuda=None)) is None

    def test_a_driver_that_fails_means_nothing_is_known(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.read(monkeypatch, fake_torch(None)) == Gpu()

    def test_no_torch_means_nothing_is_known(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.read(monkeypatch, None) == Gpu()


REPORTED = reports.read(Path(reports.__file__).with_suffix(".csv"))


class TestEstimates:
    def test_they_are_what_triton_reported_where_it_counts(self) -> None:
        wrong = [(launch, launch.estimate_bytes) for launch in REPORTED if launch.wrong]
        assert not wrong, wrong[:3]

    def test_the_reports_cover_both_kernels_on_every_architecture(self) -> None:
        assert {(launch.kernel, launch.sm) for launch in REPORTED} == {
            (kernel, sm) for kernel in ("state", "output") for sm in (75, 80, 90, 100, 120)
        }

    @pytest.mark.parametrize(("sm", "limit"), [(75, 65536), (90, 232448), (80, 166912), (120, 101376)])
    def test_on_these_gpus_exactly_the_right_ones_are_pruned(self, sm: int, limit: int) -> None:
        for launch in REPORTED:
            if launch.sm == sm:
                assert (launch.estimate_bytes <= limit) == (launch.bytes <= limit), launch

    def test_chunks_too_small_for_asynchronous_products_are_not_charged_for_them(self) -> None:
        short = [launch for launch in REPORTED if launch.kernel == "output" and launch.chunk == 32 and launch.sm >= 90]
        assert short
        assert all(launch.estimate_bytes - launch.bytes <= 32 for launch in short)

    def test_a_launch_without_its_arguments_has_no_estimate(self) -> None:
        for estimate in (shared_memory.chunk_delta_h_bytes, shared_memory.chunk_fwd_o_bytes):
            with pytest.raises(KeyError):
                estimate(Config(0), {}, SM120)


def test_loading_it_needs_no_torch() -> None:
    path = Path(shared_memory.__file__)
    module = load(path.read_bytes(), str(path), {"torch": ImportError("there is no torch")})
    assert module.read_gpu() == module.Gpu()
