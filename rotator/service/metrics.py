"""What Prometheus reads. Counted in memory by the data plane; gauges are read when they are scraped."""

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from rotator.service.metric_table import Families, counter, histogram
from rotator.service.traffic import Traffic

MODELS_MAX = 4096  # as many names as are told apart; a name is only counted after it was found, so this is a backstop


class _Model:
    """One model's own children of the families: a request pays no look-up by labels."""

    __slots__ = ("first", "outcomes", "per_token", "wait")

    def __init__(self, metrics: "Metrics", model: str) -> None:
        self.outcomes = {o: metrics.requests.labels(model, o).inc for o in ("ok", "failed", "client_left")}
        self.wait = metrics.waits.labels(model).observe
        self.first = metrics.first_token.labels(model).observe
        self.per_token = metrics.per_token.labels(model).observe


class Metrics:
    """One registry and everything in it."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = counter("rotator_requests_total", registry)
        self.waits = histogram("rotator_wait_seconds", registry)
        self.tokens: dict[str, list[int]] = {}  # by model: of prompts, completions; answers that were estimated
        registry.register(_Tokens(self.tokens))
        self.first_token = histogram("rotator_time_to_first_token_seconds", registry)
        self.per_token = histogram("rotator_time_per_output_token_seconds", registry)
        self._fallbacks = counter("rotator_fallbacks_total", registry)
        self._swaps = counter("rotator_swaps_total", registry)
        self._phases = histogram("rotator_swap_phase_seconds", registry)
        self._incidents = counter("rotator_incidents_total", registry)
        self._missed = counter("rotator_events_missed_total", registry)
        self._lag = histogram("rotator_event_loop_lag_seconds", registry)
        self._scrapes = counter("rotator_engine_metrics_failures_total", registry)
        self._models: dict[str, _Model] = {}

    # -- the data plane ----------------------------------------------------------------------------------------------

    def request_ended(self, model: str, waited_s: float, outcome: str) -> None:
        """``outcome`` is ok, failed, client_left, aborted, refused or expired."""
        mine = self._of(model)
        count = mine.outcomes.get(outcome)
        if count is None:
            count = mine.outcomes[outcome] = self.requests.labels(model, outcome).inc
        count()
        mine.wait(waited_s)

    def answered(
        self,
        model: str,
        prompt: int,
        completion: int,
        *,
        estimated: bool = False,
        first_s: float | None = None,
        per_token_s: float | None = None,
    ) -> None:
        """What an answer told of its tokens; seconds only of streams."""
        tokens = self.tokens.get(model)
        if tokens is None:
            tokens = self.tokens[model] = [0, 0, 0]
        tokens[0] += prompt
        tokens[1] += completion
        tokens[2] += estimated
        if first_s is not None:
            self._of(model).first(first_s)
        if per_token_s is not None:
            self._of(model).per_token(per_token_s)

    def fell_back(self, model: str, to: str) -> None:
        self._fallbacks.labels(model, to).inc()

    def _of(self, model: str) -> _Model:
        found = self._models.get(model)
        if found is None:
            if len(self._models) >= MODELS_MAX:
                self._models.clear()
            found = self._models[model] = _Model(self, model)
        return found

    # -- what happens beside it --------------------------------------------------------------------------------------

    def swap_ended(self, phases_s: Mapping[str, float], unfinished: bool) -> None:
        self._swaps.labels("unfinished" if unfinished else "ok").inc()
        for phase, seconds in phases_s.items():
            self._phases.labels(phase).observe(seconds)

    def incident_opened(self, kind: str) -> None:
        self._incidents.labels(kind).inc()

    def events_missed(self, count: int) -> None:
        self._missed.inc(count)

    def lagged(self, seconds: float) -> None:
        self._lag.observe(seconds)

    def scrape_failed(self, engine: str, reason: str) -> None:
        self._scrapes.labels(engine, reason).inc()

    def watch(self, traffic: Traffic) -> None:
        """Show who waits, is in flight and stands still, engine by engine."""
        self.registry.register(_TrafficGauges(traffic))

    def watch_spans(self, counts: Callable[[], Mapping[str, int]]) -> None:
        """Show what became of the spans of traces, by result."""
        self.registry.register(_SpanCounts(counts))


class _Tokens(Collector):
    """Plain numbers: every answer adds to them, and only the loop's thread does."""

    _NAMES = ("rotator_prompt_tokens_total", "rotator_completion_tokens_total", "rotator_estimated_answers_total")

    def __init__(self, tokens: Mapping[str, list[int]]) -> None:
        self._tokens = tokens

    def collect(self) -> Iterable[Metric]:
        families = Families(self._NAMES)
        for model, counts in self._tokens.items():
            for name, count in zip(self._NAMES, counts, strict=True):
                families.add(name, count, model)
        return families.all()


class _SpanCounts(Collector):
    def __init__(self, counts: Callable[[], Mapping[str, int]]) -> None:
        self._counts = counts

    def collect(self) -> Iterable[Metric]:
        families = Families(("rotator_spans_total",))
        for result, count in self._counts().items():
            families.add("rotator_spans_total", count, result)
        return families.all()


class _TrafficGauges(Collector):
    def __init__(self, traffic: Traffic) -> None:
        self._traffic = traffic

    def collect(self) -> Iterable[Metric]:
        traffic = self._traffic
        read = {
            "rotator_queue_requests": traffic.waiting,
            "rotator_queue_oldest_wait_seconds": traffic.oldest_wait_s,
            "rotator_queue_wait_bound_seconds": traffic.wait_bound_s,
            "rotator_in_flight_requests": traffic.in_flight,
            "rotator_frozen_requests": traffic.frozen,
            "rotator_freezes_total": traffic.freezes,
            "rotator_stall_seconds_total": traffic.stalled_s,
        }
        families = Families(read)
        for engine in traffic.engines():
            for name, value in read.items():
                families.add(name, value(engine), engine)
        return families.all()
