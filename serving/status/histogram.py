"""Durations counted in buckets that grow by 4%: percentiles over several replicas, exact to 2%."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping

_GROWTH = math.log(1.04)
_SMALLEST_S = 1e-5


class Histogram:
    """Counts by bucket number; a plain mapping when it travels."""

    def __init__(self, counts: Mapping[int, int] = {}) -> None:  # copied
        self.counts = Counter(counts)

    def add(self, seconds: float, count: int = 1) -> None:
        self.counts[max(0, math.ceil(math.log(max(seconds, _SMALLEST_S) / _SMALLEST_S) / _GROWTH))] += count

    @classmethod
    def merged(cls, parts: Iterable[Mapping[int, int]]) -> "Histogram":
        whole = cls()
        for part in parts:
            whole.counts.update(part)
        return whole

    @property
    def total(self) -> int:
        return self.counts.total()

    def quantile_s(self, share: float) -> float | None:
        """None where nothing was counted; else the middle of the bucket that it falls into."""
        rank, seen = share * self.total, 0
        for bucket in sorted(self.counts):
            seen += self.counts[bucket]
            if seen >= rank:
                return _SMALLEST_S * math.exp((bucket - 0.5) * _GROWTH)
        return None
