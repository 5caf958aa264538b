"""The engines' own metrics on one page: labelled, cached, bounded, and nobody woken for them."""

import asyncio

import pytest
from prometheus_client.parser import text_string_to_metric_families

from rotator.core.values import Command, CommandKind, State
from rotator.ports import EngineUnreachable
from rotator.service import federation
from rotator.service.federation import Federation, Page, Unreadable, read_page
from rotator.service.metrics import Metrics
from rotator.sim.clock import run
from tests.fakes import FakeControl, Service, make_box, make_service
from tests.unit.metrics.exposed import PAIR, value

TEXT = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="weird \\"name\\""} 3.0
# HELP vllm:prompt_tokens_total Number of prefill tokens processed.
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{engine="0"} 1234.0
# HELP vllm:e2e_request_latency_seconds Histogram
# TYPE vllm:e2e_request_latency_seconds histogram
vllm:e2e_request_latency_seconds_bucket{le="1.0"} 2.0
vllm:e2e_request_latency_seconds_bucket{le="+Inf"} 3.0
vllm:e2e_request_latency_seconds_count 3.0
vllm:e2e_request_latency_seconds_sum 4.5
"""


class Told(FakeControl):
    """Answers with the texts that a test sets, and counts who was asked."""

    def __init__(self, service: Service) -> None:
        super().__init__(service.box)
        self.texts: dict[str, str] = {}
        self.asked: list[str] = []
        self.silent: set[str] = set()

    async def metrics(self, url: str, *, deadline_s: float) -> str:
        name = url.rpartition("/")[2]
        self.asked.append(name)
        if name in self.silent:
            await asyncio.sleep(1000.0)
        if name not in self.texts:
            raise EngineUnreachable("no")
        return self.texts[name]


def federated(service: Service) -> tuple[Federation, Told, Metrics]:
    control, metrics = Told(service), Metrics()
    return Federation(service.loop, control, metrics), control, metrics


def read(text: bytes, name: str, **labels: str) -> float | None:
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            if sample.name == name and labels.items() <= sample.labels.items():
                return sample.value
    return None


SIDE_BY_SIDE = {"a": ((0,), 60.0), "b": ((1,), 60.0)}


def test_samples_of_all_engines_stand_under_one_head_each_with_its_model() -> None:
    async def story() -> None:
        async with make_service(make_box(**SIDE_BY_SIDE)) as service:
            await asyncio.gather(service.ask("a"), service.ask("b"))
            page, control, _ = federated(service)
            control.texts = {"a": TEXT, "b": TEXT.replace("1234", "99")}
            text = await page.text()
            assert text.count(b"# TYPE vllm:prompt_tokens_total counter") == 1
            assert read(text, "vllm:prompt_tokens_total", model="a", engine="0") == 1234
            assert read(text, "vllm:prompt_tokens_total", model="b") == 99
            assert read(text, "vllm:num_requests_running", model="a", model_name='weird "name"') == 3
            assert read(text, "vllm:e2e_request_latency_seconds_bucket", model="b", le="+Inf") == 3
            assert read(text, "rotator_engine_metrics_samples", model="a") == 6

    run(story())


def test_a_sleeping_engine_is_not_asked_and_shows_what_it_last_told_with_its_age() -> None:
    async def story() -> None:
        async with make_service(make_box(**PAIR)) as service:
            await service.ask("a")
            page, control, _ = federated(service)
            control.texts = {"a": TEXT, "b": TEXT}
            await page.text()
            await service.ask("b")
            assert service.state("a") is State.ASLEEP
            control.asked.clear()
            used = service.traffic.last_used_s("a")
            await asyncio.sleep(60.0)
            text = await page.text()
            assert control.asked == ["b"]
            assert read(text, "vllm:prompt_tokens_total", model="a") == 1234
            assert (read(text, "rotator_engine_metrics_age_seconds", model="a") or 0) >= 60
            assert (read(text, "rotator_engine_metrics_age_seconds", model="b") or 0) < 1
            assert service.traffic.last_used_s("a") == used
            assert service.state("a") is State.ASLEEP

    run(story())


def test_an_engine_that_was_stopped_is_not_shown_any_more() -> None:
    async def story() -> None:
        async with make_service(make_box(**PAIR)) as service:
            await service.ask("a")
            page, control, _ = federated(service)
            control.texts = {"a": TEXT}
            assert b'model="a"' in await page.text()
            await service.operator.command(Command(CommandKind.STOP, "a"), wait=True, deadline_s=100.0)
            await asyncio.sleep(10.0)
            assert b'model="a"' not in await page.text()

    run(story())


def test_however_many_scrape_an_engine_is_asked_once_in_a_while() -> None:
    async def story() -> None:
        async with make_service(make_box(**PAIR)) as service:
            await service.ask("a")
            page, control, _ = federated(service)
            control.texts = {"a": TEXT}
            await asyncio.gather(*(page.text() for _ in range(20)))
            assert control.asked == ["a"]
            await asyncio.sleep(federation.EVERY_S)
            await page.text()
            assert control.asked == ["a", "a"]

    run(story())


def test_one_that_hangs_or_talks_nonsense_is_counted_and_hides_no_other() -> None:
    async def story() -> None:
        three = {**SIDE_BY_SIDE, "c": ((2,), 60.0)}
        async with make_service(make_box(**three)) as service:
            await asyncio.gather(*(service.ask(name) for name in three))
            page, control, metrics = federated(service)
            control.texts = {"a": TEXT, "b": "vllm:broken{label= 1\n"}
            control.silent = {"c"}
            began = service.loop.now_s()
            text = await page.text()
            assert service.loop.now_s() - began <= federation.DEADLINE_S + 0.1
            assert read(text, "vllm:prompt_tokens_total", model="a") == 1234
            assert value(metrics, "rotator_engine_metrics_failures_total", engine="b", reason="malformed") == 1
            assert value(metrics, "rotator_engine_metrics_failures_total", engine="c", reason="unreachable") == 1

    run(story())


def test_one_that_tells_another_type_of_a_metric_is_left_out_of_it() -> None:
    async def story() -> None:
        async with make_service(make_box(**SIDE_BY_SIDE)) as service:
            await asyncio.gather(service.ask("a"), service.ask("b"))
            page, control, metrics = federated(service)
            control.texts = {"a": "# TYPE x gauge\nx 1\n", "b": "# TYPE x untyped\nx 2\n# TYPE y gauge\ny 2\n"}
            text = await page.text()
            assert (read(text, "x", model="a"), read(text, "x", model="b"), read(text, "y", model="b")) == (1, None, 2)
            assert value(metrics, "rotator_engine_metrics_failures_total", engine="b", reason="conflict") == 1

    run(story())


async def test_an_engines_own_model_label_is_kept_under_another_name() -> None:
    page = Page(0.0, 1)
    await read_page(page, "mine", '# TYPE x gauge\nx{model="its"} 1\n')
    assert page.samples["x"] == ['x{exported_model="its",model="mine"} 1.0\n']


async def test_a_long_family_comes_whole_through_many_slices() -> None:
    text = "# HELP x many\n# TYPE x gauge\n" + "".join(f'x{{i="{i}"}} {i}\n' for i in range(1000)) + "# TYPE y gauge\n"
    page = Page(0.0, 1)
    await read_page(page, "m", text)
    assert page.count == len(page.samples["x"]) == 1000
    assert list(page.heads) == ["x"]


@pytest.mark.parametrize(
    "text", ["# " + "x" * federation.PAGE_BYTES_MAX, "".join(f"x{i} 1\n" for i in range(federation.SAMPLES_MAX + 41))]
)
async def test_a_page_beyond_all_bounds_is_not_shown(text: str) -> None:
    with pytest.raises(Unreadable, match=r"bytes|samples") as caught:
        await read_page(Page(0.0, 1), "m", text)
    assert caught.value.reason == "too_large"
