"""Traces and logs, typed."""

from typing import Literal

from pydantic import Field, HttpUrl

from rotator.config_base import Section


class TelemetryConfig(Section):
    """Traces by OpenTelemetry, from a client's request over its wait and its swap to the engine. Off by default."""

    otlp_endpoint: HttpUrl | None = Field(
        default=None,
        description="base URL of an OTLP/HTTP collector, e.g. http://127.0.0.1:4318; no traces are made where absent",
    )
    headers_env: str | None = Field(
        default=None, description="environment variable with headers for the collector: `name=value,name=value`"
    )
    sample_ratio: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="share of requests that are traced, of those whose client has not decided; swaps always are",
    )
    service_name: str = Field(default="rotator", min_length=1)


class LogConfig(Section):
    """The service's own log, on standard error."""

    format: Literal["text", "json"] = Field(default="text", description="json: one object a line")
    level: Literal["debug", "info", "warning", "error"] = "info"
