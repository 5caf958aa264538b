"""What Prometheus reads. Counted in memory by the data plane; gauges are read when they are scraped."""

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from rotator.service.traffic import Traffic

WAIT_BUCKETS_S = (0.0, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
MODELS_MAX = 4096  # as many names as are told apart; a name is only counted after it was found, so this is a backstop


class Metrics:
    """One registry and everything in it."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "rotator_requests", "Requests by model and outcome", ("model", "outcome"), registry=self.registry
        )
        self._waits = Histogram(
            "rotator_wait_seconds",
            "How long requests waited for their model",
            ("model",),
            buckets=WAIT_BUCKETS_S,
            registry=self.registry,
        )
        self._fallbacks = Counter(
            "rotator_fallbacks", "Requests that went elsewhere", ("model", "to"), registry=self.registry
        )
        self._counted: dict[tuple[str, str], Callable[[float], None]] = {}
        self._observed: dict[str, Callable[[float], None]] = {}

    def request_ended(self, model: str, waited_s: float, outcome: str) -> None:
        """``outcome`` is ok, failed, client_left, aborted, refused or expired."""
        key = (model, outcome)
        if (count := self._counted.get(key)) is None:
            if len(self._counted) >= MODELS_MAX:
                self._counted.clear()
            count = self._counted[key] = self._requests.labels(model, outcome).inc
        count(1.0)
        if (observe := self._observed.get(model)) is None:
            if len(self._observed) >= MODELS_MAX:
                self._observed.clear()
            observe = self._observed[model] = self._waits.labels(model).observe
        observe(waited_s)

    def fell_back(self, model: str, to: str) -> None:
        self._fallbacks.labels(model, to).inc()

    def watch(self, traffic: Traffic) -> None:
        """Show who waits, is in flight and stands still, engine by engine."""
        self.registry.register(_TrafficGauges(traffic))


class _TrafficGauges(Collector):
    def __init__(self, traffic: Traffic) -> None:
        self._traffic = traffic

    def collect(self) -> Iterable[Metric]:
        engines = self._traffic.engines()
        for name, text, read in (
            ("rotator_queue", "Requests that wait for their model", self._traffic.waiting),
            ("rotator_in_flight", "Requests in flight", self._traffic.in_flight),
            ("rotator_frozen", "Streams that stand still", self._traffic.frozen),
        ):
            family = GaugeMetricFamily(name, text, labels=("engine",))
            for engine in engines:
                family.add_metric((engine,), read(engine))
            yield family
        freezes = CounterMetricFamily("rotator_freezes", "Streams that stood still through a sleep", labels=("engine",))
        for engine in engines:
            freezes.add_metric((engine,), self._traffic.freezes(engine))
        yield freezes
        stalls = CounterMetricFamily(
            "rotator_stall_seconds", "How long streams stood still, all freezes that are over", labels=("engine",)
        )
        for engine in engines:
            stalls.add_metric((engine,), self._traffic.stalled_s(engine))
        yield stalls
