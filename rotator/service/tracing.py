"""The spans of a request and of a swap, and how they hang together.

    request (server) ── wait ── engine (client)          swap ── drain, sleep, verify, start, wake, canary
                         └┄┄┄┄┄┄┄┄┄┄┄ link ┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┘

A swap is a trace of its own, for it serves many requests: the wait of each points to it. Without a tracer nothing of
this is made, and a client's own ``traceparent`` goes on to the engine as it came.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

from rotator.ports_telemetry import Span, Tracer
from rotator.service.events import Event, EventBus
from rotator.service.responses import Header

OPEN_MAX = 256  # swaps under way that are remembered; there are as many as disjoint sets of GPUs
_TRACEPARENT = b"traceparent"


class Traces:
    """Makes requests' spans, and follows swaps by what is published of them."""

    def __init__(self, tracer: Tracer, wall: Callable[[], float] = time.time) -> None:
        self.tracer = tracer
        self._wall = wall
        self._swaps: dict[str, tuple[Span, float]] = {}
        self._latest: dict[str, tuple[str, float]] = {}  # by engine: traceparent, when it ended (or inf)

    def begin(self, method: str, path: str, headers: list[Header]) -> "RequestTrace":
        parent = next((v.decode("latin-1") for n, v in headers if n == _TRACEPARENT), "")
        attributes = {"http.request.method": method, "url.path": path}
        span = self.tracer.begin(f"{method} {path}", kind="server", parent=parent, attributes=attributes)
        return RequestTrace(self, span)

    def serving(self, engine: str, since_wall_s: float) -> str:
        """The swap that brought the engine in since then, or still does; empty where none did."""
        traceparent, ended_wall_s = self._latest.get(engine, ("", 0.0))
        return traceparent if ended_wall_s >= since_wall_s else ""

    def now(self) -> float:
        return self._wall()

    # -- swaps -------------------------------------------------------------------------------------------------------

    async def follow(self, bus: EventBus) -> None:
        """For ever."""
        async for event in bus.follow():
            self.heard(event)

    def heard(self, event: Event) -> None:
        if event.kind == "swap.begun":
            self._begun(event)
        elif event.kind == "swap.ended":
            self._ended(event)

    def _begun(self, event: Event) -> None:
        plan: Mapping[str, Any] = event.data["plan"]
        attributes = {
            "rotator.swap": event.data["id"],
            "rotator.reason": plan["reason"],
            "rotator.engine": event.engine or "",
            "rotator.evicted": ", ".join(step["engine"] for step in plan["evict"]),
        }
        span = self.tracer.begin("swap", at_wall_s=event.at_wall_s, attributes=attributes)
        if len(self._swaps) >= OPEN_MAX:  # their ends were missed
            self._swaps.clear()
        self._swaps[event.data["id"]] = (span, event.at_wall_s)
        if event.engine is not None:
            self._latest[event.engine] = (span.traceparent, float("inf"))

    def _ended(self, event: Event) -> None:
        begun = self._swaps.pop(event.data["id"], None)
        if begun is None:
            return
        span, begun_wall_s = begun
        for row in event.data["timeline"]:
            at_s = begun_wall_s + row["at_s"]
            attributes = {"rotator.engine": row["engine"]}
            phase = self.tracer.begin(row["phase"], parent=span.traceparent, at_wall_s=at_s, attributes=attributes)
            phase.end(at_wall_s=at_s + row["seconds"])
        span.end(event.data["error"] or "", at_wall_s=event.at_wall_s)
        if event.engine is not None:
            self._latest[event.engine] = (span.traceparent, event.at_wall_s)


class RequestTrace:
    """One request's spans: its own, and of what it waits for now."""

    __slots__ = ("_engine", "_since_wall_s", "_span", "_step", "_traces")

    def __init__(self, traces: Traces, span: Span) -> None:
        self._traces = traces
        self._span = span
        self._step: Span | None = None
        self._engine = ""
        self._since_wall_s = 0.0

    @property
    def trace_id(self) -> str:
        return self._span.trace_id

    def waits(self, engine: str) -> None:
        self._engine, self._since_wall_s = engine, self._traces.now()
        attributes = {"rotator.engine": engine}
        self._begin_step("wait", attributes)

    def admitted(self) -> None:
        if self._step is not None and (swap := self._traces.serving(self._engine, self._since_wall_s)):
            self._step.link(swap)
        self._end_step("")

    def sends(self, engine: str, model: str, request_id: str, headers: list[Header]) -> list[Header]:
        """The headers to send on: the engine's spans become children of ours."""
        span = self._span
        span.set("rotator.request_id", request_id)
        span.set("gen_ai.request.model", model)
        step = self._begin_step("engine", {"rotator.engine": engine, "server.address": engine}, client=True)
        kept = [header for header in headers if header[0] != _TRACEPARENT]
        return [*kept, (_TRACEPARENT, step.traceparent.encode())]

    def answered(self, outcome: str) -> None:
        self._span.set("rotator.outcome", outcome)
        self._end_step("" if outcome == "ok" else outcome)

    def end(self, status: int) -> None:
        """The request is over. ``status`` is 0 where its client left before an answer began."""
        self._end_step("it came to nothing")
        if status:
            self._span.set("http.response.status_code", status)
        self._span.end("" if status < 500 else f"HTTP {status}")

    def _begin_step(self, name: str, attributes: Mapping[str, str], *, client: bool = False) -> Span:
        self._end_step("")
        kind: Any = "client" if client else "internal"
        self._step = self._traces.tracer.begin(name, kind=kind, parent=self._span.traceparent, attributes=attributes)
        return self._step

    def _end_step(self, error: str) -> None:
        if self._step is not None:
            self._step.end(error)
            self._step = None
