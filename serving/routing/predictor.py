"""What the closed forms of `costs` are off by, and how long answers are: learnt from what was."""

import math

import numpy as np

from serving.routing.ledger import Flight, FloatArray

_REFRESH_S = 0.25


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
