"""Spans by OpenTelemetry's SDK, sent by OTLP over HTTP from a thread of its own.

What cannot be sent is dropped and counted: a collector that is slow, down or full costs no request anything.
"""

import asyncio
import logging
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased, Sampler, SamplingResult, TraceIdRatioBased
from opentelemetry.trace import Link, NonRecordingSpan, SpanContext, Status, StatusCode, TraceFlags
from opentelemetry.util.re import parse_env_headers

from rotator import __version__
from rotator.config_telemetry import TelemetryConfig
from rotator.ports_telemetry import Attribute, Span, SpanKind

_log = logging.getLogger(__name__)
QUEUE_MAX = 2048  # spans that wait to be sent; later ones are dropped
EXPORT_S = 5.0  # for one batch
CLOSE_S = 3.0  # for what is left at the end of the service
_PARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?")
_KINDS = {"server": trace.SpanKind.SERVER, "client": trace.SpanKind.CLIENT, "internal": trace.SpanKind.INTERNAL}
_NS = 1_000_000_000


def open_telemetry(
    config: TelemetryConfig, environ: Mapping[str, str], exporter: SpanExporter | None = None
) -> "OtelTracer | None":
    """None where no endpoint is configured: then nothing of this costs anything. ``exporter`` takes OTLP's place."""
    if config.otlp_endpoint is None:
        return None
    headers = parse_env_headers(environ.get(config.headers_env, ""), liberal=True) if config.headers_env else {}
    if config.headers_env and not headers:
        _log.error("telemetry: %s holds no header: it must be name=value,name=value", config.headers_env)
    if exporter is None:
        # The SDK's own complaints come once a batch, from a thread; what matters of them is told below.
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
        url = _traces_url(str(config.otlp_endpoint))
        exporter = OTLPSpanExporter(endpoint=url, headers=headers, timeout=EXPORT_S, compression=Compression.Gzip)
    return OtelTracer(config, exporter)


def _traces_url(endpoint: str) -> str:
    base = endpoint.rstrip("/")
    return base if base.endswith("/v1/traces") else f"{base}/v1/traces"


class OtelTracer:
    """Implements the Tracer port; ``counts`` tells what became of spans."""

    def __init__(self, config: TelemetryConfig, exporter: SpanExporter) -> None:
        self._counting = _Counting(exporter)
        self._queue = _Bounded(self._counting)
        resource = Resource.create({"service.name": config.service_name, "service.version": __version__})
        self._provider = TracerProvider(
            sampler=_Sampler(config.sample_ratio), resource=resource, shutdown_on_exit=False
        )
        self._provider.add_span_processor(self._queue)
        self._tracer = self._provider.get_tracer("rotator", __version__)

    def begin(
        self,
        name: str,
        *,
        kind: SpanKind = "internal",
        parent: str = "",
        at_wall_s: float | None = None,
        attributes: Mapping[str, Attribute] | None = None,
    ) -> Span:
        above = _context(parent)
        context = trace.set_span_in_context(NonRecordingSpan(above), Context()) if above else Context()
        span = self._tracer.start_span(name, context, _KINDS[kind], dict(attributes or {}), start_time=_ns(at_wall_s))
        return _Span(span)

    @property
    def counts(self) -> Mapping[str, int]:
        return {"exported": self._counting.exported, "failed": self._counting.failed, "dropped": self._queue.dropped}

    async def close(self) -> None:
        """Send what is left, within CLOSE_S; the rest is lost. The thread that sends is a daemon: nothing waits for
        it."""
        done = asyncio.Event()
        loop = asyncio.get_running_loop()

        def work() -> None:
            self._provider.shutdown()
            loop.call_soon_threadsafe(done.set)

        threading.Thread(target=_quietly(work), name="telemetry-close", daemon=True).start()
        try:
            async with asyncio.timeout(CLOSE_S):
                await done.wait()
        except TimeoutError:
            _log.warning("telemetry: what was left of traces could not be sent within %g s", CLOSE_S)


class _Span:
    __slots__ = ("_context", "_span")

    def __init__(self, span: trace.Span) -> None:
        self._span = span
        self._context = span.get_span_context()

    @property
    def traceparent(self) -> str:
        context = self._context
        return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"

    @property
    def trace_id(self) -> str:
        return f"{self._context.trace_id:032x}"

    def set(self, name: str, value: Attribute) -> None:
        self._span.set_attribute(name, value)

    def link(self, traceparent: str) -> None:
        if (context := _context(traceparent)) is not None:
            self._span.add_link(context)

    def end(self, error: str = "", *, at_wall_s: float | None = None) -> None:
        if error and self._span.is_recording():
            self._span.set_status(Status(StatusCode.ERROR, error))
        if self._span.is_recording():
            self._span.end(_ns(at_wall_s))


class _Sampler(Sampler):
    """A client's decision holds; where there is none, a share of requests, and every swap: they are few, and the
    requests that they serve point to them."""

    def __init__(self, ratio: float) -> None:
        self._requests = ParentBased(TraceIdRatioBased(ratio))
        self._swaps = ParentBased(ALWAYS_ON)

    def should_sample(
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: trace.SpanKind | None = None,
        attributes: Any = None,
        links: Sequence[Link] | None = None,
        trace_state: trace.TraceState | None = None,
    ) -> SamplingResult:
        sampler = self._swaps if name == "swap" else self._requests
        return sampler.should_sample(parent_context, trace_id, name, kind, attributes, links, trace_state)

    def get_description(self) -> str:
        return "every swap, and a share of requests unless their client decided"


class _Bounded(BatchSpanProcessor):
    """The SDK's queue drops its oldest with a warning each; this one takes no more than it holds, and counts."""

    def __init__(self, exporter: "_Counting") -> None:
        super().__init__(exporter, max_queue_size=QUEUE_MAX)
        self._exporter = exporter
        self._taken = 0
        self.dropped = 0

    def on_end(self, span: ReadableSpan) -> None:
        if not span.context.trace_flags.sampled:
            return
        if self._taken - self._exporter.seen >= QUEUE_MAX:
            self.dropped += 1
            return
        self._taken += 1
        super().on_end(span)


class _Counting(SpanExporter):
    """Tells once that spans cannot be sent, and once that they can again. Called by the SDK's thread alone."""

    def __init__(self, inner: SpanExporter) -> None:
        self._inner = inner
        self._failing = False
        self.seen = 0
        self.exported = 0
        self.failed = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.seen += len(spans)
        try:
            result = self._inner.export(spans)
        except Exception as e:  # whatever it is, it must not end the thread
            _log.debug("telemetry: %r", e)
            result = SpanExportResult.FAILURE
        failed = result is not SpanExportResult.SUCCESS
        if failed:
            self.failed += len(spans)
        else:
            self.exported += len(spans)
        if failed != self._failing:
            self._failing = failed
            _log.warning("telemetry: traces %s", "cannot be sent: they are dropped" if failed else "are sent again")
        return result

    def shutdown(self) -> None:
        self._inner.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return self._inner.force_flush(timeout_millis)


def _context(traceparent: str) -> SpanContext | None:
    """None for what is no traceparent (W3C Trace Context, level 1)."""
    found = _PARENT.fullmatch(traceparent)
    if found is None or traceparent.startswith("ff"):
        return None
    trace_id, span_id, flags = (int(part, 16) for part in found.groups())
    context = SpanContext(trace_id, span_id, is_remote=True, trace_flags=TraceFlags(flags & 1))
    return context if context.is_valid else None


def _ns(wall_s: float | None) -> int | None:
    return None if wall_s is None else int(wall_s * _NS)


def _quietly(work: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        try:
            work()
        except Exception as e:  # the event loop may be gone when it ends at last
            _log.debug("telemetry: %r", e)

    return run
