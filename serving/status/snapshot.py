"""One replica as it tells the others of itself. Plain and picklable: it travels between processes."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from engine import ModelInfo
from serving.status.activity import RecentRequest

if TYPE_CHECKING:
    from serving.state import ReplicaState

Condition = Literal["loading", "ready", "draining"]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Counts of histograms by bucket, of tiers by (tier, what became of the first token)."""

    replica: str
    taken_at: float
    started_at: float
    condition: Condition
    model: ModelInfo | None
    num_inflight: int
    num_running: int
    num_waiting: int
    kv_tokens: int
    kv_used_tokens: int
    kv_dtype: str
    tokens_by_second: Mapping[int, int]
    ttft: Mapping[int, int]
    itl: Mapping[int, int]
    tiers: Mapping[tuple[str, str], int]
    recent: tuple[RecentRequest, ...]


def take_snapshot(state: "ReplicaState") -> Snapshot:
    state.collect()
    engine, activity = state.loaded_engine, state.activity
    stats = engine.stats() if engine is not None else None
    ttft, itl, tiers = activity.window()
    condition: Condition = "loading" if engine is None else "draining" if state.is_draining else "ready"
    return Snapshot(
        replica=state.replica,
        taken_at=time.time(),
        started_at=activity.started_at,
        condition=condition,
        model=engine.model if engine is not None else None,
        num_inflight=state.admission.num_inflight,
        num_running=stats.num_running if stats else 0,
        num_waiting=stats.num_waiting if stats else 0,
        kv_tokens=stats.num_blocks * state.kv_block_tokens if stats else 0,
        kv_used_tokens=(stats.num_blocks - stats.num_free_blocks) * state.kv_block_tokens if stats else 0,
        kv_dtype=state.kv_dtype,
        tokens_by_second=activity.tokens_by_second,
        ttft=dict(ttft.counts),
        itl=dict(itl.counts),
        tiers=dict(tiers),
        recent=activity.recent,
    )
