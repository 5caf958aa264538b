"""Every metric of the service: name, type, labels, meaning. Nothing is exposed that does not stand here, and
``docs/metrics.md`` is made from it.

Labels take their values from the configuration (``model``: names and aliases, ``engine``, ``gpu``, ``node``) or from
words of the code, never from a request: the number of series is bounded by the fleet file.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

Kind = Literal["counter", "gauge", "histogram"]

WAIT_BUCKETS_S = (0.0, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
FIRST_TOKEN_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
TOKEN_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0)
PHASE_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 900.0, 1800.0)
LAG_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)


@dataclass(frozen=True, slots=True)
class Row:
    """``name`` is as it is scraped: counters end in ``_total``. ``buckets`` are a histogram's upper bounds."""

    name: str
    kind: Kind
    labels: tuple[str, ...]
    text: str
    buckets: tuple[float, ...] = ()


def _counter(name: str, labels: str, text: str) -> Row:
    return Row(name, "counter", tuple(labels.split()), text)


def _gauge(name: str, labels: str, text: str) -> Row:
    return Row(name, "gauge", tuple(labels.split()), text)


def _histogram(name: str, labels: str, text: str, buckets: tuple[float, ...]) -> Row:
    return Row(name, "histogram", tuple(labels.split()), text, buckets)


SECTIONS: tuple[tuple[str, tuple[Row, ...]], ...] = (
    (
        "Requests",
        (
            _counter(
                "rotator_requests_total",
                "model outcome",
                "Requests that ended, by outcome: ok, failed, client_left, aborted, refused, expired",
            ),
            _histogram("rotator_wait_seconds", "model", "How long requests waited for their model", WAIT_BUCKETS_S),
            _counter("rotator_fallbacks_total", "model to", "Requests that went elsewhere"),
            _counter("rotator_prompt_tokens_total", "model", "Prompt tokens, as answers tell them in their usage"),
            _counter(
                "rotator_completion_tokens_total",
                "model",
                "Generated tokens, as answers tell them in their usage; where a stream tells none, its events",
            ),
            _counter(
                "rotator_estimated_answers_total",
                "model",
                "Streams that told no usage, so that their events were counted for tokens",
            ),
            _histogram(
                "rotator_time_to_first_token_seconds",
                "model",
                "From a streaming request's arrival to its first event, waiting for its model included",
                FIRST_TOKEN_BUCKETS_S,
            ),
            _histogram(
                "rotator_time_per_output_token_seconds",
                "model",
                "Between a stream's tokens after the first, on average over the stream, without what it stood still",
                TOKEN_BUCKETS_S,
            ),
        ),
    ),
    (
        "Queues",
        (
            _gauge("rotator_queue_requests", "engine", "Requests that wait for the engine"),
            _gauge("rotator_queue_oldest_wait_seconds", "engine", "How long the first in line has waited"),
            _gauge("rotator_queue_wait_bound_seconds", "engine", "How long a request may wait before it is refused"),
            _gauge("rotator_in_flight_requests", "engine", "Requests in flight"),
            _gauge("rotator_frozen_requests", "engine", "Streams that stand still now"),
            _counter("rotator_freezes_total", "engine", "Streams that stood still through a sleep"),
            _counter("rotator_stall_seconds_total", "engine", "How long streams stood still, freezes that are over"),
        ),
    ),
    (
        "Swaps",
        (
            _counter(
                "rotator_swaps_total",
                "result",
                "Swaps that ended: ok, or unfinished (given up because nobody waited any more, or failed)",
            ),
            _gauge("rotator_swaps_active", "", "Swaps under way"),
            _histogram(
                "rotator_swap_phase_seconds",
                "phase",
                "What swaps took: drain, sleep, verify, wake, start, canary, and total",
                PHASE_BUCKETS_S,
            ),
        ),
    ),
    (
        "Engines",
        (
            _gauge("rotator_engine_state", "engine state", "1 for the state that it is in, 0 for the others"),
            _counter("rotator_engine_launches_total", "engine", "Starts that ended in a ready engine"),
            _counter("rotator_engine_wakes_total", "engine", "Wakes that ended past the canary"),
            _counter("rotator_engine_sleeps_total", "engine", "Sleeps whose bytes were seen to come back"),
            _counter(
                "rotator_engine_moved_bytes_total", "engine direction", "VRAM filled by wakes (in) or freed (out)"
            ),
            _counter("rotator_engine_moving_seconds_total", "engine direction", "What these wakes and sleeps took"),
            _gauge(
                "rotator_engine_last_move_bytes_per_second", "engine direction", "How fast the last wake or sleep was"
            ),
            _gauge("rotator_engine_awake_bytes", "engine gpu", "What it needs awake, measured or planned"),
            _gauge("rotator_engine_residue_bytes", "engine gpu", "What stays when it sleeps, measured or planned"),
            _gauge("rotator_engine_held_bytes", "engine gpu", "What it is charged with now"),
            _gauge("rotator_engine_host_bytes", "engine", "Host RAM that its masters take now"),
            _counter(
                "rotator_engine_canaries_total",
                "engine result",
                "Canaries: passed, failed, or recorded at a launch to compare with later",
            ),
            _gauge("rotator_engine_failures", "engine", "Failures in a row"),
            _gauge("rotator_engine_recent_faults", "engine", "Faults within the breaker's window"),
            _gauge("rotator_breaker_faults", "", "So many recent faults and an engine is quarantined"),
            _counter(
                "rotator_engine_metrics_failures_total",
                "engine reason",
                "Scrapes of engines' own metrics that came to nothing: unreachable, malformed, too_large, conflict",
            ),
        ),
    ),
    (
        "GPUs and host",
        (
            _gauge("rotator_gpu_info", "gpu uuid name node", "1; what a GPU is"),
            _gauge("rotator_gpu_health", "gpu health", "1 for what it is of ok, cordoned, unknown; 0 for the others"),
            _gauge("rotator_gpu_total_bytes", "gpu", "VRAM"),
            _gauge("rotator_gpu_used_bytes", "gpu", "VRAM in use, as the driver last told"),
            _gauge("rotator_gpu_foreign_bytes", "gpu", "VRAM held by processes that are none of ours"),
            _gauge("rotator_gpu_reserve_bytes", "gpu", "VRAM that no plan may use"),
            _gauge("rotator_gpu_ledger_bytes", "gpu", "What engines are charged with, and what is foreign"),
            _gauge("rotator_gpu_drift_bytes", "gpu", "In use less what the ledger says; 0 while a swap moves there"),
            _gauge("rotator_gpu_read_age_seconds", "gpu", "Since the driver last answered"),
            _gauge("rotator_host_masters_bytes", "node", "Host RAM that masters take; node is empty for this machine"),
            _gauge("rotator_host_budget_bytes", "node", "Host RAM that masters may take"),
        ),
    ),
    (
        "Truth and incidents",
        (
            _gauge(
                "rotator_ledger_differences", "", "Rows of the ledger that devices contradict, at the last comparison"
            ),
            _gauge("rotator_ledger_checked_timestamp_seconds", "", "When ledger and devices were last compared"),
            _gauge("rotator_ledger_healthy", "", "1 while the ledger takes writes; else no transition starts"),
            _gauge("rotator_journal_owed", "", "Outcomes of transitions that wait to be written"),
            _gauge("rotator_journal_lag_seconds", "", "How long the oldest of them has waited"),
            _gauge("rotator_incidents_open", "kind", "Incidents that are open"),
            _counter("rotator_incidents_total", "kind", "Incidents opened since the service started"),
        ),
    ),
    (
        "The service itself",
        (
            _gauge("rotator_build_info", "version", "1; what runs"),
            _gauge("rotator_ready", "", "1 once it knows which engines run and while it is not shutting down"),
            _counter("rotator_decision_errors_total", "", "Decisions that failed by an internal error"),
            _histogram("rotator_event_loop_lag_seconds", "", "How late a timer of the event loop fired", LAG_BUCKETS_S),
            _counter("rotator_events_missed_total", "", "Events that came too fast to be counted here"),
            _counter("rotator_spans_total", "result", "Spans of traces: exported, failed, dropped"),
        ),
    ),
)
ROWS: dict[str, Row] = {row.name: row for _, rows in SECTIONS for row in rows}

# Beside the engines' own, under /metrics/engines.
ENGINE_ROWS: dict[str, Row] = {
    row.name: row
    for row in (
        _gauge("rotator_engine_metrics_age_seconds", "model", "Since the engine told what is shown of it"),
        _gauge("rotator_engine_metrics_samples", "model", "Samples that are shown of it"),
    )
}


def counter(name: str, registry: CollectorRegistry) -> Counter:
    row = ROWS[name]
    return Counter(row.name, row.text, row.labels, registry=registry)


def histogram(name: str, registry: CollectorRegistry) -> Histogram:
    row = ROWS[name]
    return Histogram(row.name, row.text, row.labels, buckets=row.buckets, registry=registry)


class Families:
    """What one collection found: ``add(name, value, *labels)``, then ``all()``. Metrics that were not asked for by
    ``names`` are a mistake; those without a sample are shown with their help all the same."""

    def __init__(self, names: Iterable[str], rows: dict[str, Row] = ROWS) -> None:
        self._families = {name: _family(rows[name]) for name in names}

    def add(self, name: str, value: float, *labels: str) -> None:
        self._families[name].add_metric(labels, value)

    def all(self) -> Iterable[Metric]:
        return self._families.values()


def _family(row: Row) -> CounterMetricFamily | GaugeMetricFamily:
    make = CounterMetricFamily if row.kind == "counter" else GaugeMetricFamily
    return make(row.name, row.text, labels=row.labels)
