"""All replicas' snapshots as the one answer that the page draws. Pure."""

import heapq
from collections import Counter
from collections.abc import Mapping, Sequence

from pydantic import BaseModel

from serving.status.activity import MAX_RECENT, SERIES_S, WINDOW_S, RecentRequest
from serving.status.histogram import Histogram
from serving.status.snapshot import Snapshot
from serving.tiers import Tier

_RATE_S = 10
"""Tokens per second are the mean of so long."""
_BAR_S = 2
_SILENT_AFTER_S = 5.0


class ModelView(BaseModel):
    name: str
    architecture: str
    parameters: int
    bits_per_weight: float | None
    weight_bytes: int
    weight_format: str
    max_model_len: int


class Percentiles(BaseModel):
    """Milliseconds; None where nothing was measured in the window."""

    p50: float | None
    p90: float | None
    p99: float | None
    count: int


class ReplicaView(BaseModel):
    """`condition` is loading, ready, draining, or silent: it was not heard of for some seconds."""

    replica: str
    condition: str
    uptime_s: float
    inflight: int
    running: int
    waiting: int
    kv_used_ratio: float
    tokens_per_s: float
    ttft_ms: Percentiles


class TierView(BaseModel):
    """Of the window's first tokens; `attainment` counts refused and failed ones as missed."""

    tier: str
    ttft_limit_ms: float
    kept: int
    late: int
    refused: int
    failed: int
    attainment: float | None


class Overview(BaseModel):
    """What the status page shows; the latest requests come without any of their text."""

    version: str
    now: float
    window_s: int
    needs_api_key: bool
    model: ModelView | None
    kv_tokens: int
    kv_used_tokens: int
    kv_dtype: str
    ttft_ms: Percentiles
    itl_ms: Percentiles
    tokens_per_s: float
    series_step_s: int
    tokens_per_s_series: list[float]
    running: int
    waiting: int
    replicas: list[ReplicaView]
    tiers: list[TierView]
    recent: list[RecentRequest]


def overview(
    snapshots: Sequence[Snapshot], tiers: Mapping[str, Tier], version: str, now: float, *, needs_api_key: bool
) -> Overview:
    """`snapshots` are not empty; one may be older than the others."""
    ordered = sorted(snapshots, key=lambda s: (s.started_at, s.replica))
    model = next((s.model for s in ordered if s.model is not None), None)
    recent: list[RecentRequest] = heapq.nlargest(
        MAX_RECENT, (r for s in ordered for r in s.recent), key=lambda r: r.ended_at
    )
    return Overview(
        version=version,
        now=now,
        window_s=WINDOW_S,
        needs_api_key=needs_api_key,
        model=ModelView(
            name=model.name,
            architecture=model.architecture,
            parameters=model.num_parameters,
            bits_per_weight=(
                round(8 * model.weight_bytes / model.num_parameters, 2) if model.num_parameters else None
            ),
            weight_bytes=model.weight_bytes,
            weight_format=model.weight_format,
            max_model_len=model.max_model_len,
        )
        if model
        else None,
        kv_tokens=sum(s.kv_tokens for s in ordered),
        kv_used_tokens=sum(s.kv_used_tokens for s in ordered),
        kv_dtype=ordered[0].kv_dtype,
        ttft_ms=_percentiles(Histogram.merged(s.ttft for s in ordered)),
        itl_ms=_percentiles(Histogram.merged(s.itl for s in ordered)),
        tokens_per_s=round(sum(_rate(s, now) for s in ordered), 1),
        series_step_s=_BAR_S,
        tokens_per_s_series=_series(ordered, now),
        running=sum(s.num_running for s in ordered),
        waiting=sum(s.num_waiting for s in ordered),
        replicas=[_replica(s, now) for s in ordered],
        tiers=_tiers(ordered, tiers),
        recent=list(recent),
    )


def _percentiles(histogram: Histogram) -> Percentiles:
    def at(share: float) -> float | None:
        seconds = histogram.quantile_s(share)
        return None if seconds is None else round(seconds * 1e3, 2)

    return Percentiles(p50=at(0.5), p90=at(0.9), p99=at(0.99), count=histogram.total)


def _rate(snapshot: Snapshot, now: float) -> float:
    """The second that runs is not counted, it is not full."""
    last = int(now) - 1
    return sum(snapshot.tokens_by_second.get(s, 0) for s in range(last - _RATE_S + 1, last + 1)) / _RATE_S


def _series(snapshots: Sequence[Snapshot], now: float) -> list[float]:
    """Oldest first; bars stand at even seconds, so that they do not change while they move."""
    last = int(now) // _BAR_S * _BAR_S
    starts = range(last - SERIES_S, last, _BAR_S)
    return [
        sum(s.tokens_by_second.get(start + i, 0) for s in snapshots for i in range(_BAR_S)) / _BAR_S
        for start in starts
    ]


def _replica(snapshot: Snapshot, now: float) -> ReplicaView:
    is_silent = now - snapshot.taken_at > _SILENT_AFTER_S
    return ReplicaView(
        replica=snapshot.replica,
        condition="silent" if is_silent else snapshot.condition,
        uptime_s=round(now - snapshot.started_at, 1),
        inflight=snapshot.num_inflight,
        running=snapshot.num_running,
        waiting=snapshot.num_waiting,
        kv_used_ratio=round(snapshot.kv_used_tokens / max(1, snapshot.kv_tokens), 4),
        tokens_per_s=round(_rate(snapshot, now), 1),
        ttft_ms=_percentiles(Histogram(snapshot.ttft)),
    )


def _tiers(snapshots: Sequence[Snapshot], tiers: Mapping[str, Tier]) -> list[TierView]:
    """All configured ones, the most urgent first."""
    counts: Counter[tuple[str, str]] = Counter()
    for snapshot in snapshots:
        counts.update(snapshot.tiers)
    views = []
    for name, tier in sorted(tiers.items(), key=lambda item: (item[1].priority, item[1].ttft_s)):
        kept, late, refused, failed = (counts[name, what] for what in ("kept", "late", "refused", "failed"))
        total = kept + late + refused + failed
        views.append(
            TierView(
                tier=name,
                ttft_limit_ms=tier.ttft_s * 1e3,
                kept=kept,
                late=late,
                refused=refused,
                failed=failed,
                attainment=round(kept / total, 4) if total else None,
            )
        )
    return views
