"""How many replicas there should be: a plain function of what the replicas foresee."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field, model_validator


class AutoscalingSettings(BaseModel):
    """The `cluster.autoscaling` section."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min_replicas: int = Field(default=1, ge=1, le=1024)
    max_replicas: int = Field(ge=1, le=1024)
    target_backlog_s: float = Field(default=0.5, gt=0)
    """Prompts that wait on a replica may take it so long to compute, in the mean."""
    target_busy: float = Field(default=0.6, gt=0, le=1)
    """Share of a replica's places in the batch that are taken, in the mean."""
    target_attainment: float = Field(default=0.99, gt=0, le=1)
    """Share of requests whose first token keeps its tier's deadline; refusals for lateness miss it."""
    hysteresis: float = Field(default=0.2, ge=0, lt=1)
    """Load may be so far above the target, or would have to be so far below it on one replica less, before
    anything changes."""
    look_back_s: float = Field(default=10.0, ge=2)
    upscale_delay_s: float = Field(default=5.0, ge=0)
    downscale_delay_s: float = Field(default=120.0, ge=0)
    """For so long without a break the wish must last."""

    @model_validator(mode="after")
    def _in_order(self) -> "AutoscalingSettings":
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas must be at least min_replicas ({self.min_replicas}), got {self.max_replicas}"
            )
        return self


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """One replica, averaged over the look-back. Of `num_deadlines` recent ones `num_kept` were kept."""

    backlog_s: float
    busy: float
    num_kept: float
    num_deadlines: float


def desired_replicas(current: int, loads: Sequence[ReplicaLoad], settings: AutoscalingSettings) -> int:
    """Within the bounds. `current` is the number asked for at present; `loads` are of those that run.

    Pressure 1 is the target. Up at once to where the pressure would be 1, as it is proportional to the load
    of each; or by one where deadlines are missed though the load is not near the lower edge. Down one at a
    time, and only where the rest would still be below the target, and deadlines are kept.
    """
    low, high = settings.min_replicas, settings.max_replicas
    if not loads or current < 1:
        return min(max(current, low), high)
    pressure = max(
        sum(load.backlog_s for load in loads) / len(loads) / settings.target_backlog_s,
        sum(load.busy for load in loads) / len(loads) / settings.target_busy,
    )
    # Those that are still starting take no load yet: what runs carries all of it.
    total = pressure * len(loads)
    num_deadlines = sum(load.num_deadlines for load in loads)
    attainment = sum(load.num_kept for load in loads) / num_deadlines if num_deadlines >= 1 else 1.0
    is_missing = attainment < settings.target_attainment

    desired = current
    if total > current * (1 + settings.hysteresis):
        desired = math.ceil(total)
    elif is_missing and total > current * (1 - settings.hysteresis) / 2 and len(loads) >= current:
        desired = current + 1
    elif not is_missing and current > 1 and total < (current - 1) * (1 - settings.hysteresis):
        desired = current - 1
    return min(max(desired, low), high)


class Attainment:
    """Recent deadlines, kept and all, older ones fading. Clock in seconds, monotonic."""

    HALF_LIFE_S = 20.0

    def __init__(self) -> None:
        self._kept = self._all = self._at_s = 0.0

    def add(self, is_kept: bool, now_s: float) -> None:
        self._kept, self._all = self.counts(now_s)
        self._at_s = now_s
        self._kept += is_kept
        self._all += 1

    def counts(self, now_s: float) -> tuple[float, float]:
        """Kept, and all."""
        memory = 0.5 ** (max(0.0, now_s - self._at_s) / self.HALF_LIFE_S)
        return self._kept * memory, self._all * memory
