"""The HTTP APIs and the Ray Serve replica. Does no tensor work."""

from serving.autoscaling import AutoscalingSettings
from serving.dispatch.settings import RoutingSettings
from serving.settings import ServingSettings

__all__ = ["AutoscalingSettings", "RoutingSettings", "ServingSettings"]
