"""What is read of engines and GPUs for the watchdog: counters, log warnings, secrets in text."""

from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from rotator.adapters.gpu_reports import NvmlReports
from rotator.adapters.redact import HIDDEN, redactor
from rotator.adapters.vllm_counters import read_counters
from rotator.core.gpu_faults import GpuHealth
from rotator.ports import DeviceError, EngineCounters, EngineUnreachable
from tests.unit.adapters.nvml_fake import FakeGpu, FakeNvml

PAGE = """
# HELP vllm:num_requests_running Number of requests in model execution batches.
vllm:num_requests_running{engine="0",model_name="m"} 2.0
vllm:num_requests_running{engine="1",model_name="m"} 1.0
vllm:generation_tokens_total{engine="0",model_name="m"} 12.0
vllm:generation_tokens_created{engine="0",model_name="m"} 1.7e9
vllm:iteration_tokens_total_bucket{engine="0",le="1.0"} 3.0
vllm:iteration_tokens_total_count{engine="0"} 10.0
vllm:kv_cache_usage_perc{engine="0"} 0.25
vllm:spec_decode_num_drafts_total{engine="0"} 5.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="1"} 1.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="0"} 3.0
python_gc_objects_collected_total{generation="0"} 7.0
"""


def test_counters_are_summed_over_an_engines_ranks_and_ordered_by_position() -> None:
    expected = EngineCounters(running=3, generated=12, steps=10, kv_share=0.25, drafts=5, accepted=(3.0, 1.0))
    assert read_counters(PAGE, "here") == expected


def test_an_engine_that_tells_nothing_is_one_that_does_not_move() -> None:
    assert read_counters("# nothing\n", "here") == EngineCounters()


@pytest.mark.parametrize("line", ["vllm:num_requests_running{engine=", "vllm:num_requests_running{} NaN"])
def test_a_page_that_cannot_be_read_is_an_error_of_ours(line: str) -> None:
    with pytest.raises(EngineUnreachable, match="here"):
        read_counters(line + "\n", "here")


@pytest.mark.parametrize(
    "secret",
    [
        "--api-key abcd1234efgh",
        '"password": "hunter2hunter2"',
        "HF_TOKEN=hf_abcdefghijklmnopqrst",
        "Authorization: Bearer abcd1234efgh5678",
        "https://user:s3cretword@host/path",
        "the value of-my-own-variable stands here",
        '["--port", "1", "--api-key",\n  "abcd1234efgh"]',
        "args: ['--api-key', 'abcd1234efgh']",
        "non-default args: {'api_key': ['abcd1234efgh', 'hunter2hunter2'], 'port': 8}",
        "Namespace(api_key=b'abcd1234efgh')",
        'VLLM_API_KEY="two words of hunter2hunter2"',
        '"line": "{\\"password\\": \\"hunter2hunter2\\"}"',
        "github_pat_11ABCDEFG0_hunter2hunter2",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJodW50ZXIyaHVudGVyMiJ9.hunter2hunter2",
    ],
)
def test_secrets_are_hidden_by_name_by_shape_and_by_value(secret: str) -> None:
    hide = redactor({"MY_SECRET": "of-my-own-variable", "HOME": "/home/somebody"})
    shown = hide(f"before {secret} after")
    assert HIDDEN in shown
    assert shown.startswith("before ")
    words = ("abcd1234efgh", "hunter2hunter2", "hf_abcdefgh", "s3cretword", "of-my-own-variable")
    assert not any(word in shown for word in words)


def test_a_secret_of_a_long_text_is_hidden_wherever_it_stands() -> None:
    hide = redactor({})
    for before in range(0, 40_000, 1000):
        text = "x" * before + '\n"--api-key",\n"abcd1234efgh"\n' + "a line\n" * 3000
        assert hide(text) == text.replace("abcd1234efgh", HIDDEN)


@pytest.mark.parametrize(
    "harmless",
    [
        "Avg generation throughput: 12.5 tokens/s",
        "max_tokens=512",
        "token 3 of 8",
        "KV cache usage: 3%",
        "stop tokens: [1, 2, 3]",
        "tokenizer='x/y', tokenizer_mode='auto'",
    ],
)
def test_what_only_sounds_like_a_secret_stays(harmless: str) -> None:
    assert redactor({})(harmless) == harmless


class ReportingNvml(FakeNvml):
    """With events, ECC counts and remapped rows as fields; ``None`` where the driver has no such query."""

    def __init__(self, gpu: FakeGpu) -> None:
        super().__init__(gpu)
        self.xids: list[int] | None = []
        self.ecc: int | None = 0
        self.rows: tuple[int, int, int, int] | None = (0, 0, 0, 0)
        self.event_sets = 0  # made and not freed
        self.registers = True

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("NVML_", "nvmlEventType")):
            return getattr(pynvml, name)
        return super().__getattr__(name)

    @staticmethod
    def _told(value: Any) -> Any:
        if value is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return value

    def nvmlEventSetCreate(self) -> object:  # noqa: N802 - NVML's names, here and below
        told = self._told(self.xids)
        self.event_sets += 1
        return told

    def nvmlEventSetFree(self, events: object) -> None:  # noqa: N802
        self.event_sets -= 1

    def nvmlDeviceRegisterEvents(self, gpu: FakeGpu, types: int, events: object) -> None:  # noqa: N802
        if not self.registers:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    def nvmlEventSetWait_v2(self, events: list[int], timeout_ms: int) -> Any:  # noqa: N802
        if not events:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_TIMEOUT)
        return SimpleNamespace(eventType=pynvml.nvmlEventTypeXidCriticalError, eventData=events.pop(0))

    def nvmlDeviceGetTotalEccErrors(self, gpu: FakeGpu, kind: int, counter: int) -> int:  # noqa: N802
        return int(self._told(self.ecc))

    def nvmlDeviceGetRemappedRows(self, gpu: FakeGpu) -> Any:  # noqa: N802
        return self._told(self.rows)

    def nvmlDeviceGetRetiredPagesPendingStatus(self, gpu: FakeGpu) -> Any:  # noqa: N802
        return self._told(None)


async def test_each_xid_is_reported_once_with_counts_and_rows() -> None:
    nvml = ReportingNvml(FakeGpu("GPU-a"))
    reports = NvmlReports(nvml)
    nvml.xids = events = [31, 79]
    nvml.ecc, nvml.rows = 4, (0, 1, 1, 1)
    first = await reports.health("GPU-a", deadline_s=5)
    assert first == GpuHealth("GPU-a", "", (31, 79), 4, remap_failed=True, remap_pending=True)
    assert (events, (await reports.health("GPU-a", deadline_s=5)).xids) == ([], ())


async def test_a_lost_gpu_is_a_report_and_any_other_failure_an_error() -> None:
    gpu = FakeGpu("GPU-a")
    reports = NvmlReports(ReportingNvml(gpu))
    gpu.memory_fails = pynvml.NVML_ERROR_GPU_IS_LOST
    assert "lost" in (await reports.health("GPU-a", deadline_s=5)).lost.lower()
    gpu.memory_fails = pynvml.NVML_ERROR_UNKNOWN
    with pytest.raises(DeviceError):
        await reports.health("GPU-a", deadline_s=5)
    gpu.memory_fails = None
    assert (await reports.health("GPU-a", deadline_s=5)).lost == ""


async def test_what_a_driver_does_not_tell_is_left_out() -> None:
    nvml = ReportingNvml(FakeGpu("GPU-a"))
    nvml.xids = nvml.ecc = nvml.rows = None
    assert await NvmlReports(nvml).health("GPU-a", deadline_s=5) == GpuHealth("GPU-a")


async def test_a_gpu_that_stays_lost_costs_no_event_set_a_look() -> None:
    gpu = FakeGpu("GPU-a")
    nvml = ReportingNvml(gpu)
    reports = NvmlReports(nvml)
    gpu.memory_fails = pynvml.NVML_ERROR_GPU_IS_LOST
    for _ in range(5):
        assert (await reports.health("GPU-a", deadline_s=5)).lost
    assert nvml.event_sets == 0
    gpu.memory_fails, nvml.registers = None, False
    assert (await reports.health("GPU-a", deadline_s=5)).lost == ""
    assert nvml.event_sets == 0, "a driver that registers none keeps none"
