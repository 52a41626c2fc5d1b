"""Whether spans are made, and where they go. OpenTelemetry's SDK is loaded only if they are.

The standard environment variables hold: OTEL_SDK_DISABLED, OTEL_TRACES_EXPORTER, OTEL_EXPORTER_OTLP_*,
OTEL_TRACES_SAMPLER, OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES, OTEL_BSP_*. The file wins over them.
"""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from serving.telemetry.settings import TraceSettings

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

_PROTOCOLS = ("http/protobuf", "grpc")
_TRACES_PATH = "/v1/traces"


def is_on(settings: TraceSettings, environ: Mapping[str, str] = os.environ) -> bool:
    """Raises ValueError for what the environment asks for and cannot be had."""
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true" or settings.exporter == "none":
        return False
    if settings.exporter == "otlp" or settings.endpoint is not None:
        return True
    asked = environ.get("OTEL_TRACES_EXPORTER", "").strip()
    if asked not in ("", "otlp", "none"):
        raise ValueError(f"OTEL_TRACES_EXPORTER: must be otlp or none, got {asked!r}")
    if asked:
        return asked == "otlp"
    return bool(
        environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    )


def protocol(settings: TraceSettings, environ: Mapping[str, str] = os.environ) -> str:
    """Raises ValueError for one that is not spoken."""
    asked = (
        settings.protocol
        or environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL")
        or environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")
        or _PROTOCOLS[0]
    )
    if asked not in _PROTOCOLS:
        raise ValueError(
            f"OTEL_EXPORTER_OTLP_PROTOCOL: must be one of {', '.join(_PROTOCOLS)}, got {asked!r}"
        )
    return asked


def check_environment(settings: TraceSettings, environ: Mapping[str, str] = os.environ) -> None:
    """Raises ValueError now rather than in every replica."""
    if is_on(settings, environ):
        protocol(settings, environ)


def create_provider(
    settings: TraceSettings, version: str, instance: str, exporter: "SpanExporter | None" = None
) -> "TracerProvider":
    """Its `shutdown` sends what waits.

    instance: this replica's name.
    exporter: another one than the configured (tests).
    """
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

    own = {"service.name": "peregrine", "service.version": version, "service.instance.id": instance}
    ratio = settings.sample_ratio
    provider = TracerProvider(
        sampler=None if ratio is None else ParentBased(TraceIdRatioBased(ratio)),  # None: OTEL_TRACES_SAMPLER
        resource=Resource(own).merge(OTELResourceDetector().detect()),
        shutdown_on_exit=False,
    )
    provider.add_span_processor(BatchSpanProcessor(exporter or _otlp_exporter(settings)))
    return provider


def _otlp_exporter(settings: TraceSettings) -> "SpanExporter":
    endpoint = settings.endpoint
    if protocol(settings) == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as OverGrpc

        return OverGrpc(endpoint=endpoint)
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as OverHttp

    return OverHttp(endpoint=None if endpoint is None else endpoint.rstrip("/") + _TRACES_PATH)
