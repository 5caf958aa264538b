"""A fleet that has lived a little, and what it exposes then."""

import asyncio
from collections.abc import Iterator

from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from rotator.service.measuring import measure
from rotator.service.metrics import Metrics
from tests.fakes import Service

PAIR = {"a": ((0, 1), 60.0), "b": ((0, 1), 70.0)}


def scrape(metrics: Metrics) -> str:
    return generate_latest(metrics.registry).decode()


def samples(text: str) -> Iterator[Sample]:
    for family in text_string_to_metric_families(text):
        yield from family.samples


def value(metrics: Metrics, metric: str, /, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(metric, labels)


class Measured:
    """``async with``: the service's own metrics over its loop, as the composition root wires them."""

    def __init__(self, service: Service) -> None:
        self.service, self.metrics = service, Metrics()

    async def __aenter__(self) -> Metrics:
        self.metrics.watch(self.service.traffic)
        self._task = asyncio.create_task(measure(self.service.loop, self.metrics, lambda: 0.0))
        await asyncio.sleep(0)
        return self.metrics

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


async def lived(service: Service, metrics: Metrics) -> None:
    """A start, a swap there and back, an incident: every metric has a sample after it."""
    for name in ("a", "b", "a"):
        waited_s = await service.ask(name)
        metrics.request_ended(name, waited_s, "ok")
    metrics.answered("a", 10, 20, estimated=True, first_s=0.5, per_token_s=0.01)
    metrics.fell_back("a", "b")
    metrics.scrape_failed("a", "malformed")
    await service.loop.do(lambda: service.loop.incidents.open("crashed", "it died", engine="a"))
    await asyncio.sleep(200.0)
