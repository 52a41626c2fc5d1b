"""The sections `logs` and `traces` of the configuration."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

LogLevel = Literal["debug", "info", "warning", "error"]


class LogSettings(BaseModel):
    """The `logs` section."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    level: LogLevel = "info"
    """Of Peregrine's own loggers; `info` has one line for each request. Other libraries: warnings and up."""
    format: Literal["auto", "json", "text"] = "auto"
    """`auto`: text where a person reads it (a terminal), JSON otherwise."""
    prompts: bool = False
    """Prompts on the requests' lines, and exceptions' messages, which may quote them."""


class TraceSettings(BaseModel):
    """The `traces` section. What is None is left to OpenTelemetry's own environment variables; a collector's
    key comes by OTEL_EXPORTER_OTLP_HEADERS alone.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    exporter: Literal["auto", "otlp", "none"] = "auto"
    """`auto`: otlp where an endpoint is named, here or by OTEL_EXPORTER_OTLP_[TRACES_]ENDPOINT, or
    OTEL_TRACES_EXPORTER says so; none otherwise."""
    endpoint: str | None = Field(default=None, pattern=r"^https?://")
    """Of the collector, without a path. OTLP's usual ports: 4318 (http/protobuf), 4317 (grpc)."""
    protocol: Literal["http/protobuf", "grpc"] | None = None
    """OTEL_EXPORTER_OTLP_[TRACES_]PROTOCOL, or http/protobuf."""
    sample_ratio: float | None = Field(default=None, ge=0, le=1)
    """Of requests that come without a trace; who brings one has decided already. OTEL_TRACES_SAMPLER, or
    all."""


class TelemetrySettings(BaseModel):
    """Both, as the processes of a cluster get them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    logs: LogSettings = LogSettings()
    traces: TraceSettings = TraceSettings()
