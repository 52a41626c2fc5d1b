"""The HTTP APIs and the Ray Serve replica. Does no tensor work."""

from serving.autoscaling import AutoscalingSettings
from serving.dispatch.settings import RoutingSettings
from serving.settings import ServingSettings
from serving.telemetry.settings import LogSettings, TelemetrySettings, TraceSettings
from serving.tenants.settings import TenantSettings

__all__ = [
    "AutoscalingSettings",
    "LogSettings",
    "RoutingSettings",
    "ServingSettings",
    "TelemetrySettings",
    "TenantSettings",
    "TraceSettings",
]
