"""A histogram that takes many equal observations in one call."""

import threading
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate

from prometheus_client import Metric as Family
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector, CollectorRegistry
from prometheus_client.utils import INF, floatToGoString


class CountedHistogram(Collector):
    """Like prometheus_client.Histogram, whose `observe` takes one value at a time: too slow for every token.

    One thread observes, others may collect.
    """

    def __init__(
        self,
        name: str,
        documentation: str,
        labelnames: Sequence[str],
        buckets: Sequence[float],
        registry: CollectorRegistry,
    ) -> None:
        self._name, self._documentation, self._labelnames = name, documentation, tuple(labelnames)
        self._bounds = (*buckets, INF)
        self._counts: dict[tuple[str, ...], list[int]] = {}
        self._sums: dict[tuple[str, ...], float] = {}
        self._lock = threading.Lock()
        if not labelnames:
            self.add_series(())
        registry.register(self)

    def add_series(self, labels: tuple[str, ...]) -> None:
        """Show a series before its first observation."""
        with self._lock:
            self._counts.setdefault(labels, [0] * len(self._bounds))
            self._sums.setdefault(labels, 0.0)

    def observe(self, value: float, labels: tuple[str, ...] = (), count: int = 1) -> None:
        """Take in `count` observations of one value."""
        if labels not in self._counts:
            self.add_series(labels)
        with self._lock:
            self._counts[labels][bisect_left(self._bounds, value)] += count
            self._sums[labels] += value * count

    def collect(self) -> Iterator[Family]:
        family = HistogramMetricFamily(self._name, self._documentation, labels=self._labelnames)
        with self._lock:
            series = [(labels, list(counts), self._sums[labels]) for labels, counts in self._counts.items()]
        for labels, counts, total in series:
            pairs = zip(map(floatToGoString, self._bounds), accumulate(counts), strict=True)
            family.add_metric(labels, [(bound, float(count)) for bound, count in pairs], total)
        yield family

    def describe(self) -> Iterator[Family]:
        yield HistogramMetricFamily(self._name, self._documentation, labels=self._labelnames)
