"""Metric names, their recorders and exporter. Knows the engine's plain statistics types only."""

from monitoring.metrics import METRICS, Metric
from monitoring.recorder import Recorder
from monitoring.router_recorder import RouterRecorder

__all__ = ["METRICS", "Metric", "Recorder", "RouterRecorder"]
