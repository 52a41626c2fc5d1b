"""Time to first token and time of a step in closed form, from what each replica measures of itself."""

import dataclasses
from dataclasses import dataclass

import numpy as np

from serving.routing.gates import BoolArray
from serving.routing.ledger import FloatArray, IntArray


@dataclass(frozen=True, slots=True)
class CostModel:
    """One engine's measured speed and its limits. Seconds and tokens.

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


class FleetCosts:
    """The cost model of each replica, by slot, as arrays: a decision is a few vector operations.

    Arguments and results of the closed forms are [slots in use], and may stop short of the last ones.

    initial: holds for all replicas until one has said what it measured; then that holds for the silent ones,
        as the replicas of a fleet are mostly alike.
    """

    def __init__(self, initial: CostModel, max_replicas: int) -> None:
        self._default = dataclasses.astuple(initial)
        self._values = np.empty((len(self._default), max_replicas))
        self._values[:] = np.array(self._default)[:, None]
        self._is_measured: BoolArray = np.zeros(max_replicas, np.bool_)
        (
            self._step_base_s,
            self._step_per_active_s,
            self._step_per_kv_token_s,
            self._prefill_step_s,
            self._prefill_token_s,
            self.chunk_tokens,
            self.max_num_seqs,
            self.kv_capacity_tokens,
            self._overhead_s,
        ) = self._values

    def set(self, slot: int, measured: CostModel) -> None:
        self._default = dataclasses.astuple(measured)
        self._values[:, slot] = self._default
        self._is_measured[slot] = True
        if not self._is_measured.all():
            self._values[:, ~self._is_measured] = np.array(self._default)[:, None]

    def reset(self, slot: int) -> None:
        """For a new replica in the slot."""
        self._is_measured[slot] = False
        self._values[:, slot] = self._default

    def decode_step_s(self, active: FloatArray, kv_tokens: FloatArray) -> FloatArray:
        """A step without prompt tokens, seconds."""
        n = len(active)
        step: FloatArray = (
            self._step_base_s[:n]
            + self._step_per_active_s[:n] * active
            + self._step_per_kv_token_s[:n] * kv_tokens
        )
        return step

    def prefill_rate(self, step_s: FloatArray) -> FloatArray:
        """Prompt tokens a second while decodes of `step_s` share the steps."""
        n = len(step_s)
        chunk = self.chunk_tokens[:n]
        rate: FloatArray = chunk / (step_s + self._prefill_step_s[:n] + chunk * self._prefill_token_s[:n])
        return rate

    def ttft_s(
        self, prefill_ahead: FloatArray, own_tokens: FloatArray, step_s: FloatArray, active: FloatArray
    ) -> FloatArray:
        """Seconds to the first token where a place in the batch and KV blocks are free.

        The tokens ahead and the request's own fill steps of `chunk_tokens`; before them, on average half of
        the step that runs on arrival.
        """
        n = len(step_s)
        tokens = prefill_ahead + own_tokens
        steps = np.ceil(tokens / self.chunk_tokens[:n])
        ttft: FloatArray = (
            self._overhead_s[:n]
            + 0.5 * step_s * (active > 0)
            + steps * (step_s + self._prefill_step_s[:n])
            + tokens * self._prefill_token_s[:n]
        )
        return ttft

    def admission_wait_s(
        self, in_flight: IntArray, kv_tokens: FloatArray, needed_kv_tokens: float, answer_s: FloatArray
    ) -> FloatArray:
        """Seconds until a place in the batch and KV blocks for the request come free.

        Requests leave one by one over a mean answer's time `answer_s`, and give back their share of the
        cache.
        """
        n = len(in_flight)
        seats, capacity = self.max_num_seqs[:n], self.kv_capacity_tokens[:n]
        needed = kv_tokens + needed_kv_tokens
        # Mostly nobody waits, and two comparisons are cheaper than the arithmetic over a large fleet.
        if (in_flight < seats).all() and (needed <= capacity).all():
            return np.zeros(n)
        missing_seats = np.maximum(0.0, (in_flight + 1 - seats) / seats)
        missing_kv = np.maximum(0.0, needed / capacity - 1)
        wait: FloatArray = np.maximum(missing_seats, missing_kv) * answer_s
        return wait
