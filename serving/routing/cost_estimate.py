"""The fleet's cost model, fitted to what its engines publish about themselves."""

import dataclasses
from dataclasses import dataclass

from serving.routing.predictor import CostModel

_MEMORY = 0.995  # of an older sample at a newer one: about the last 200 count
_RATE_WEIGHT = 0.1


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What one engine can hold and do in a step."""

    max_num_seqs: int
    chunk_tokens: int
    kv_capacity_tokens: int


@dataclass(frozen=True, slots=True)
class EngineSample:
    """One replica's published load and speed. `step_s` is its latest step's duration."""

    num_running: int
    num_waiting_tokens: int
    kv_tokens: int
    total_steps: int
    step_s: float
    prompt_tokens_per_s: float


class CostEstimator:
    """A line through (running sequences, step duration), older samples forgotten, and the prompts' rate.

    Steps with prompt tokens in them would bend the line, so that samples with a prompt under way are left
    out. The KV term is left to the residuals: between neighbouring samples it moves with the sequences.
    One model serves the whole fleet; a replica that differs shows in its residual.
    """

    def __init__(self, initial: CostModel) -> None:
        self.model = initial
        self._weight = self._x = self._y = self._xx = self._xy = 0.0
        self._prefill_token_s: float | None = None

    def set_limits(self, limits: EngineLimits) -> None:
        """Those of the replica that spoke last: the fleet is of one kind."""
        self.model = dataclasses.replace(
            self.model,
            max_num_seqs=limits.max_num_seqs,
            chunk_tokens=limits.chunk_tokens,
            kv_capacity_tokens=limits.kv_capacity_tokens,
        )

    def observe(self, sample: EngineSample) -> None:
        if sample.prompt_tokens_per_s > 0:
            seconds, known = 1 / sample.prompt_tokens_per_s, self._prefill_token_s
            self._prefill_token_s = seconds if known is None else known + _RATE_WEIGHT * (seconds - known)
            self.model = dataclasses.replace(self.model, prefill_token_s=self._prefill_token_s)
        if sample.num_running > 0 and sample.num_waiting_tokens == 0 and sample.step_s > 0:
            self._add(float(sample.num_running), sample.step_s)
            base_s, per_active_s = self._line()
            self.model = dataclasses.replace(
                self.model, step_base_s=base_s, step_per_active_s=per_active_s, step_per_kv_token_s=0.0
            )

    def _add(self, x: float, y: float) -> None:
        self._weight = self._weight * _MEMORY + 1
        self._x = self._x * _MEMORY + x
        self._y = self._y * _MEMORY + y
        self._xx = self._xx * _MEMORY + x * x
        self._xy = self._xy * _MEMORY + x * y

    def _line(self) -> tuple[float, float]:
        """Intercept and slope in seconds; neither negative, and the intercept never nothing."""
        x, y = self._x / self._weight, self._y / self._weight
        variance = self._xx / self._weight - x * x
        covariance = self._xy / self._weight - x * y
        # Below a variance of a tenth of a sequence there is nothing to see a slope in.
        slope = min(max(0.0, covariance / variance), 0.9 * y / x) if variance > 0.1 else 0.0
        return y - slope * x, slope
