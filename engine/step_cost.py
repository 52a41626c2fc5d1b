"""What a step takes, as a line in its decodes and prompt tokens, fitted to the steps that were."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

_WEIGHT = 0.1  # of a new step in the mean of its kind
_OUTLIER = 2.0  # a step counts as so many times its kind's mean at most: a stall is no change of speed
_HALF_LIFE_S = 60.0  # of a kind's word in the fit
_LEAST_WORD = 0.02  # what kinds that have not been seen for long still say
_FIT_PERIOD_S = 0.2
# Of the terms of `StepCost`, where rows leave it open: a step's duration alone says nothing of more decodes.
_SHARES = np.array([1.0, 0.01, 0.01, 1.0])


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds: base_s + decodes * per_decode_s, and prefill_step_s + prompt tokens * prefill_token_s in a
    step that computes any.
    """

    base_s: float
    per_decode_s: float
    prefill_step_s: float
    prefill_token_s: float

    def step_s(self, num_decodes: int, num_prompt_tokens: int) -> float:
        prefill_s = self.prefill_step_s + num_prompt_tokens * self.prefill_token_s
        return self.base_s + num_decodes * self.per_decode_s + (prefill_s if num_prompt_tokens else 0.0)

    def prompts_s(self, num_tokens: int, token_budget: int) -> float:
        """Of the steps that compute so many prompt tokens, with no decodes beside them."""
        num_steps = -(-num_tokens // token_budget)
        return num_steps * (self.base_s + self.prefill_step_s) + num_tokens * self.prefill_token_s


@dataclass(slots=True)
class _Kind:
    """Means of the steps of about the same numbers."""

    num_decodes: float
    num_prompt_tokens: float
    seconds: float
    seen_at_s: float

    def add(self, num_decodes: int, num_prompt_tokens: int, seconds: float, now_s: float) -> None:
        self.num_decodes += _WEIGHT * (num_decodes - self.num_decodes)
        self.num_prompt_tokens += _WEIGHT * (num_prompt_tokens - self.num_prompt_tokens)
        self.seconds += _WEIGHT * (min(seconds, _OUTLIER * self.seconds) - self.seconds)
        self.seen_at_s = now_s


@dataclass
class StepCostMeter:
    """Keeps one mean for each kind of step (numbers up to the same power of two) and fits the line to the
    means, so that what comes often does not drown what comes seldom.

    The fit is a weighted least-squares one of relative errors, with no negative term; kinds fade with the
    time since they were last seen, for a machine's speed changes with what else it does.
    """

    clock: Callable[[], float] = time.monotonic
    _kinds: dict[tuple[int, int], _Kind] = field(default_factory=dict)
    _cost: StepCost | None = None
    _fitted_at_s: float = -math.inf

    def observe(self, num_decodes: int, num_prompt_tokens: int, seconds: float) -> None:
        """A step of so many sequences that decode, and so many prompt tokens, has taken so long."""
        if seconds <= 0 or not (num_decodes or num_prompt_tokens):
            return
        key, now_s = (num_decodes.bit_length(), num_prompt_tokens.bit_length()), self.clock()
        if (kind := self._kinds.get(key)) is None:
            self._kinds[key] = _Kind(num_decodes, num_prompt_tokens, seconds, now_s)
            self._fitted_at_s = -math.inf
        else:
            kind.add(num_decodes, num_prompt_tokens, seconds, now_s)

    @property
    def cost(self) -> StepCost | None:
        """None before the first step. Fitted again a few times a second at most."""
        now_s = self.clock()
        if self._kinds and now_s - self._fitted_at_s >= _FIT_PERIOD_S:
            self._cost, self._fitted_at_s = self._fit(now_s), now_s
        return self._cost

    def _fit(self, now_s: float) -> StepCost:
        kinds = self._kinds.values()
        rows = np.array([(1.0, k.num_decodes, k.num_prompt_tokens > 0, k.num_prompt_tokens) for k in kinds])
        seconds = np.array([k.seconds for k in kinds])
        words = [max(_LEAST_WORD, 0.5 ** ((now_s - k.seen_at_s) / _HALF_LIFE_S)) for k in kinds]
        weights = np.sqrt(words) / seconds
        terms = _non_negative_fit(rows * weights[:, None], seconds * weights)
        return StepCost(*(float(t) for t in terms))


def _non_negative_fit(
    rows: npt.NDArray[np.float64], values: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Least squares without negative terms, found by leaving out the most negative one until none is.

    What the rows do not tell apart goes to the terms of the larger share (a least-norm solution).
    """
    rows = rows * _SHARES
    kept = list(range(rows.shape[1]))
    terms = np.zeros(rows.shape[1])
    while kept:
        found = np.linalg.lstsq(rows[:, kept], values, rcond=1e-9)[0]
        worst = int(found.argmin())
        if found[worst] >= 0:
            terms[kept] = found
            break
        del kept[worst]
    return terms * _SHARES
