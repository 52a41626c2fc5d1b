"""What one replica did in the last minutes. Bounded: as much memory after a year as after a day."""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from serving.status.histogram import Histogram
from serving.telemetry.exchange import Exchange

WINDOW_S = 300
"""Percentiles and tiers are of so long."""
SERIES_S = 120
"""Tokens by the second are kept so long."""
_SLICE_S = 10
MAX_RECENT = 20
_LATE = "late"


@dataclass(frozen=True, slots=True)
class RecentRequest:
    """A request that has ended, without any of its text. Milliseconds; `ended_at` is seconds since 1970."""

    ended_at: float
    request_id: str
    replica: str
    operation: str
    tier: str
    outcome: str
    status: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    queue_ms: float | None
    ttft_ms: float | None
    tokens_per_s: float | None
    total_ms: float


@dataclass(slots=True)
class _Slice:
    """Ten seconds."""

    number: int
    ttft: Histogram = field(default_factory=Histogram)
    itl: Histogram = field(default_factory=Histogram)
    tiers: Counter[tuple[str, str]] = field(default_factory=Counter)


class Activity:
    """Takes in exchanges as they end, gaps between tokens, and the engine's total of tokens twice a second.

    clock: seconds since 1970, so that replicas' seconds can be added up.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self.started_at = clock()
        self._slices: deque[_Slice] = deque(maxlen=WINDOW_S // _SLICE_S)
        self._recent: deque[RecentRequest] = deque(maxlen=MAX_RECENT)
        self._tokens: dict[int, int] = {}
        self._total_tokens: int | None = None

    def record(self, exchange: Exchange) -> None:
        made = exchange.generation
        if made is None:
            return
        now, ttft_s, tpot_s = self._clock(), exchange.ttft_s, exchange.tpot_s
        current = self._slice(now)
        outcome = exchange.outcome
        if ttft_s is not None:
            current.ttft.add(ttft_s)
            current.tiers[made.tier, "kept" if ttft_s <= made.ttft_limit_s else _LATE] += 1
        elif outcome in ("refused", "failed"):
            current.tiers[made.tier, outcome] += 1
        self._recent.append(
            RecentRequest(
                ended_at=now,
                request_id=exchange.request_id,
                replica=exchange.replica,
                operation=made.operation,
                tier=made.tier,
                outcome=outcome,
                status=exchange.status,
                prompt_tokens=made.num_prompt_tokens,
                cached_tokens=made.num_cached_tokens,
                output_tokens=made.num_output_tokens,
                queue_ms=_ms(exchange.queue_s),
                ttft_ms=_ms(ttft_s),
                tokens_per_s=round(1 / tpot_s, 1) if tpot_s else None,
                total_ms=round(exchange.total_s * 1e3, 1),
            )
        )

    def record_gaps(self, gaps: Iterable[tuple[float, int]]) -> None:
        """Seconds between neighbouring tokens, each with how often."""
        itl = self._slice(self._clock()).itl
        for seconds, count in gaps:
            itl.add(seconds, count)

    def sample(self, total_output_tokens: int) -> None:
        """The engine's counter, now."""
        second = int(self._clock())
        if self._total_tokens is not None:
            made = max(0, total_output_tokens - self._total_tokens)
            self._tokens[second] = self._tokens.get(second, 0) + made
        self._total_tokens = total_output_tokens
        while len(self._tokens) > SERIES_S + 2:
            del self._tokens[next(iter(self._tokens))]

    @property
    def tokens_by_second(self) -> dict[int, int]:
        return dict(self._tokens)

    @property
    def recent(self) -> tuple[RecentRequest, ...]:
        return tuple(self._recent)

    def window(self) -> tuple[Histogram, Histogram, Counter[tuple[str, str]]]:
        """TTFT, ITL, and by tier kept, late, refused, failed, of the last `WINDOW_S`."""
        oldest = int(self._clock()) // _SLICE_S - WINDOW_S // _SLICE_S
        slices = [s for s in self._slices if s.number > oldest]
        tiers: Counter[tuple[str, str]] = Counter()
        for one in slices:
            tiers.update(one.tiers)
        return (
            Histogram.merged(s.ttft.counts for s in slices),
            Histogram.merged(s.itl.counts for s in slices),
            tiers,
        )

    def _slice(self, now: float) -> _Slice:
        number = int(now) // _SLICE_S
        if not self._slices or self._slices[-1].number != number:
            self._slices.append(_Slice(number))
        return self._slices[-1]


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 1)
