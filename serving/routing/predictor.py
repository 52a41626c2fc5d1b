"""Time to first token and time per output token in closed form, corrected by what each replica showed."""

import math
from dataclasses import dataclass

import numpy as np

from serving.routing.ledger import Flight, FloatArray, IntArray

_REFRESH_S = 0.25


@dataclass(frozen=True, slots=True)
class CostModel:
    """One engine's measured speed. Seconds and tokens.

    A step decodes every active request and computes at most `chunk_tokens` prompt tokens:
    step = step_base_s + active * step_per_active_s + kv * step_per_kv_token_s
           + (prefill_step_s + prompt tokens * prefill_token_s, if it computes any).

    overhead_s: what a request pays outside the engine's steps (two network hops, tokenization).
    """

    step_base_s: float
    step_per_active_s: float
    step_per_kv_token_s: float
    prefill_step_s: float
    prefill_token_s: float
    chunk_tokens: int
    max_num_seqs: int
    kv_capacity_tokens: int
    overhead_s: float = 0.0

    def __post_init__(self) -> None:
        for name in ("chunk_tokens", "max_num_seqs", "kv_capacity_tokens", "step_base_s", "prefill_token_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")

    def decode_step_s(self, active: FloatArray, kv_tokens: FloatArray) -> FloatArray:
        """A step without prompt tokens, seconds."""
        step: FloatArray = (
            self.step_base_s + self.step_per_active_s * active + self.step_per_kv_token_s * kv_tokens
        )
        return step

    def prefill_rate(self, step_s: FloatArray) -> FloatArray:
        """Prompt tokens a second while decodes of `step_s` share the steps."""
        chunk = self.chunk_tokens
        rate: FloatArray = chunk / (step_s + self.prefill_step_s + chunk * self.prefill_token_s)
        return rate

    def ttft_s(
        self,
        prefill_ahead: FloatArray,
        own_tokens: FloatArray,
        step_s: FloatArray,
        active: FloatArray,
    ) -> FloatArray:
        """Seconds to the first token where a place in the batch and KV blocks are free.

        The tokens ahead and the request's own fill steps of `chunk_tokens`; before them, on average half of
        the step that runs on arrival.
        """
        tokens = prefill_ahead + own_tokens
        steps = np.ceil(tokens / self.chunk_tokens)
        ttft: FloatArray = (
            self.overhead_s
            + 0.5 * step_s * (active > 0)
            + steps * (step_s + self.prefill_step_s)
            + tokens * self.prefill_token_s
        )
        return ttft

    def admission_wait_s(
        self,
        in_flight: IntArray,
        kv_tokens: FloatArray,
        needed_kv_tokens: float,
        answer_s: FloatArray,
    ) -> FloatArray:
        """Seconds until a place in the batch and KV blocks for the request come free.

        Requests leave one by one over a mean answer's time `answer_s`, and give back their share of the
        cache.
        """
        # Mostly nobody waits, and two maxima are cheaper than the arithmetic over a large fleet.
        if (
            in_flight.max() < self.max_num_seqs
            and kv_tokens.max() + needed_kv_tokens <= self.kv_capacity_tokens
        ):
            return np.zeros(len(in_flight))
        missing_seats = np.maximum(0.0, (in_flight + 1 - self.max_num_seqs) / self.max_num_seqs)
        missing_kv = np.maximum(0.0, (kv_tokens + needed_kv_tokens) / self.kv_capacity_tokens - 1)
        wait: FloatArray = np.maximum(missing_seats, missing_kv) * answer_s
        return wait


class Residuals:
    """What predictions have to be multiplied by, learnt from finished requests, for TTFT and for TPOT.

    The sum of two running means of log(actual / predicted): one of the fleet, for what the closed form misses
    everywhere, and one of each replica's deviation from it. In logarithms a replica that is twice as slow and
    one that is twice as fast are equally far from zero. Every observation, and so every mean, is bounded by
    `limit`: one stall does not exile a replica. A deviation fades with `half_life_s`: who looked slow once
    and gets no requests for it is tried again, and nobody is chosen for ever because it alone was ever tried.

    Only finished requests are taken in: a failure is over quickly without having been fast.
    """

    def __init__(
        self,
        max_replicas: int,
        *,
        weight: float = 0.05,
        fleet_weight: float = 0.05,
        half_life_s: float = 30.0,
        limit: float = math.log(4),
    ) -> None:
        for name, value in (("weight", weight), ("fleet_weight", fleet_weight)):
            if not 0 < value <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {value}")
        self._weight, self._fleet_weight, self._limit = weight, fleet_weight, limit
        self._ttft, self._tpot = (_Deviations(max_replicas, half_life_s) for _ in range(2))

    def observe(self, flight: Flight, output_tokens: int, now_s: float) -> None:
        """Take in a finished request of `output_tokens` tokens."""
        if flight.first_token_at_s is None:
            return
        actual_ttft = flight.first_token_at_s - flight.dispatched_at_s
        self._move(self._ttft, flight.slot, actual_ttft, flight.predicted_ttft_s, now_s)
        if output_tokens > 1:
            actual_tpot = (now_s - flight.first_token_at_s) / (output_tokens - 1)
            self._move(self._tpot, flight.slot, actual_tpot, flight.predicted_tpot_s, now_s)

    def ttft_factors(self, num_slots: int, now_s: float) -> FloatArray:
        """What predicted TTFTs are to be multiplied by. [num_slots]"""
        return self._ttft.factors(num_slots, now_s)

    def tpot_factors(self, num_slots: int, now_s: float) -> FloatArray:
        """What predicted TPOTs are to be multiplied by. [num_slots]"""
        return self._tpot.factors(num_slots, now_s)

    def reset(self, slot: int) -> None:
        """For a new replica in the slot: it deviates in nothing yet."""
        self._ttft.set(slot, 0.0, 0.0)
        self._tpot.set(slot, 0.0, 0.0)

    def _move(
        self, deviations: "_Deviations", slot: int, actual_s: float, predicted_s: float | None, now_s: float
    ) -> None:
        if actual_s <= 0 or predicted_s is None:
            return
        error = max(-self._limit, min(self._limit, math.log(actual_s / predicted_s)))
        deviations.fleet += self._fleet_weight * (error - deviations.fleet)
        faded = deviations.faded(slot, now_s)
        deviations.set(slot, faded + self._weight * (error - deviations.fleet - faded), now_s)


class _Deviations:
    """Means of log(actual / predicted): the fleet's, and each replica's beyond it, which fades."""

    def __init__(self, max_replicas: int, half_life_s: float) -> None:
        self.fleet = 0.0
        self._half_life_s = half_life_s
        self._mean = np.zeros(max_replicas)
        self._observed_at_s = np.zeros(max_replicas)
        # exp(faded deviation) as of some moment: exponentials are what a decision over hundreds of replicas
        # would spend most on, and within `_REFRESH_S` a deviation fades by half a percent of itself.
        self._factors = np.ones(max_replicas)
        self._factors_at_s = -math.inf

    def factors(self, num_slots: int, now_s: float) -> FloatArray:
        if not 0 <= now_s - self._factors_at_s <= _REFRESH_S:
            self._factors = np.exp(self._mean * np.exp2((self._observed_at_s - now_s) / self._half_life_s))
            self._factors_at_s = now_s
        factors: FloatArray = math.exp(self.fleet) * self._factors[:num_slots]
        return factors

    def faded(self, slot: int, now_s: float) -> float:
        age_s = now_s - float(self._observed_at_s[slot])
        return float(self._mean[slot]) * 0.5 ** (age_s / self._half_life_s)

    def set(self, slot: int, mean: float, now_s: float) -> None:
        self._mean[slot], self._observed_at_s[slot] = mean, now_s
        self._factors[slot] = math.exp(mean)


class OutputLengths:
    """A running mean of answers' lengths, for requests whose own length nobody knows yet. Tokens."""

    def __init__(self, initial: float = 128.0, weight: float = 0.01) -> None:
        self.mean = initial
        self._weight = weight

    def observe(self, output_tokens: int) -> None:
        self.mean += self._weight * (output_tokens - self.mean)

    def expect(self, max_output_tokens: int | None) -> int:
        """The mean, or the client's limit where that is less."""
        mean = round(self.mean)
        return max(1, mean if max_output_tokens is None else min(mean, max_output_tokens))
