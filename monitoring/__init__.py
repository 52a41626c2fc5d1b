"""Metric names and their recorder. Knows the engine's plain statistics types only."""

from monitoring.metrics import METRICS, Metric
from monitoring.recorder import Recorder

__all__ = ["METRICS", "Metric", "Recorder"]
