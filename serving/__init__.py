"""The HTTP APIs and the Ray Serve replica. Does no tensor work."""

from serving.settings import ServingSettings

__all__ = ["ServingSettings"]
