"""The metrics' reference, from the table that the registry is made of."""

from collections.abc import Iterable, Iterator

from rotator.service.federation import DEADLINE_S, EVERY_S
from rotator.service.measuring import COMPARE_EVERY_S
from rotator.service.metric_table import ENGINE_ROWS, SECTIONS, Row

_HEAD = """\
# Metrics

Made from the registry's own table by `rotator schema --metrics`; do not edit it by hand.

`GET /metrics` has what the service knows, `GET /metrics/engines` what its engines tell of themselves. Both need a
key of scope `infer` where keys are configured. To scrape them:

```yaml
scrape_configs:
  - job_name: rotator
    static_configs: [{targets: ["127.0.0.1:8400"]}]
  - job_name: rotator-engines
    metrics_path: /metrics/engines
    static_configs: [{targets: ["127.0.0.1:8400"]}]
```

With keys, add `authorization: {credentials_file: ...}` to both. `deploy/grafana/rotator.json` is a dashboard to
import, with a variable for the data source; `deploy/prometheus/alerts.yaml` has rules for `rule_files`.

`model` is a name that clients ask for (engines' names and aliases), `engine` an engine's own; `gpu` is what the
fleet file calls it: an index, on another node after its name (`gpu2/0`); `rotator_gpu_info` has its UUID. All
values come from the fleet file, none from a request. Sizes are bytes, times are seconds. Histograms have `_bucket`,
`_sum` and `_count`.
"""
_ENGINES = f"""\
## `/metrics/engines`

Everything that an engine's own `/metrics` has, each sample with the label `model` (one that an engine sets itself
becomes `exported_model`). An engine is asked when somebody scrapes, no more often than every {EVERY_S:g} s and for
{DEADLINE_S:g} s at most, while it is awake or drains. That wakes nobody and counts as no use: engines fall asleep
as if nobody had looked.

An engine that sleeps is shown as it last was: its process lives, its counters stand where they stood, so `rate()`
over a sleep tells the truth; how old its samples are stands beside them. One that stopped is not shown: its
counters are gone. A page that cannot be parsed, or is too large, is left out and counted in
`rotator_engine_metrics_failures_total`.
"""
_TAIL = f"""\
## What the figures mean

- **Drift.** `rotator_gpu_drift_bytes` is taken at each scrape from the last reading; `rotator_ledger_differences`
  compares the ledger's rows with the devices every {COMPARE_EVERY_S:g} s while no swap is under way. Both should be
  near 0: a CUDA context grows by some MiB while an engine serves.
- **GiB/s of wakes**: `rate(rotator_engine_moved_bytes_total{{direction="in"}}[1h]) /
  rate(rotator_engine_moving_seconds_total{{direction="in"}}[1h]) / 2^30`.
- **Tokens** are those that answers tell in `usage`. Streams tell them only where the client asks (`stream_options:
  {{"include_usage": true}}`); for others their events are counted, one token each, and
  `rotator_estimated_answers_total` says how many answers that was.
- **Time to first token** begins with the request's arrival here, so it contains the wait for the model; what
  engines tell of it (`vllm:time_to_first_token_seconds`) does not.
- Beside these stand `process_*` of the service's own process, from prometheus_client.

## Traces and logs

`telemetry` in the fleet file sends traces by OTLP over HTTP ([configuration](configuration.md)). A request's trace
has its wait for the model and its way through the engine, which gets a `traceparent` of its own, so that vLLM's
spans (`--otlp-traces-endpoint`) hang below; a client's `traceparent` is honoured. A swap is a trace of its own,
with a span for each phase; the waits that it served point to it. Spans that cannot be sent are dropped and counted,
and nothing waits for them.

`log: {{format: json}}` makes each line of the service's log one JSON object: `time`, `level`, `logger`, `message`,
`error` with its traceback, and `request_id`, `trace_id`, `engine`, `swap` where they are known. Keys, tokens and
passwords are hidden in both formats.
"""


def markdown() -> str:
    lines = [_HEAD]
    for title, rows in SECTIONS:
        lines += [f"## {title}", "", *_table(rows), ""]
    return "\n".join([*lines, _ENGINES, *_table(ENGINE_ROWS.values()), "", _TAIL.rstrip("\n")]) + "\n"


def _table(rows: Iterable[Row]) -> Iterator[str]:
    yield "| metric | type | labels | meaning |"
    yield "|---|---|---|---|"
    for row in rows:
        labels = ", ".join(f"`{label}`" for label in row.labels)
        yield f"| `{row.name}` | {row.kind} | {labels} | {row.text} |"
