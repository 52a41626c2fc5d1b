"""PromQL over the table's names alone: a name that is not in it does not become an expression."""

from collections.abc import Sequence
from dataclasses import dataclass

from monitoring.metrics import METRICS

_SERIES = {series: metric for metric in METRICS.values() for series in metric.series}


@dataclass(frozen=True)
class PromQL:
    """Expressions that share a selector and a window.

    selector: label matchers of every series, such as `job=~"$job"`.
    window: of rates, a duration such as `5m`.
    """

    selector: str = ""
    window: str = "5m"

    def series(self, name: str, matchers: str = "") -> str:
        """Samples of one name. Raises KeyError for one that nobody exports."""
        if name not in _SERIES:
            raise KeyError(f"{name} is not in monitoring.metrics")
        both = ",".join(part for part in (self.selector, matchers) if part)
        return f"{name}{{{both}}}" if both else name

    def rate(self, name: str, matchers: str = "") -> str:
        """A second, of each series."""
        return f"rate({self.series(name, matchers)}[{self.window}])"

    def sum_rate(self, name: str, matchers: str = "", by: Sequence[str] = ()) -> str:
        """A second, over all replicas."""
        return f"sum{_by(by)}({self.rate(name, matchers)})"

    def total(self, name: str, matchers: str = "", by: Sequence[str] = ()) -> str:
        """Of a gauge, over all replicas."""
        return f"sum{_by(by)}({self.series(name, matchers)})"

    def quantile(self, share: float, name: str, matchers: str = "", by: Sequence[str] = ()) -> str:
        """Of a histogram, over all replicas."""
        return f"histogram_quantile({share:g}, {self.sum_rate(f'{name}_bucket', matchers, ('le', *by))})"

    def mean(self, name: str, matchers: str = "", by: Sequence[str] = ()) -> str:
        """Of a histogram, over all replicas."""
        total, count = (self.sum_rate(f"{name}_{part}", matchers, by) for part in ("sum", "count"))
        return f"{total} / {count}"

    def share_above(self, bound: float, name: str, matchers: str = "", by: Sequence[str] = ()) -> str:
        """Of a histogram's observations, the share above one of its bounds, 0 to 1. Raises ValueError."""
        if bound not in METRICS[name].buckets:
            raise ValueError(f"{bound} is no bucket of {name}")
        below = f'le="{float(bound)}"'
        kept = self.sum_rate(f"{name}_bucket", ",".join(filter(None, (matchers, below))), by)
        return f"1 - {kept} / {self.sum_rate(f'{name}_count', matchers, by)}"


def _by(labels: Sequence[str]) -> str:
    return f" by ({', '.join(labels)}) " if labels else ""
