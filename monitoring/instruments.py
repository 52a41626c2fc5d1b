"""The table's rows as Prometheus metrics, in a registry of their own."""

from collections.abc import Iterable, Mapping
from itertools import product

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    disable_created_metrics,
    generate_latest,
)

from monitoring.histogram import CountedHistogram
from monitoring.metrics import METRICS, Metric, Source

disable_created_metrics()  # a second series for each counter, which nothing here reads


class Instruments:
    """What one process exports of the table. Labels are given in the table's order.

    One thread records, others may read the exposition.
    """

    def __init__(self, source: Source, label_values: Mapping[str, Iterable[str]] | None = None) -> None:
        """label_values: of labels whose values the configuration knows (`tier`), beside the table's."""
        self.registry = CollectorRegistry()
        self._counters: dict[str, Counter] = {}
        self._gauges: dict[str, Gauge] = {}
        self._histograms: dict[str, CountedHistogram] = {}
        self._totals: dict[tuple[str, ...], float] = {}
        for metric in METRICS.values():
            if metric.source == source:
                self._make(metric, {**metric.known, **(label_values or {})})

    def inc(self, name: str, *labels: str, by: float = 1) -> None:
        counter = self._counters[name]
        (counter.labels(*labels) if labels else counter).inc(by)

    def advance(self, name: str, total: float, *labels: str) -> None:
        """Bring a counter to the total that something else counts; a late, smaller one changes nothing."""
        key = (name, *labels)
        if (increment := total - self._totals.get(key, 0.0)) > 0:
            self.inc(name, *labels, by=increment)
            self._totals[key] = total

    def set(self, name: str, value: float, *labels: str) -> None:
        gauge = self._gauges[name]
        (gauge.labels(*labels) if labels else gauge).set(value)

    def observe(self, name: str, value: float, *labels: str, count: int = 1) -> None:
        self._histograms[name].observe(value, labels, count)

    def exposition(self) -> bytes:
        """The registry in Prometheus' text format."""
        return generate_latest(self.registry)

    def _make(self, metric: Metric, label_values: Mapping[str, Iterable[str]]) -> None:
        name, text, labels = metric.name, metric.help, metric.labels
        known: list[tuple[str, ...]] = []
        if labels and all(label in label_values for label in labels):
            known = list(product(*(label_values[label] for label in labels)))
        match metric.kind:
            case "counter":
                counter = self._counters[name] = Counter(name, text, labels, registry=self.registry)
                for values in known:
                    counter.labels(*values)
            case "gauge":
                gauge = self._gauges[name] = Gauge(name, text, labels, registry=self.registry)
                for values in known:
                    gauge.labels(*values)
            case "histogram":
                histogram = CountedHistogram(name, text, labels, metric.buckets, self.registry)
                self._histograms[name] = histogram
                for values in known:
                    histogram.add_series(values)
